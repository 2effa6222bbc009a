"""Finds the files of a split by their names, as the Hugging Face Hub does it."""

import itertools
import os
import re
from typing import NamedTuple

from hybrid_flax.data.sources.base import TRY_DIGITS
from hybrid_flax.data.sources.splits import how_to_name, of_split
from hybrid_flax.data.sources.walk import Walk, name_below, say, walk
from hybrid_flax.errors import InputError


def find_shards(kind: str, path: str, split: str, endings: tuple[str, ...]) -> list[str]:
    """The files that `find_split` finds."""
    return find_split(kind, path, split, endings).files


def find_split(kind: str, path: str, split: str, endings: tuple[str, ...]) -> Walk:
    """Finds data files below `path`, sorted, with one of the endings and the split's name.

    Which files are data: see `walk.py`; which are the split's: see `splits.py`.

    Raises:
      InputError: no such file, or one is missing of x-00000-of-00003, x-00001-of-00003, ….
    """
    if not path:
        raise InputError(
            f"dataset {kind} needs a folder: --config.dataset.path=DIR, with {endings[0]} files "
            f"whose names, or folders, say train and val. {TRY_DIGITS}"
        )
    found = walk(path, endings)
    there = [name_below(path, file) for file in found.files]
    files = of_split(there, split)
    if not files:
        left_out = say(found.reasons(path))
        raise InputError(
            f"{path} has {len(there)} {' or '.join(endings)} files, none for the split {split!r}"
            + (f" (left out: {left_out})" if left_out else "")
            + ": its name must be part of the file's or its folder's, as in "
            + f"{split}-00000{endings[0]}. {how_to_name(split, there)}"
        )
    _check_complete(path, files, there)
    return found._replace(files=[os.path.join(path, file) for file in files])


class _Numbered(NamedTuple):
    """A file that says which of how many it is: x-00003-of-00010.tar."""

    folder: str
    before: str
    number: int
    total: int
    after: str


def _check_complete(path: str, files: list[str], there: list[str]) -> None:
    """Raises InputError where x-00003-of-00010 is there, and not all ten.

    The rest may be in another folder, in `there`: some parts of a set were made another split.
    Where a state.json lies beside the files, that says which there are, see `saved_sets.py`.
    """
    sets: dict[tuple[str, str, str], set[int]] = {}
    for one in filter(None, map(_numbered, files)):
        sets.setdefault((one.folder, one.before, one.after), set()).add(one.total)
    numbers: dict[tuple[str, str, int], set[int]] = {}
    for one in filter(None, map(_numbered, there)):
        numbers.setdefault((one.before, one.after, one.total), set()).add(one.number)
    for (folder, before, after), totals in sets.items():
        folder = os.path.join(path, folder) if folder else path
        if os.path.exists(os.path.join(folder, "state.json")):
            continue
        name = f"{before}*-of-*{after}"
        if len(totals) > 1:
            raise InputError(
                f"{folder}: files {name} of several sets, of "
                f"{' and of '.join(map(str, sorted(totals)))}. Keep those of one"
            )
        total = min(totals)
        _check_numbers(numbers[before, after, total], total, folder, name)


def _check_numbers(numbers: set[int], total: int, folder: str, name: str) -> None:
    first = 1 if total in numbers and 0 not in numbers else 0
    absent = total - sum(first <= number < first + total for number in numbers)
    if absent:
        missing = (number for number in range(first, first + total) if number not in numbers)
        shown = ", ".join(map(str, itertools.islice(missing, 3)))
        raise InputError(
            f"{folder}: {absent} of {total} files {name} are missing: number {shown}"
            f"{', …' if absent > 3 else ''}. Get them, or rename the others if these are all"
        )


def _numbered(file: str) -> _Numbered | None:
    folder, name = os.path.split(file)
    match = re.fullmatch(r"(.*?)([0-9]+)-of-([0-9]+)(.*)", name)
    if not match:
        return None
    after = re.sub(r"^-[0-9a-f]{8,}(?=\.)", "", match[4])  # a checksum of the file
    return _Numbered(folder, match[1], int(match[2]), int(match[3]), after)
