"""Class maps: which class of a pretrained classifier each class of a dataset is."""

import collections
import os
from collections.abc import Sequence
from typing import Any

from hybrid_flax.errors import InputError
from hybrid_flax.models.structure import Structure


def read_class_map(path: str | os.PathLike, num_classes: int = 1000) -> list[int]:
    """Reads a file like L2ViT's `custom_map22kto1k.txt`: one row of the classifier per line.

    Raises:
      InputError: the file cannot be read, a line is not a whole number, or there are not
        `num_classes` of them.
    """
    try:  # a binary file: refused below
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise InputError(f"cannot read the class map {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            if not line.strip().isdecimal():
                raise InputError(f"{path}, line {number}: {line!r} is not a class index, 0 or more")
            rows.append(int(line))
    if len(rows) != num_classes:
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
