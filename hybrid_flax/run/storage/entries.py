"""Compiled programs as files, in a local folder or on object storage: whole, or not there.

All methods raise OSError for what went wrong.
"""

import contextlib
import os
import pathlib
import re
import stat
import tempfile
import time

from hybrid_flax.run.storage.bucket import Bucket, scratch

_LARGEST = 2**30  # bytes that a folder may hold; what was not used for longest goes first
_STALE = 3600.0  # seconds after which a file that is being written was left by a kill
_PART = "compiled-"  # begins the name of a file that is being written
_OURS = re.compile(rf"[0-9a-f]{{64}}|{_PART}\w+\.tmp")  # all else is somebody's


class FolderEntries:
    """Files of a folder that only its owner may write to.

    Args:
      make: makes the folder, and room in it.
    """

    def __init__(self, folder: str, *, make: bool):
        self._folder = folder
        if make:
            make_private(folder)
            self._make_room()
        elif os.path.lexists(folder):
            _check_private(folder)

    def read(self, name: str) -> bytes | None:
        """The content; None if there is no such file."""
        file = pathlib.Path(self._folder, name)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):
            os.utime(file)  # it is used
        return content

    def write(self, name: str, content: bytes) -> None:
        write_whole(os.path.join(self._folder, name), content)

    def remove(self, name: str) -> None:
        """Removes a file, if that is allowed."""
        with contextlib.suppress(OSError):
            os.remove(os.path.join(self._folder, name))

    def _make_room(self) -> None:
        found = []
        for entry in os.scandir(self._folder):
            about = entry.stat(follow_symlinks=False)
            if not _OURS.fullmatch(entry.name) or not stat.S_ISREG(about.st_mode):
                continue
            if entry.name.startswith(_PART) and time.time() - about.st_mtime > _STALE:
                self.remove(entry.name)
            else:
                found.append((about.st_mtime, about.st_size, entry.name))
        total = sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if total <= _LARGEST:
                break
            self.remove(name)
            total -= size


class BucketEntries:
    """Objects of a folder on object storage. It grows: nothing but what is damaged is removed."""

    def __init__(self, url: str, *, make: bool):
        self._bucket = Bucket(url)
        self._here = scratch()
        self._there = set(self._bucket.names())

    def read(self, name: str) -> bytes | None:
        """The content; None if there is no such object."""
        if name not in self._there:
            return None
        self._bucket.download([name], self._here)
        with open(os.path.join(self._here, name), "rb") as stream:
            return stream.read()

    def write(self, name: str, content: bytes) -> None:
        write_whole(os.path.join(self._here, name), content)
        self._bucket.upload(self._here, [name])
        self._there.add(name)

    def remove(self, name: str) -> None:
        """Removes an object, if that is allowed."""
        self._there.discard(name)
        with contextlib.suppress(OSError):
            self._bucket.delete([name])


def write_whole(file: str, content: bytes) -> None:
    """Writes a file that is whole or not there, however many do so at once."""
    descriptor, part = tempfile.mkstemp(".tmp", _PART, os.path.dirname(file))
    try:
        with open(descriptor, "wb") as stream:
            stream.write(content)
        os.replace(part, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


def make_private(folder: str) -> None:
    """Makes a folder for its owner alone, and checks one that is there."""
    os.makedirs(folder, mode=0o700, exist_ok=True)
    _check_private(folder)


def _check_private(folder: str) -> None:
    about = os.lstat(folder)
    if not stat.S_ISDIR(about.st_mode):
        raise OSError("it is no folder")
    if about.st_uid != os.geteuid():
        raise OSError("it belongs to another user")
    if about.st_mode & 0o022:
        raise OSError("others may write to it; take that away with chmod go-w")
