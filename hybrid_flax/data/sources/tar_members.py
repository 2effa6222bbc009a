"""The members of a tar file one after the other; damage is told with its place, not the end.

Python's `tarfile` takes a damaged header for the end of the archive.
"""

import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

_BLOCK = 512
_PADDING = 20 * _BLOCK + _BLOCK  # most zeros that tar writes at the end, by default
_LONGEST = 1 << 20  # bytes of an extended header
_CHUNK = 1 << 20
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


class Member(NamedTuple):
    """One entry of a tar file."""

    name: str
    kind: (
        str  # "file", "hard link", "symbolic link", "sparse", "folder", or "other": devices, pipes
    )
    offset: int  # of its bytes in the tar file
    size: int
    target: str  # of a link
    header: int  # where its header lies


Damaged = Callable[[int, str], None]  # is told the byte, and what is wrong there


class _DamageError(Exception):
    pass


def compression(head: bytes) -> str | None:
    """Names the compression that a file's first bytes say."""
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)


def members(
    stream: BinaryIO, begin: int, end: int, damaged: Damaged, *, counted: bool = False
) -> Iterator[Member]:
    """Finds the members of the tar file that lies from byte `begin` to `end` of a stream.

    At damage it calls `damaged`, which may raise. If it returns, reading goes on at the next
    header that is whole.

    Args:
      counted: the caller knows how many members there should be: what looks like an archive's end
        is believed.
    """
    place, extended = begin, dict[str, str]()
    while True:
        try:
            block = _read(stream, place, min(_BLOCK, max(0, end - place)))
            if not block and counted:
                return
            if not block.strip(b"\0") and block:
                _check_end(stream, place, end, counted)
                return
            header = _header(block)
            if header.type in (b"x", b"X", b"L", b"K"):  # what the next header has no room for
                extended |= _extension(stream, header, place, end)
                place += _BLOCK + _padded(header.size)
                continue
            if header.type == b"g":  # for all members: comments
                place += _BLOCK + _padded(_checked(header.size))
                continue
            member, following = _member(stream, header, place, extended)
            if member.offset + member.size > end:
                raise _DamageError(
                    f"{member.name} is to have {member.size} bytes, and the file ends after "
                    f"{max(0, end - member.offset)} of them"
                )
        except _DamageError as error:
            damaged(place, str(error))
            found = _next_header(stream, place + _BLOCK, end)
            if found is None:
                return
            place, extended = found, {}
            continue
        yield member
        place, extended = following, {}


def _read(stream: BinaryIO, place: int, size: int) -> bytes:
    stream.seek(place)
    return stream.read(size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _checked(size: int) -> int:
    if size < 0:
        raise _DamageError(f"a member is to have {size} bytes")
    return size


def _header(block: bytes) -> tarfile.TarInfo:
    if not block:
        raise _DamageError("it ends without the zeros that end a tar file")
    if len(block) < _BLOCK:
        raise _DamageError("it ends within the header of a member")
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _DamageError(f"the header of a member is damaged ({error})") from error
    _checked(header.size)
    return header


def _extension(stream: BinaryIO, header: tarfile.TarInfo, place: int, end: int) -> dict[str, str]:
    if header.size > _LONGEST:
        raise _DamageError(f"an extended header is to have {header.size} bytes")
    data = _read(stream, place + _BLOCK, min(header.size, max(0, end - place - _BLOCK)))
    if len(data) < header.size:
        raise _DamageError("it ends within an extended header")
    if header.type in (b"L", b"K"):  # GNU's
        return {"path" if header.type == b"L" else "linkpath": _text(data.partition(b"\0")[0])}
    return _pax(data)


def _pax(data: bytes) -> dict[str, str]:
    """Reads records "LENGTH KEY=VALUE\\n"."""
    records, place = {}, 0
    while place < len(data) and data[place]:
        number = data[place : place + 8].partition(b" ")[0]
        length = int(number) if number.isdigit() else 0
        record = data[place : place + length]
        key, equals, value = record[len(number) + 1 : -1].partition(b"=")
        if not equals or len(record) < length or record[-1:] != b"\n":
            raise _DamageError("an extended header is damaged")
        records[_text(key)] = _text(value)
        place += length
    return records


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


_KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.GNUTYPE_SPARSE: "sparse",
    tarfile.DIRTYPE: "folder",
}
_WITHOUT_DATA = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)  # fmt: skip


def _member(
    stream: BinaryIO, header: tarfile.TarInfo, place: int, extended: dict[str, str]
) -> tuple[Member, int]:
    """(the member, where the next one begins)"""
    kind, size, offset = _KINDS.get(header.type, "other"), header.size, place + _BLOCK
    name = extended.get("path", header.name)
    if header.type == tarfile.GNUTYPE_SPARSE:
        offset = _after_the_map(stream, place)
    elif kind == "file" and any(key.startswith("GNU.sparse.") for key in extended):
        kind, name = "sparse", extended.get("GNU.sparse.name", name)
    if header.type in _WITHOUT_DATA:
        size = 0
    elif "size" in extended:
        text = extended["size"]
        if not text.isdecimal() or len(text) > 19:
            raise _DamageError(f"{_printable(name)} is to have {text[:40]!r} bytes")
        size = int(text)
    target = extended.get("linkpath", header.linkname)
    member = Member(_printable(name), kind, offset, size, _printable(target), place)
    return member, offset + _padded(size)


def _after_the_map(stream: BinaryIO, place: int) -> int:
    """Where the bytes of a sparse member begin: its map may go on in blocks after the header."""
    more = _read(stream, place + 482, 1)
    place += _BLOCK
    while more not in (b"", b"\0"):
        more = _read(stream, place + 504, 1)
        place += _BLOCK
    return place


def _check_end(stream: BinaryIO, place: int, end: int, counted: bool) -> None:
    """Raises if a block of zeros is not what ends the tar file."""
    if counted:
        return
    zeros = place
    while zeros < end:
        chunk = _read(stream, zeros, min(_CHUNK, end - zeros))
        if not chunk:
            break
        rest = chunk.lstrip(b"\0")
        zeros += len(chunk) - len(rest)
        if rest:
            raise _DamageError(
                f"there are {zeros - place} zeros, and then, from byte {zeros} on, something else: "
                "it is damaged, or several tar files are joined in it"
            )
    if zeros - place > _PADDING:
        raise _DamageError(
            f"from there to the end are {zeros - place} zeros, more than the {_PADDING} that may "
            "end a tar file: a download that was not finished, or tar's option -b"
        )


def _next_header(stream: BinaryIO, place: int, end: int) -> int | None:
    """Finds the next block from `place` on that is the header of a member."""
    while place < end:
        chunk = _read(stream, place, min(_CHUNK, end - place))
        found = chunk.find(b"ustar")
        while found >= 0:
            block = found - 257
            if block >= 0 and block % _BLOCK == 0 and _is_header(chunk[block : block + _BLOCK]):
                return place + block
            found = chunk.find(b"ustar", found + 1)
        place += _CHUNK
    return None


def _is_header(block: bytes) -> bool:
    try:
        return bool(_header(block))
    except _DamageError:
        return False
