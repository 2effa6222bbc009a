"""Datasets of TensorFlow Datasets, read without TensorFlow."""

import difflib

from hybrid_flax.data.sources.base import TRY_DIGITS, Encoded, EncodedSource
from hybrid_flax.errors import InputError

OURS = ("digits", "image_folder", "list_files", "tar_shards", "hugging_face")


class TfdsSource(EncodedSource):
    """Any TFDS dataset with features `image` and `label`, prepared for random access.

    TensorFlow is not needed to read one: TFDS's `data_source` reads ArrayRecord files directly.
    The split may be a slice as TFDS writes it, `train[:90%]`, in the order of the records.
    """

    def __init__(self, name: str, path: str, split: str):
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(name, data_dir=path or None)
        except tfds.core.DatasetNotFoundError:
            close = difflib.get_close_matches(
                name, [*OURS, *tfds.list_builders(with_community_datasets=False)]
            )
            raise InputError(
                f"unknown dataset {name!r}: neither {', '.join(OURS)}, nor a TFDS dataset"
                + (f". Did you mean {' or '.join(close)}?" if close else f". {TRY_DIGITS}")
            ) from None
        prepare = _how_to_prepare(name, path)
        if not builder.info.splits:
            raise InputError(f"dataset {name} is not prepared in {builder.data_dir}. {prepare}")
        found = _find_split(name, split, builder.info.splits)
        for feature in ("image", "label"):
            if feature not in builder.info.features:
                raise InputError(
                    f"dataset {name} has no feature {feature!r}, only "
                    f"{', '.join(builder.info.features)}: it is not for image classification"
                )
        try:
            self._records = builder.as_data_source(
                found, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except NotImplementedError:
            raise InputError(
                f"dataset {name} in {builder.data_dir} is stored as "
                f"{builder.info.file_format.name}, which has no random access. {prepare}"
            ) from None
        except ValueError as error:  # a slice that is none, or is empty
            raise InputError(
                f"dataset {name} has no images in the split {found!r}: {error}"
            ) from error
        self._name = f"{name}/{found}"
        label = builder.info.features["label"]
        self.num_classes: int = label.num_classes
        self.class_names: list[str] = label.names

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> Encoded:
        record = self._records[index]
        label, name = int(record["label"]), f"{self._name}[{index}]"
        if file_name := record.get("file_name"):  # ImageNet has one
            name = f"{name}:{self.class_names[label]}/{file_name.decode()}"
        return Encoded(record["image"], label, name)


def _find_split(name: str, split: str, splits) -> str:
    """The split of that name; of validation splits any that usually serve as one."""
    wanted, bracket, part = split.partition("[")
    candidates = ("validation", "val", "test") if wanted == "val" else (wanted,)
    for candidate in candidates:
        if candidate in splits:
            return candidate + bracket + part
    raise InputError(
        f"dataset {name} has no split {' or '.join(candidates)}; it has {', '.join(splits)}: "
        "--config.dataset.train_split=, --config.dataset.val_split="
    )


def _how_to_prepare(name: str, path: str) -> str:
    if name == "imagenet2012":
        how = (
            "Make it once from the two tar files of https://image-net.org:\n"
            "  python -m hybrid_flax.data.prepare_imagenet --train_tar=ILSVRC2012_img_train.tar "
            f"--val_tar=ILSVRC2012_img_val.tar --out={path or 'DIR'}"
            + ("" if path else "\nand train with --config.dataset.path=DIR.")
        )
    else:
        how = (
            "Prepare it once, in an environment of its own because that step needs TensorFlow:\n"
            "  python -m venv tfds-env && tfds-env/bin/pip install tensorflow tensorflow-datasets "
            "array_record\n"
            f"  tfds-env/bin/tfds build {name} --file_format=array_record"
            f"{f' --data_dir={path}' if path else ''}"
        )
    return (
        f"{how}\n"
        "Or use folders of images: --config.dataset.name=image_folder --config.dataset.path=DIR.\n"
        f"{TRY_DIGITS}."
    )
