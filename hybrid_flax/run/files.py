"""Files of a run: written whole or not at all, never through a link, and read whatever they hold.

All functions that write raise OSError with the file's name.
"""

import contextlib
import errno
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

from hybrid_flax.errors import InputError


def open_regular(file: str | os.PathLike, flags: int) -> int:
    """Opens a regular file, as `os.open`; a link, a pipe or a device in its place is an OSError."""
    with _named(file):
        try:
            # A pipe that nobody reads, or writes, would block.
            descriptor = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise OSError(errno.ELOOP, "it is a link, and nothing goes through links") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


def append(file: str | os.PathLike, data: bytes, *, on_new_line: bool = False) -> None:
    """Adds to the end of a file, which is made if it is not there; all of it, or nothing.

    Args:
      on_new_line: ends the last line first, which a kill may have cut short.
    """
    descriptor = open_regular(file, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        with _named(file):
            size = os.fstat(descriptor).st_size
            if on_new_line and size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            try:
                _write(descriptor, data)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
    finally:
        os.close(descriptor)


def replace(file: str | os.PathLike, data: bytes) -> None:
    """Writes a file that is either the old or the new one, whenever we are killed."""
    temporary = f"{os.fspath(file)}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    descriptor = open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with _named(file):
            try:
                _write(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def replace_text(file: str | os.PathLike, text: str) -> None:
    """The same with text, as UTF-8; what is none, as names of files may be, is written \\udcff."""
    replace(file, text.encode(errors="backslashreplace"))


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


@contextlib.contextmanager
def _named(file: str | os.PathLike) -> Iterator[None]:
    """Gives the OSErrors of calls that only know a descriptor the name of the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise type(error)(error.errno, error.strerror or str(error), os.fspath(file)) from error
        raise


def explain(error: OSError) -> str:
    """What went wrong, without Python's words for it: "/run/metrics.jsonl: Disk quota exceeded"."""
    said = error.strerror or str(error) or type(error).__name__
    return said if error.filename is None else f"{os.fsdecode(error.filename)}: {said}"


def read_json_lines(
    file: str | os.PathLike, is_record: Callable[[Any], bool]
) -> tuple[list[dict[str, Any]], bytes | None]:
    """(the records of a file of JSON lines, its content if some of it is damaged)

    A last line that a kill cut short is left out, and is no damage. Lines that cannot be read are
    left out with a warning that counts them. Where there is no file there are no records.

    Args:
      is_record: whether what a line holds can be used.

    Raises:
      InputError: it cannot be read at all.
    """
    try:
        with open(open_regular(file, os.O_RDONLY), "rb") as stream:
            content = stream.read()
    except FileNotFoundError:
        return [], None
    except OSError as error:
        raise InputError(
            f"cannot read {explain(error)}. Mend it, or move it away: then it begins anew"
        ) from error
    lines = content.split(b"\n")
    records: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            record: Any = None
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # also bytes that are no text, and endless numbers
                pass
            if is_record(record):
                records.append(record)
            elif record is not None or number < len(lines):
                damaged.append(number)
    if not damaged:
        return records, None
    shown = ", ".join(map(str, damaged[:3])) + (", …" if damaged[3:] else "")
    logging.warning("%s: %d of its lines are damaged and left out: %s", file, len(damaged), shown)
    return records, content
