"""Datasets of TensorFlow Datasets, read without TensorFlow."""

import collections
import contextlib
import difflib
import os
import threading

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources.base import TRY_DIGITS, Encoded, EncodedSource, digest
from hybrid_flax.data.sources.descriptors import FILES_AT_ONCE
from hybrid_flax.data.sources.labels import class_number
from hybrid_flax.errors import InputError

OURS = ("digits", "image_folder", "list_files", "tar_shards", "hugging_face")


class TfdsSource(EncodedSource):
    """Any TFDS dataset with an image and a class number, prepared for random access.

    They are the features `image` and `label`, else the only image and the only class label;
    `image_column` and `label_column` name others. TensorFlow is not needed to read one: TFDS's
    `data_source` reads ArrayRecord files directly. The split may be a slice as TFDS writes it,
    `train[:90%]`, in the order of the records.
    """

    def __init__(
        self, name: str, path: str, split: str, *, image_column: str = "", label_column: str = ""
    ):
        import tensorflow_datasets as tfds

        builder = open_builder(name, path)
        prepare = _how_to_prepare(name, path)
        if not builder.info.splits:
            raise InputError(f"dataset {name} is not prepared in {builder.data_dir}. {prepare}")
        found = _find_split(name, split, builder.info.splits)
        self._image, self._label = _features(
            name, builder.info.features, image_column, label_column
        )
        try:
            self._records = builder.as_data_source(
                found, decoders={self._image: tfds.decode.SkipDecoding()}
            )
            files = sorted({str(i.filename) for i in builder.info.splits[found].file_instructions})
        except NotImplementedError:
            raise InputError(
                f"dataset {name} in {builder.data_dir} is stored as "
                f"{builder.info.file_format.name}, which has no random access. {prepare}"
            ) from None
        except ValueError as error:  # a slice that is none, or is empty
            raise InputError(
                f"dataset {name} has no images in the split {found!r}: {error}"
            ) from error
        self._identity = _identity(name, str(builder.version), found, files, len(self._records))
        self._name = self.found_in = f"{name}/{found}"
        label = builder.info.features[self._label]
        self.num_classes: int = label.num_classes
        self.class_names: list[str] = label.names
        self._reset()

    def _reset(self):
        self._readers: collections.OrderedDict[int, int] = (
            collections.OrderedDict()
        )  # by file: users
        self._lock = threading.Lock()  # Grain may read in threads

    def __getstate__(self):
        return {name: x for name, x in self.__dict__.items() if name not in ("_readers", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return len(self._records)

    def identity(self) -> str:
        """Says by 16 hex digits which version and split, in files of which sizes, this is."""
        return self._identity

    def read(self, index: int) -> Encoded:
        name = f"{self._name}[{index}]"
        try:
            with self._bounded(index):
                record = self._records[index]
            image, number = record[self._image], record[self._label]
        except Exception as error:  # ArrayRecord raises RuntimeError, TFDS what parsing raises
            text = " ".join(str(error).split())[:300] or type(error).__name__
            if "Too many open files" in text:  # which is no property of the image
                raise InputError(f"cannot read {name}: {text}") from error
            raise UnreadableImageError(f"cannot read image {name}: {text}") from error
        if not isinstance(image, bytes) or not image:
            raise UnreadableImageError(f"cannot read image {name}: the record is empty")
        label = class_number(number, f"{name}, feature {self._label}", self.num_classes)
        file_name = record.get("file_name")  # ImageNet has one
        if isinstance(file_name, bytes) and file_name:
            text = file_name.decode("utf-8", "replace")
            name = f"{name}:{self.class_names[label]}/{text}"
        return Encoded(image, label, name)

    @contextlib.contextmanager
    def _bounded(self, index: int):
        """Closes files that were not used for longest: array_record keeps open all it has read."""
        records = self._records.data_source
        if not hasattr(records, "_readers"):  # another format
            yield
            return
        file, _ = records._reader_idx_and_position(index)
        with self._lock:
            idle = [number for number, users in self._readers.items() if not users]
            for number in idle[: max(0, len(self._readers) + 1 - FILES_AT_ONCE)]:
                del self._readers[number]
                records._readers[number] = None
            self._readers[file] = self._readers.pop(file, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._readers[file] -= 1


def open_builder(name: str, path: str):
    """TFDS's description of a dataset; InputError if it knows none, or cannot read it."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=path or None)
        _ = builder.info.splits, builder.info.features
    except tfds.core.DatasetNotFoundError:
        close = difflib.get_close_matches(
            name, [*OURS, *tfds.list_builders(with_community_datasets=False)]
        )
        raise InputError(
            f"unknown dataset {name!r}: neither {', '.join(OURS)}, nor a TFDS dataset"
            + (f". Did you mean {' or '.join(close)}?" if close else f". {TRY_DIGITS}")
        ) from None
    except Exception as error:  # whatever reading odd JSON or messages raises
        text = " ".join(str(error).split())[:300]
        raise InputError(
            f"dataset {name} in {path or 'the default folder of TFDS'} cannot be opened "
            f"({type(error).__name__}: {text}). If it is prepared there, its dataset_info.json or "
            "features.json is damaged or gone: copy or prepare it anew"
        ) from error
    return builder


def _features(name: str, features, image: str, label: str) -> tuple[str, str]:
    """(feature of the image, feature of the class number)"""
    import tensorflow_datasets as tfds

    def find(wanted: str, usual: str, kind: type, field: str) -> str:
        fitting = [key for key in features if isinstance(features[key], kind)]
        if wanted:
            found = wanted if wanted in fitting else None
        elif usual in features:
            found = usual if usual in fitting else None
        else:
            found = fitting[0] if len(fitting) == 1 else None
        if found is None:
            there = ", ".join(f"{key} ({type(features[key]).__name__})" for key in features)
            raise InputError(
                f"dataset {name} has no feature {wanted or usual!r} of the kind {kind.__name__}, "
                f"only {there}: it is not for image classification, or needs "
                f"--config.dataset.{field}=NAME"
            )
        return found

    if not isinstance(features, tfds.features.FeaturesDict):
        raise InputError(f"dataset {name} is not for image classification: it is a {features}")
    image = find(image, "image", tfds.features.Image, "image_column")
    label = find(label, "label", tfds.features.ClassLabel, "label_column")
    if not features[label].num_classes:
        raise InputError(f"dataset {name} does not say how many classes its feature {label} has")
    return image, label


def _identity(name: str, version: str, split: str, files: list[str], images: int) -> str:
    """Checks that all files are there, and sums them up."""
    missing = [file for file in files if not os.path.exists(file)]
    if missing:
        raise InputError(
            f"dataset {name}, split {split}: {len(missing)} of {len(files)} files are not there, "
            f"such as {missing[0]}: copy or prepare it anew"
        )
    sizes = [f"{os.path.basename(file)} {os.path.getsize(file)}" for file in files]
    return digest([name, version, split, str(images), *sizes])


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
