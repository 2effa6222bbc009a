"""Finds the files of a split by their names, as the Hugging Face Hub does it."""

import os
import re

from hybrid_flax.data.sources.base import TRY_DIGITS
from hybrid_flax.errors import InputError

_OTHER_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev")}


def find_shards(kind: str, path: str, split: str, endings: tuple[str, ...]) -> list[str]:
    """Finds files below `path`, sorted, with one of the endings and the split's name in them.

    The name must stand alone: `train-00000.parquet`, `data/imagenet-train-17.tar`, `val/3.tar`,
    not `trainer.tar`. "val" is also found as valid, validation, dev, and, failing these, test.

    Raises:
      InputError: no such file; says which splits there seem to be.
    """
    if not path:
        raise InputError(
            f"dataset {kind} needs a folder: --config.dataset.path=DIR, with {endings[0]} files "
            f"whose names, or folders, say train and val. {TRY_DIGITS}"
        )
    files = sorted(
        os.path.relpath(os.path.join(parent, file), path)
        for parent, _, names in os.walk(path)
        for file in names
        if file.endswith(endings)
    )
    names = [_OTHER_NAMES.get(split, (split,))] + ([("test",)] if split == "val" else [])
    for alternatives in names:
        found = [file for file in files if _words(file) & set(alternatives)]
        if found:
            return [os.path.join(path, file) for file in found]
    raise InputError(
        f"{path} has {len(files)} {' or '.join(endings)} files, none for the split {split!r}"
        + (f" (the first is {files[0]})" if files else "")
        + f": its name must be part of the file's or its folder's, as in {split}-00000{endings[0]}"
        + f". {TRY_DIGITS}"
    )


def _words(path: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+|(?<=[a-z])(?=[0-9])", path.lower()))
