"""Another view of a source: a slice of a split, as TFDS writes it, or other class numbers."""

import collections
import logging
import re
from collections.abc import Sequence

import numpy as np

from hybrid_flax.data.sources.base import Encoded, EncodedSource, digest, some
from hybrid_flax.errors import InputError

_PLACE = "(?:[0-9]{1,18}|(?:100|[0-9]{1,2})%)?"


def split_name(text: str) -> tuple[str, str]:
    """(name, slice or ""): "train[:90%]" → ("train", ":90%"). InputError for anything else."""
    match = re.fullmatch(rf"([^\[\]]+)(?:\[({_PLACE}:{_PLACE})\])?", text)
    if not match:
        raise InputError(
            f"split {text[:80]!r} is not understood; expected a name, or a part such as "
            "train[:90%], train[90%:], train[:5000]"
        )
    return match[1], match[2] or ""


class _View(EncodedSource):
    """Another source, seen otherwise."""

    def __init__(self, source: EncodedSource):
        self._source = source
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.labels = source.labels
        self.found_in, self.left_out = source.found_in, source.left_out

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def identity(self) -> str:
        return self._source.identity()


class Subset(_View):
    """Some images of another source."""

    def __init__(self, source: EncodedSource, chosen: Sequence[int] | np.ndarray):
        super().__init__(source)
        self._chosen = np.asarray(chosen, np.int64)
        if source.labels is not None:
            self.labels = source.labels[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def name(self, index: int) -> str:
        return self._source.name(int(self._chosen[index]))

    def identity(self) -> str:
        return digest([self._source.identity(), self._chosen.tobytes()])

    def read(self, index: int) -> Encoded:
        return self._source.read(int(self._chosen[index]))


class Renumbered(_View):
    """A source whose classes are numbered by other names, those a model was trained with.

    Args:
      classes: their names. An image of the class `classes[i]` has the label i.

    Raises:
      InputError: images are of classes that `classes` has not, or names are not unique.
    """

    def __init__(self, source: EncodedSource, classes: Sequence[str]):
        super().__init__(source)
        names = source.class_names
        assert names is not None, "a source without class names has nothing to be renumbered by"
        where = source.found_in or "the data"
        _check_unique(names, f"of {where}")
        _check_unique(classes, "that the model was trained with")
        numbers = {name: number for number, name in enumerate(classes)}
        self.num_classes, self.class_names = len(classes), list(classes)
        self._numbers = np.array([numbers.get(name, -1) for name in names], np.int64)
        used = range(len(names)) if source.labels is None else np.unique(source.labels)
        unknown = [names[number] for number in used if self._numbers[number] < 0]
        if unknown:
            raise InputError(
                f"{where}: {len(unknown)} of {len(used)} classes, {some(unknown)}, are not among "
                f"the {len(classes)} that the model was trained with: {some(classes)}"
            )
        if source.labels is not None:
            self.labels = self._numbers[source.labels]

    def read(self, index: int) -> Encoded:
        found = self._source.read(index)
        return found._replace(label=int(self._numbers[found.label]))


def numbered_by(source: EncodedSource, classes: Sequence[str] | None) -> EncodedSource:
    """The source with its classes numbered by `classes`; itself, if it has no names or the same.

    That numbers without names are taken as they are is said.
    """
    names = source.class_names
    if classes is not None and names is None:
        logging.warning(
            "%s has class numbers without names: they are taken for those of the %d classes that "
            "the model was trained with, %s",
            source.found_in or "the data",
            len(classes),
            some(classes),
        )
    if classes is None or names is None or list(names) == list(classes):
        return source
    return Renumbered(source, classes)


def _check_unique(names: Sequence[str], whose: str) -> None:
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise InputError(
            f"the classes {whose} cannot be told apart by name: {some(twice)} stand for several "
            "each. Such names must be the same in all splits, in the same order"
        )


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
