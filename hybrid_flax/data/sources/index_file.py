"""Indexes kept in files, which are used only while they are whole and up to date."""

import contextlib
import os
import secrets
import stat
import sys
from collections.abc import Callable

import numpy as np

from hybrid_flax.errors import InputError
from hybrid_flax.text_files import check_local

Table = dict[str, np.ndarray]


def load(file: str | os.PathLike, stamp: str) -> Table | None:
    """Reads what `save` wrote; None if there is none, of another stamp, damaged or not readable."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            return None
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as saved:
            if saved["stamp"].dtype.kind != "U" or str(saved["stamp"]) != stamp:
                return None
            return {name: saved[name] for name in saved.files if name != "stamp"}
    except Exception:  # np.load and zipfile raise OSError, ValueError, BadZipFile, zlib.error, …
        return None


def save(file: str | os.PathLike, stamp: str, table: Table) -> None:
    """Writes a table, which is there whole or not at all, readable by whom the umask lets.

    Raises OSError if it cannot.
    """
    file = os.fspath(file)
    partial = f"{file}.{secrets.token_hex(8)}.tmp"  # several hosts may do it at the same time
    try:
        number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with open(number, "wb") as stream:
            np.savez(stream, allow_pickle=False, stamp=np.array(stamp), **table)
        os.replace(partial, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def load_or_make(
    name: str,
    folder: str,
    beside: str,
    stamp: str,
    make: Callable[[], Table],
    fits: Callable[[Table], bool],
) -> Table:
    """Finds an index, or makes it and keeps it for the next time.

    It lies in `folder` where that is given, else `beside` the data. Where it cannot be replaced
    there (a folder of somebody else), the user's cache serves instead.

    Args:
      fits: whether a table that was found holds what it should.

    Raises InputError if `folder` is given and nothing can be written there.
    """
    places = [os.path.join(place, name) for place in (folder or beside, _cache()) if place]
    for file in places:
        found = load(file, stamp)
        if found is not None and fits(found):
            return found
    if folder:
        _check_writable(folder)
    table = make()
    reasons = []
    for file in places:
        try:
            os.makedirs(os.path.dirname(file), exist_ok=True)
            save(file, stamp, table)
        except OSError as error:
            reasons.append(f"{file}: {error.strerror}")
        else:
            return table
    print(
        f"the index {name} cannot be kept, and is made anew each time ({'; '.join(reasons)}). Give "
        "it a place: --config.dataset.index=DIR",
        file=sys.stderr,
    )
    return table


def _cache() -> str:
    folder = os.environ.get("HYBRID_FLAX_CACHE") or "~/.cache/hybrid_flax"
    folder = os.path.expanduser(folder)
    return "" if folder.startswith("~") else os.path.join(folder, "indexes")


def _check_writable(folder: str) -> None:
    check_local(folder, "--config.dataset.index")
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "no permission to write")
    except OSError as error:
        raise InputError(
            f"cannot keep the index of the tar files in {folder}: {error.strerror}. Give it "
            "another place: --config.dataset.index=DIR"
        ) from error
