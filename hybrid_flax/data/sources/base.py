"""The interface of all sources of images, and the base of those that hold encoded files."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from hybrid_flax.data.images import open_photo
from hybrid_flax.errors import InputError

TRY_DIGITS = (
    "To try without any data: --config.dataset.name=digits, the handwritten digits that "
    "scikit-learn bundles"
)
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


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


class Encoded(NamedTuple):
    """An image file as it was stored."""

    data: bytes
    label: int
    name: str  # a path, or where in a file it is: for messages, and to find label maps


class EncodedSource:
    """A source of encoded image files.

    A kind of storage defines `read`, `__len__` and what a `Source` says of its classes.
    """

    num_classes: int
    class_names: Sequence[str] | None = None
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Encoded:
        """Reads an image's bytes. Raises UnreadableImageError, which names it."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Names an image as `read` does, which a kind of storage may know without reading."""
        return self.read(index).name

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        data, label, name = self.read(int(index))
        return open_photo(data, name), label


class LabelledSource(EncodedSource):
    """An encoded source that knows all labels from the start."""

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


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
