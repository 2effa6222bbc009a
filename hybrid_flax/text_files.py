"""The door of text that users give: lists, maps, JSON. Only regular files of UTF-8 come in."""

import json
import os
import re
import stat
from collections.abc import Iterator
from typing import BinaryIO

from hybrid_flax.errors import InputError

_LONGEST_LINE = 1 << 20  # bytes
_LARGEST_JSON = 1 << 30  # bytes
_BOM = b"\xef\xbb\xbf"

File = str | os.PathLike[str]


def check_local(path: str, flag: str) -> None:
    """Raises InputError, naming the flag, for a URL: taken as a path it is a folder `gs:`."""
    if re.match(r"[A-Za-z][\w+.-]+://", path):
        raise InputError(
            f"{flag}={path}: it is written to with local paths only. Give a local folder, and copy "
            "that afterwards"
        )


def open_regular(file: File) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading bytes.

    A pipe or a device is not opened: that could wait for ever, or never end.

    Raises InputError, naming the file and the reason.
    """
    try:
        mode = os.stat(file).st_mode
        if not stat.S_ISREG(mode):
            raise InputError(f"{os.fspath(file)}: {_kind(mode)}; expected a regular file")
        return open(file, "rb")
    except OSError as error:
        raise InputError(f"{os.fspath(file)}: {error.strerror or error}") from error
    except ValueError as error:  # a null byte in the path; InputError is one, too
        if isinstance(error, InputError):
            raise
        raise InputError(f"{os.fspath(file)!r} is no path: {error}") from error


def read_bytes(file: File, most: int) -> bytes:
    """Reads a regular file of at most so many bytes; InputError, naming it, for any other."""
    name = os.fspath(file)
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise InputError(f"{name}: {size} bytes, where at most {most} are expected")
        try:
            return stream.read()
        except OSError as error:
            raise InputError(f"{name}: {error.strerror or error}") from error


def read_lines(file: File) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its end) of a text file.

    UTF-8, with or without a byte order mark, with line ends of Unix or Windows.

    Raises InputError, naming file and line, for anything else than text in a regular file.
    """
    name = os.fspath(file)
    with open_regular(file) as stream:
        number = 0
        while line := _readline(stream, name):
            number += 1
            if number == 1:
                line = line.removeprefix(_BOM)
            if b"\0" in line:
                raise InputError(
                    f"{name}, line {number}: a null byte; expected text in UTF-8"
                    + (" (is it UTF-16?)" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else "")
                )
            yield number, _text(line, f"{name}, line {number}").rstrip("\r\n")


def read_json(file: File) -> object:
    """Reads a JSON file in UTF-8, with or without a byte order mark.

    Its type is for the caller to check.

    Raises InputError, naming the file, if it is no regular file or not to be understood.
    """
    return parse_json(read_bytes(file, _LARGEST_JSON), os.fspath(file))


def parse_json(data: bytes | str, name: str) -> object:
    """Parses JSON that lies in something called `name`; InputError, naming that, if it cannot be.

    Refused are also numbers of thousands of digits, hundreds of brackets in each other and
    escapes of half a character: what Python would fail over later.
    """
    if isinstance(data, bytes):
        data = _text(data.removeprefix(_BOM), name)
    try:
        found = json.loads(data)
        if "\\ud" in data.lower():
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: half a surrogate pair; expected JSON in UTF-8") from error
    except RecursionError as error:
        raise InputError(f"{name}: its JSON is nested too deeply") from error
    except ValueError as error:  # also a number that is too long
        shown = data if len(data) <= 40 else f"{data[:40]}…"
        raise InputError(f"{name} is no valid JSON: {error} (it begins with {shown!r})") from error
    return found


def _readline(stream: BinaryIO, name: str) -> bytes:
    try:
        line = stream.readline(_LONGEST_LINE + 1)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}") from error
    if len(line) > _LONGEST_LINE:
        raise InputError(f"{name}: a line of more than {_LONGEST_LINE} bytes; expected text")
    return line


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        found = data[max(error.start - 20, 0) : error.end + 20]
        raise InputError(
            f"{where}: {found!r} is not UTF-8 (byte {error.start}: {error.reason}). Convert it, "
            "from Latin-1 for instance by iconv -f latin1 -t utf8"
        ) from error


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for test, name in kinds.items() if test(mode)), "no file")
