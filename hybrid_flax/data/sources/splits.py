"""What the splits of a dataset may be called, in every source that looks for them by name."""

import re
from collections.abc import Iterable, Sequence

from hybrid_flax.data.sources.base import TRY_DIGITS, some
from hybrid_flax.errors import InputError

_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev")}
_SPLIT_WORDS = {name for names in _NAMES.values() for name in names} | {"test"}


def other_names(split: str) -> list[tuple[str, ...]]:
    """Names to look for, the best first; those in a tuple are as good as each other.

    "val" is also found as valid, validation, dev, and, failing these, test.
    """
    return [_NAMES.get(split, (split,))] + ([("test",)] if split == "val" else [])


def find_name(split: str, there: Sequence[str], where: str) -> str | None:
    """Finds the name of a split, in any case, among those that are there; None if none is its own.

    Raises InputError where several are, and none is the split's name to the letter.
    """
    if split in there:
        return split
    for names in [(split.lower(),), *other_names(split)]:
        found = [name for name in there if name.lower() in names]
        if len(found) > 1:
            raise InputError(
                f"{where} has several that may be the split {split!r}: {some(found)}. Choose one: "
                f"--config.dataset.{_field(split)}={found[0]}"
            )
        if found:
            return found[0]
    return None


def of_split(files: Sequence[str], split: str) -> list[str]:
    """The files, of paths below a dataset, that have the split's name in their own or a folder's.

    The name must stand alone: `train-00000.parquet`, `data/imagenet-train-17.tar`, `val/3.tar`,
    not `trainer.tar`. Where a path has names of several splits, those nearest to the file count.
    """
    for names in other_names(split):
        wanted = [set(_split_into_words(name)) for name in names]
        found = [file for file in files if any(words and words <= _words(file) for words in wanted)]
        if found:
            return found
    return []


def how_to_name(split: str, there: Iterable[str]) -> str:
    """What to do about a split that was not found, given the names that lie there."""
    names = sorted(there)
    field = _field(split)
    advice = f"There lies {some(names) or 'nothing'}. Say its name: --config.dataset.{field}=NAME"
    if split != "train":
        advice += (
            "; or take a part of the training images: --config.dataset.train_split=train[:90%] "
            "--config.dataset.val_split=train[90%:]"
        )
    return f"{advice}. {TRY_DIGITS}"


def _field(split: str) -> str:
    return "train_split" if split in _NAMES["train"] else "val_split"


def _words(path: str) -> set[str]:
    """The words of a path, but of the splits' names only those of its last part that has any."""
    found: set[str] = set()
    for part in reversed(path.split("/")):
        words = set(_split_into_words(part))
        found |= words - _SPLIT_WORDS if found & _SPLIT_WORDS else words
    return found


def _split_into_words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]+[a-z]*", text.lower())
