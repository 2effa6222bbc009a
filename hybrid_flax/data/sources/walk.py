"""Which files are data: one walk decides it for every source."""

import collections
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from hybrid_flax.errors import InputError

HIDDEN = "names that begin with a dot"
ENDING = "other endings"
NOT_REGULAR = "not regular files"
CIRCLE = "links in a circle"
LEFTOVER = "caches and leftovers of programs"

_LEFTOVERS = re.compile(
    "(cache-|tmp|indices-).*\\.arrow"  # Hugging Face datasets
    "|__pycache__|__MACOSX|@eaDir|#recycle|\\$RECYCLE\\.BIN|System Volume Information|lost\\+found"
)
_SAME_FOLDER = 16  # times that one folder is walked through by different links


class Walk(NamedTuple):
    """What lies below a folder."""

    files: list[str]  # joined with the folder, sorted
    left_out: dict[str, int]  # how many names, by reason
    examples: Mapping[str, str] = MappingProxyType({})  # the first of these names, by reason

    def reasons(self, path: str = "") -> dict[str, int]:
        """`left_out`, each reason with the first name, from `path` on."""
        first = {reason: name_below(path, name) for reason, name in self.examples.items()}
        return {
            f"{reason} ({first[reason]}{' …' if count > 1 else ''})": count
            for reason, count in self.left_out.items()
        }


def join(walks: Iterable[Walk]) -> Walk:
    """Several walks as one, in their order."""
    files: list[str] = []
    left_out: collections.Counter[str] = collections.Counter()
    examples: dict[str, str] = {}
    for one in walks:
        files += one.files
        left_out.update(one.left_out)
        examples = {**one.examples, **examples}
    return Walk(files, dict(left_out), examples)


def say(reasons: Mapping[str, int]) -> str:
    """What was left out, as "3 other endings (a.txt …), 1 not regular files (b.png)"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())


def name_below(path: str, file: str) -> str:
    """The name of a file from the folder `path` on; all of it, if it lies elsewhere."""
    folder = os.path.join(path, "")
    return file[len(folder) :] if file.startswith(folder) else file


def walk(folder: str, suffixes: tuple[str, ...]) -> Walk:
    """Finds the data files below a folder, in all of its folders.

    Left out, and counted once each, are: names that begin with a dot; what libraries and file
    managers leave behind; pipes, devices and sockets; links to a folder that they lie in; files
    with other endings. Other links are followed. A link that leads nowhere is a file: reading it
    says so.

    Args:
      suffixes: endings in lower case; names have them in any case.

    Raises:
      InputError: a folder cannot be listed.
    """
    files: list[str] = []
    left_out: collections.Counter[str] = collections.Counter()
    examples: dict[str, str] = {}
    visits: collections.Counter[tuple[int, int]] = collections.Counter()
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [(folder, (_key(folder),))]
    while todo:
        folder, way = todo.pop()
        for entry, reason in _entries(folder):
            if not reason and _is_folder(entry):
                key = _key(entry)
                visits[key] += 1
                if key not in way and visits[key] <= _SAME_FOLDER:
                    todo.append((entry.path, (*way, key)))
                    continue
                reason = CIRCLE
            reason = reason or _why_not(entry, suffixes)
            if reason:
                left_out[reason] += 1
                examples.setdefault(reason, entry.path)
            else:
                files.append(entry.path)
    return Walk(sorted(files), dict(left_out), examples)


def subfolders(folder: str) -> tuple[list[str], Walk]:
    """(names of the folders in a folder, sorted; files and other names that lie beside them).

    What `walk` leaves out is no folder here either.
    """
    names: list[str] = []
    beside: list[str] = []
    left_out: collections.Counter[str] = collections.Counter()
    examples: dict[str, str] = {}
    own = os.path.join(os.path.realpath(folder), "")
    for entry, reason in _entries(folder):
        if not reason and entry.is_symlink() and _is_folder(entry):
            lies_in_it = own.startswith(os.path.join(os.path.realpath(entry.path), ""))
            reason = CIRCLE if lies_in_it else ""
        if reason:
            left_out[reason] += 1
            examples.setdefault(reason, entry.path)
        elif _is_folder(entry):
            names.append(entry.name)
        else:
            beside.append(entry.path)
    return names, Walk(beside, dict(left_out), examples)


def _entries(folder: str) -> Iterator[tuple[os.DirEntry[str], str]]:
    """What a folder holds, sorted by name, with the reason to leave it out by its name, or ""."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot list the folder {folder}: {error.strerror or error}") from error
    for entry in found:
        if entry.name.startswith("."):
            yield entry, HIDDEN
        elif _LEFTOVERS.fullmatch(entry.name):
            yield entry, LEFTOVER
        else:
            yield entry, ""


def _why_not(entry: os.DirEntry[str], suffixes: tuple[str, ...]) -> str:
    """The reason why something that is no folder is no data file, or ""."""
    if not entry.name.lower().endswith(suffixes):
        return ENDING
    return "" if _is_regular(entry) else NOT_REGULAR


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that only lead to each other
        return False


def _is_regular(entry: os.DirEntry[str]) -> bool:
    if entry.is_file(follow_symlinks=False):
        return True
    try:
        return stat.S_ISREG(os.stat(entry.path).st_mode)
    except OSError:  # leads nowhere: reading it says so
        return entry.is_symlink()


def _key(place: str | os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = os.stat(place)
    except OSError as error:
        raise InputError(
            f"cannot look into the folder {os.fspath(place)}: {error.strerror or error}"
        ) from error
    return status.st_dev, status.st_ino
