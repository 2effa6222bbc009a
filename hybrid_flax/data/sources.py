"""Where images come from: random access by index, one small interface."""

import difflib
import os
from typing import Protocol

import numpy as np
from PIL import Image

from hybrid_flax.data.images import UnreadableImageError, decode
from hybrid_flax.errors import InputError

_IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


class Source(Protocol):
    """A labelled image collection. Instances are pickled into data-loading processes."""

    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """(RGB photo, label). Raises UnreadableImageError, which names the image."""
        ...


def open_source(name: str, path: str, split: str) -> Source:
    """Opens one split of a dataset.

    Args:
      name: "digits" (bundled with scikit-learn), "image_folder", or a TFDS dataset.
      path: folder of the images, or TFDS's data folder ("" for its default).
      split: "train" or "val".

    Raises:
      InputError: the dataset is unknown, not prepared, empty or inconsistent.
    """
    if name == "digits":
        return Digits(split)
    if name == "image_folder":
        return ImageFolder(path, split)
    return TfdsSource(name, path, split)


class Digits:
    """1,797 handwritten digits of 8×8 grey pixels (UCI, bundled with scikit-learn).

    A fixed random fifth, 360 images, is the "val" split.
    """

    num_classes = 10

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        data = load_digits()
        order = np.random.RandomState(0).permutation(len(data.target))
        chosen = order[:360] if split == "val" else order[360:]
        self._pixels = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
        self._labels = data.target[chosen]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[index]).convert("RGB"), int(self._labels[index])


class ImageFolder:
    """`path/train/CLASS/*.JPEG` and `path/val/CLASS/*.JPEG`; folders inside a class are walked too.

    Classes are numbered in the sorted order of the training folders' names, as torchvision does;
    to evaluate, `val` alone is enough.
    """

    def __init__(self, path: str, split: str):
        if not path:
            raise InputError(
                "dataset image_folder needs a folder: --config.dataset.path=DIR, holding "
                f"train/CLASS/*.JPEG and val/CLASS/*.JPEG. {_TRY_DIGITS}"
            )
        folders = _class_folders(path, split)
        has_train = os.path.isdir(os.path.join(path, "train"))
        classes = _class_folders(path, "train") if has_train else folders
        unknown = sorted(set(folders) - set(classes))
        if unknown:
            raise InputError(
                f"{path}/{split} has classes that {path}/train has not: {', '.join(unknown)}. "
                "Both need the same class folders"
            )
        numbers = {name: number for number, name in enumerate(classes)}
        self.num_classes = len(classes)
        self._files: list[str] = []
        self._labels: list[int] = []
        empty = []
        for name in folders:
            files = _image_files(os.path.join(path, split, name))
            if not files:
                empty.append(os.path.join(path, split, name))
            self._files += files
            self._labels += [numbers[name]] * len(files)
        if empty:
            raise InputError(
                f"class folders without images: {', '.join(empty)}. Add images (known endings: "
                f"{', '.join(_IMAGE_SUFFIXES)}) or remove the folders"
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file = self._files[index]
        try:
            with open(file, "rb") as stream:
                data = stream.read()
        except OSError as error:
            raise UnreadableImageError(f"cannot read image {file}: {error}") from error
        return decode(data, file), self._labels[index]


class TfdsSource:
    """Any TFDS dataset with features `image` and `label`, prepared for random access.

    TensorFlow is not needed to read one: TFDS's `data_source` reads ArrayRecord files directly.
    """

    def __init__(self, name: str, path: str, split: str):
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(name, data_dir=path or None)
        except tfds.core.DatasetNotFoundError:
            close = difflib.get_close_matches(
                name, ["digits", "image_folder", *tfds.list_builders(with_community_datasets=False)]
            )
            raise InputError(
                f"unknown dataset {name!r}: neither digits, nor image_folder, nor a TFDS dataset"
                + (f". Did you mean {' or '.join(close)}?" if close else f". {_TRY_DIGITS}")
            ) from None
        prepare = _how_to_prepare(name, path)
        if not builder.info.splits:
            raise InputError(f"dataset {name} is not prepared in {builder.data_dir}. {prepare}")
        splits = ("train",) if split == "train" else ("validation", "val", "test")
        found = [candidate for candidate in splits if candidate in builder.info.splits]
        if not found:
            raise InputError(
                f"dataset {name} has no split {' or '.join(splits)}; it has "
                f"{', '.join(builder.info.splits)}"
            )
        for feature in ("image", "label"):
            if feature not in builder.info.features:
                raise InputError(
                    f"dataset {name} has no feature {feature!r}, only "
                    f"{', '.join(builder.info.features)}: it is not for image classification"
                )
        try:
            self._records = builder.as_data_source(
                found[0], decoders={"image": tfds.decode.SkipDecoding()}
            )
        except NotImplementedError:
            raise InputError(
                f"dataset {name} in {builder.data_dir} is stored as "
                f"{builder.info.file_format.name}, which has no random access. {prepare}"
            ) from None
        self.num_classes = builder.info.features["label"].num_classes
        self._name = f"{name}/{found[0]}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        record = self._records[index]
        return decode(record["image"], f"{self._name}[{index}]"), int(record["label"])


_TRY_DIGITS = (
    "To try without any data: --config.dataset.name=digits, the handwritten digits that "
    "scikit-learn bundles"
)


def _how_to_prepare(name: str, path: str) -> str:
    manual = ""
    if name == "imagenet2012":
        manual = (
            "\n  (first put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, from "
            "https://image-net.org, into MANUAL_DIR)"
        )
    return (
        "Prepare it once, in an environment of its own because that step needs TensorFlow:\n"
        "  python -m venv tfds-env && tfds-env/bin/pip install tensorflow tensorflow-datasets "
        f"array_record{manual}\n"
        f"  tfds-env/bin/tfds build {name} --file_format=array_record"
        f"{f' --data_dir={path}' if path else ''}{' --manual_dir=MANUAL_DIR' if manual else ''}\n"
        "Or use folders of images: --config.dataset.name=image_folder --config.dataset.path=DIR.\n"
        f"{_TRY_DIGITS}."
    )


def _class_folders(path: str, split: str) -> list[str]:
    folder = os.path.join(path, split)
    if not os.path.isdir(folder):
        raise InputError(
            f"there is no folder {folder}. image_folder expects {path}/train/CLASS/*.JPEG and "
            f"{path}/val/CLASS/*.JPEG: one folder per class, the same names in both. {_TRY_DIGITS}"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise InputError(f"{folder} has no class folders; expected {folder}/CLASS/*.JPEG")
    return classes


def _image_files(folder: str) -> list[str]:
    return sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(_IMAGE_SUFFIXES)
    )
