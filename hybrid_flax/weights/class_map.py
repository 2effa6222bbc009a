"""Class maps: which class of a pretrained classifier each class of a dataset is."""

import collections
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid_flax.errors import InputError
from hybrid_flax.models.structure import Structure
from hybrid_flax.text_files import read_lines


def read_class_map(path: str | os.PathLike, num_classes: int | None = 1000) -> list[int]:
    """Reads a file like L2ViT's `custom_map22kto1k.txt`: one row of the classifier per line.

    Args:
      num_classes: how many there are to be; None: any number.

    Raises:
      InputError: the file cannot be read as text, a line is not a whole number, or there are not
        so many of them.
    """
    rows = []
    for number, line in read_lines(path):
        text = line.strip()
        if text:
            if not (text.isascii() and text.isdecimal() and len(text) < 10):
                raise InputError(
                    f"{path}, line {number}: {text[:40]!r} is not a class index, 0 or more"
                )
            rows.append(int(text))
    if num_classes is not None and len(rows) != num_classes:
        raise InputError(
            f"{path} has {len(rows)} class indices, expected {num_classes}, one per line"
        )
    return rows


def check_rows(rows: Sequence[int], classes: int) -> None:
    """Refuses rows that a classifier of so many classes does not have, or that come twice."""
    if not len(rows):
        raise InputError("no class indices were given: a classifier needs at least one class")
    outside = [row for row in rows if not 0 <= row < classes]
    if outside:
        raise InputError(
            f"class index {outside[0]} is out of range: this classifier has {classes} classes, "
            f"0 to {classes - 1}. Is the checkpoint the one pretrained on ImageNet-22k?"
        )
    row, count = collections.Counter(rows).most_common(1)[0]
    if count > 1:
        raise InputError(f"class index {row} is given more than once")


def select_classes(
    weights: dict[str, Any], rows: Sequence[int], structure: Structure
) -> dict[str, Any]:
    """{path: array} of a model whose classifiers have only the given rows, in their order.

    Raises:
      InputError: no rows, a row twice, or one that the classifier does not have.
    """
    rows = list(rows)

    def select(path, array):
        if not structure.is_classifier(path):
            return array
        check_rows(rows, array.shape[-1])
        return array[..., rows]

    return {path: select(path, array) for path, array in weights.items()}


def keep_named_classes(
    loaded: dict[str, Any],
    fresh: dict[str, Any],
    theirs: Sequence[str] | None,
    ours: Sequence[str] | None,
    structure: Structure,
) -> dict[str, Any]:
    """The loaded weights, with the rows of their classifiers in the order of our classes' names.

    Classes that theirs have not begin with their fresh rows. Nothing is changed where names are
    not known, are the same, or have none in common; if such classifiers are as wide as ours, that
    they are kept for classes named otherwise is said.

    Args:
      loaded, fresh: {path: array} of the checkpoint, and of the model that is to be filled.
      theirs, ours: names of the classes by number.
    """
    if theirs is None or ours is None or list(theirs) == list(ours):
        return loaded
    then, now = _unique(theirs), _unique(ours)
    pairs = [(number, then[name]) for name, number in now.items() if name in then]
    if not pairs:
        if len(theirs) == len(ours):
            logging.warning(
                "the classifier is kept for classes that are named otherwise: number 0 was %r in "
                "the checkpoint and is %r now, and so on for all %d. If they mean something else, "
                "give the rows to keep: --config.init_class_map=",
                theirs[0],
                ours[0],
                len(ours),
            )
        return loaded
    new, old = map(list, zip(*pairs, strict=True))
    found = dict(loaded)
    for path in filter(structure.is_classifier, loaded.keys() & fresh.keys()):
        array, rows = np.asarray(loaded[path]), np.array(fresh[path])
        if array.shape[:-1] == rows.shape[:-1] and array.shape[-1] == len(theirs):
            rows[..., new] = array[..., old]
            found[path] = rows
    print(
        f"the classifier keeps {len(pairs)} of {len(ours)} classes, by name"
        + (f"; {len(ours) - len(pairs)} begin fresh" if len(pairs) < len(ours) else "")
    )
    return found


def _unique(names: Sequence[str]) -> dict[str, int]:
    """{name: number} of the names that only one class has."""
    counts = collections.Counter(names)
    return {name: number for number, name in enumerate(names) if counts[name] == 1}
