"""The interface of all sources of images, and the base of those that hold encoded files."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from hybrid_flax.data.images import open_photo
from hybrid_flax.data.sources.walk import say
from hybrid_flax.errors import InputError

TRY_DIGITS = (
    "To try without any data: --config.dataset.name=digits, the handwritten digits that "
    "scikit-learn bundles"
)
# Of the formats that `images.py` decodes, in any case.
IMAGE_SUFFIXES = (
    *(".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif"),
)
MOST_BYTES = 1 << 30  # of one image file; what has more is none
_SIZES = 1000  # of so many files the identity of a dataset has the size


class Source(Protocol):
    """A labelled image collection with random access.

    Instances are pickled into data-loading processes: what is open stays behind, and is opened
    again there when first needed.
    """

    @property
    def num_classes(self) -> int:
        """How many classes there are; labels lie below it."""
        ...

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes; None where the data has none."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """Labels of all images, int [N]; None where finding out means reading every image."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Reads (photo, label). The photo may be opened only: `images.rgb` decodes it.

        Raises UnreadableImageError, which names the image.
        """
        ...

    def name(self, index: int) -> str:
        """Names an image for messages, and to find its label map: a path, where it has one."""
        ...

    def identity(self) -> str:
        """16 hex digits that change when files are renamed, exchanged, added or removed."""
        ...


class Encoded(NamedTuple):
    """An image file as it was stored."""

    data: bytes
    label: int
    name: str  # a path, or where in a file it is: for messages, and to find label maps


class EncodedSource:
    """A source of encoded image files.

    A kind of storage defines `read`, `__len__`, `identity` and what a `Source` says of its classes.
    """

    num_classes: int
    class_names: Sequence[str] | None = None
    labels: np.ndarray | None = None
    found_in: str = ""  # the folder or list that the split was found in, where it is one
    left_out: Mapping[str, int] = {}  # how many files that were found are not data, by reason

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Encoded:
        """Reads an image's bytes. Raises UnreadableImageError, which names it."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Names an image as `read` does, which a kind of storage may know without reading."""
        return self.read(index).name

    def identity(self) -> str:
        """Sums up which files these are: 16 hex digits, the same wherever the dataset lies."""
        labels = b"" if self.labels is None else np.asarray(self.labels, np.int64).tobytes()
        return digest([str(len(self)), labels])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        data, label, name = self.read(int(index))
        return open_photo(data, name), label


class LabelledSource(EncodedSource):
    """An encoded source that knows all labels from the start."""

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def digest(parts: Iterable[str | bytes]) -> str:
    """Sums up parts, in their order, to 16 hex digits."""
    found = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else os.fsencode(part)
        found.update(b"%d:" % len(data) + data)
    return found.hexdigest()[:16]


def identity_of_files(files: Sequence[str], path: str) -> str:
    """Sums up files by their names below `path`, in this order, and by sizes.

    Of more than 1000 files only 1000, evenly spaced, are asked for their size: a million questions
    take a network minutes.
    """
    folder = os.path.join(path, "")
    names = "\0".join(file.removeprefix(folder) for file in files)
    sizes = [str(_size(file)) for file in files[:: -(-len(files) // _SIZES) or 1]]
    return digest([names, *sizes])


def _size(file: str) -> int:
    try:
        return os.path.getsize(file)
    except OSError:  # unreadable images have their own way
        return -1


def describe_files(source: EncodedSource) -> str:
    """One line on what was taken: "12 images of data/train; left out: 2 other endings (a.txt …)".

    Where the labels are known it also says how many classes have no image.
    """
    said = f"{len(source):,} images" + (f" of {source.found_in}" if source.found_in else "")
    if source.labels is not None:
        without = source.num_classes - len(np.unique(source.labels))
        said += f"; {without:,} of {source.num_classes:,} classes without images" if without else ""
    if source.left_out:
        said += f"; left out: {say(source.left_out)}"
    return re.sub("[\x00-\x1f\x7f\ud800-\udfff]", "?", said)  # names of files may hold anything


def some(names: Sequence[str]) -> str:
    """The first of many names, for messages."""
    return ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "")


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
    """Raises InputError naming the first label that is no class number."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise InputError(
            f"{where}: image number {wrong[0]} has the label {labels[wrong[0]]}, and {len(wrong)} "
            f"of {len(labels)} labels are not from 0 to {num_classes - 1}"
            + (". Splits without labels cannot be used" if (labels < 0).all() else "")
        )


def fingerprint(source: Source) -> dict[str, int | str]:
    """Sums up what must not change while a run goes on, since an image is known by its number."""
    labels = source.labels
    known = {} if labels is None else {"labels": hashlib.sha256(labels.tobytes()).hexdigest()[:16]}
    return {"images": len(source), "classes": source.num_classes, **known}


def check_same_data(source: Source, before: dict[str, int | str], step: int) -> None:
    """Raises InputError if the training images are not those a checkpoint was made with."""
    now = fingerprint(source)
    changes = [
        f"{name}: {before[name]} then, {now[name]} now"
        for name in ("images", "classes", "labels")
        if name in before and name in now and before[name] != now[name]
    ]
    if changes:
        raise InputError(
            f"the training data changed since the checkpoint of step {step} "
            f"({'; '.join(changes)}): the run would go on with other images. Give it the same "
            "data, or begin another --workdir with --config.init_from= this one"
        )
