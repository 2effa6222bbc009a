"""A part of a split, by a slice as TFDS writes it: `train[:90%]`, `train[5000:]`."""

import re
from collections.abc import Sequence

import numpy as np

from hybrid_flax.data.sources.base import Encoded, EncodedSource
from hybrid_flax.errors import InputError


def split_name(text: str) -> tuple[str, str]:
    """(name, slice or ""): "train[:90%]" → ("train", ":90%"). InputError for anything else."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(\d*%?:\d*%?)\])?", text)
    if not match:
        raise InputError(
            f"split {text!r} is not understood; expected a name, or a part such as train[:90%], "
            "train[90%:], train[:5000]"
        )
    return match[1], match[2] or ""


class Subset(EncodedSource):
    """Some images of another source."""

    def __init__(self, source: EncodedSource, chosen: Sequence[int] | np.ndarray):
        self._source, self._chosen = source, np.asarray(chosen, np.int64)
        self.num_classes, self.class_names = source.num_classes, source.class_names
        if source.labels is not None:
            self.labels = source.labels[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def name(self, index: int) -> str:
        return self._source.name(int(self._chosen[index]))

    def read(self, index: int) -> Encoded:
        return self._source.read(int(self._chosen[index]))


def part_of(source: EncodedSource, part: str, name: str) -> Subset:
    """A slice of a source, in a random order that is always the same.

    In that order, because files are sorted by class: so `train[:90%]` and `train[90%:]` share out
    the images, and both have all classes.

    Raises:
      InputError: the slice, of the split called `name`, is empty.
    """
    count = len(source)
    begin, end = (_place(text, count) for text in part.split(":"))
    order = np.random.RandomState(0).permutation(count)
    chosen = np.sort(order[slice(begin, end)])
    if not len(chosen):
        raise InputError(f"the split {name!r} is empty: there are {count} images in all")
    return Subset(source, chosen)


def _place(text: str, count: int) -> int | None:
    if not text:
        return None
    return round(count * int(text[:-1]) / 100) if text.endswith("%") else int(text)
