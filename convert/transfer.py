"""One file over HTTP: continued where the server shows that it is still the same file."""

import contextlib
import dataclasses
import fcntl
import http.client
import json
import os
import pathlib
import re
import shutil
import ssl
import urllib.error
import urllib.request
from typing import BinaryIO

from tqdm import tqdm

from hybrid_flax.errors import InputError

_TIMEOUT = 60  # seconds without a byte
_CHUNK = 1 << 20
_LARGEST = 32 << 30  # bytes; no release is near it
NETWORK_ERRORS = (  # most are kinds of OSError, which is also what the disk raises
    urllib.error.URLError,
    TimeoutError,
    ConnectionError,
    ssl.SSLError,
    http.client.HTTPException,
)


@dataclasses.dataclass
class Record:
    """What is kept beside a download: which file of the server it is."""

    url: str
    validator: str = ""  # its ETag or Last-Modified, as it was sent
    size: int | None = None  # of the whole file, in bytes
    sha256: str = ""  # once it is whole

    @classmethod
    def read(cls, file: pathlib.Path) -> "Record | None":
        """That of a file; None if there is none, or not one of ours."""
        try:
            found = cls(**json.loads(record_of(file).read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        kinds = {"url": str, "validator": str, "size": int | None, "sha256": str}
        fits = all(isinstance(getattr(found, name), kind) for name, kind in kinds.items())
        return found if fits else None

    def write(self, file: pathlib.Path) -> None:
        record_of(file).write_text(json.dumps(dataclasses.asdict(self)))


def record_of(file: pathlib.Path) -> pathlib.Path:
    """Where the record of a file lies."""
    return file.with_name(file.name + ".download.json")


def fetch(url: str, partial: pathlib.Path) -> Record:
    """Downloads to `partial`, and continues it if the server has the same file still.

    Raises:
      InputError: the server sends a web page or something too large, or another process downloads
        the same file.
      NETWORK_ERRORS, OSError: as `download` explains them.
    """
    with open(partial, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is downloading {partial} just now; run this again once it is done"
            ) from error
        except OSError:  # a file system without locks
            pass
        have, record = partial.stat().st_size, Record.read(partial)
        if not (record and record.url == url and record.validator and have):
            record = None
        elif have == record.size:
            return record
        if not (record and _receive(url, file, record)):
            file.truncate(0)
            record = Record(url)
            _receive(url, file, record)
    return record


def _receive(url: str, file: BinaryIO, record: Record) -> bool:
    """Writes the rest of a download; False if the server does not continue the same file.

    Then nothing was written. A new file is written whole, and its record filled in.
    """
    partial = pathlib.Path(file.name)
    have = partial.stat().st_size
    with contextlib.closing(_open(url, have, record.validator)) as response:
        if response.status == 206 and have:
            if not _continues(response, have, record):
                return False
        elif response.status == 200:  # a new file, another one, or a server without ranges
            _check_kind(url, response)
            file.truncate(0)
            have, record.validator, record.size = 0, _validator(response), _length(response)
            record.write(partial)
        elif have:
            return False
        else:
            raise ConnectionError(f"the server answers with status {response.status}")
        _copy(response, file, have, record.size)
    return True


def _open(url: str, have: int, validator: str) -> http.client.HTTPResponse:
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    try:
        return urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=_TIMEOUT
        )
    except urllib.error.HTTPError as error:
        if have and error.code in (412, 416):  # not that part of it, or no longer
            return error  # type: ignore[return-value]  # it is a response, too
        error.close()
        raise
    except NETWORK_ERRORS:
        raise
    except ValueError as error:  # a redirect to something that is no address
        raise ConnectionError(f"the server leads nowhere: {error}") from error


def _continues(response: http.client.HTTPResponse, have: int, record: Record) -> bool:
    """Whether a partial answer is the rest of the file that was begun."""
    part = re.fullmatch(
        r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", "")
    )
    if not part or _validator(response) not in ("", record.validator):
        return False
    first, last, size = map(int, part.groups())
    if first != have or last != size - 1 or record.size not in (None, size):
        return False
    record.size = size
    return True


def _validator(response: http.client.HTTPResponse) -> str:
    """What If-Range may ask for: a strong ETag, else the date of the last change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")


def _length(response: http.client.HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if re.fullmatch(r"\d{1,18}", length) else None


def _check_kind(url: str, response: http.client.HTTPResponse) -> None:
    kind = response.headers.get_content_type()
    if kind in ("text/html", "application/xhtml+xml"):
        raise InputError(f"{url}: the server sends a web page ({kind}) in place of the file")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise InputError(f"{url}: the server sends the file packed ({encoding[:40]}), unasked")


def _copy(response: http.client.HTTPResponse, file: BinaryIO, have: int, total: int | None) -> None:
    partial = pathlib.Path(file.name)
    needed = 0 if total is None else total - have
    free = shutil.disk_usage(partial.parent).free
    if needed > free:
        raise InputError(
            f"{partial.parent} has {free:,} bytes free, the file needs {needed:,}; set "
            "HYBRID_FLAX_CACHE to a folder on a larger disk"
        )
    size = have
    with tqdm(
        desc=partial.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None
    ) as bar:
        while chunk := response.read(_CHUNK):
            size += len(chunk)
            if size > (_LARGEST if total is None else total):
                raise ConnectionError(f"it sends more than {size:,} bytes")
            file.write(chunk)
            bar.update(len(chunk))
    file.flush()
    os.fsync(file.fileno())
    if total is not None and size != total:
        raise ConnectionError(f"it broke off after {size:,} of {total:,} bytes")
