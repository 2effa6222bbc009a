"""Reading at places in thousands of files, of which a process has only some open at a time."""

import collections
import contextlib
import errno
import os
import resource
import sys
import threading

from hybrid_flax.errors import InputError


class _Opened:
    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.users = 0  # threads that are reading from it


class Descriptors:
    """At most `limit` open files, by path; those not used for longest are closed first."""

    def __init__(self, limit: int):
        self._limit = limit
        self._opened: collections.OrderedDict[str, _Opened] = collections.OrderedDict()
        self._lock = threading.Lock()  # Grain may read in threads

    def read(self, path: str, offset: int, size: int, whole: int) -> bytes:
        """Reads `size` bytes from `offset` on, of a file that has to have `whole` bytes.

        Raises:
          OSError: it cannot be read, has another size, or ends before.
          InputError: the process may not open any file more.
        """
        opened = self._take(path, whole)
        try:
            parts = []
            while size:
                part = os.pread(opened.descriptor, size, offset)
                if not part:
                    raise OSError(f"the file ends {size} bytes before the image does")
                parts.append(part)
                size, offset = size - len(part), offset + len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            with self._lock:
                opened.users -= 1

    def close(self) -> None:
        """Closes what nobody is reading from."""
        with self._lock:
            self._close_down_to(0)

    def _take(self, path: str, whole: int) -> _Opened:
        with self._lock:
            opened = self._opened.get(path)
            if opened is None:
                self._close_down_to(self._limit - 1)
                opened = self._opened[path] = _Opened(self._open(path, whole))
            self._opened.move_to_end(path)
            opened.users += 1
            return opened

    def _open(self, path: str, whole: int) -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._close_down_to(0)
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as again:
                if again.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                raise InputError(  # that is no property of the image
                    f"cannot open {path}: {again.strerror}. Allow more files (ulimit -n), or read "
                    "with fewer processes: --config.dataset.num_workers="
                ) from again
        found = os.fstat(descriptor).st_size
        if found != whole:
            os.close(descriptor)
            raise OSError(f"the file has {found} bytes, and had {whole} when the run began")
        return descriptor

    def _close_down_to(self, count: int) -> None:
        idle = [path for path, opened in self._opened.items() if not opened.users]
        for path in idle[: max(0, len(self._opened) - count)]:
            with contextlib.suppress(OSError):
                os.close(self._opened.pop(path).descriptor)


def _share() -> int:
    """A quarter of the files that the process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(1024, (sys.maxsize if soft == resource.RLIM_INFINITY else soft) // 4))


FILES_AT_ONCE = _share()
DESCRIPTORS = Descriptors(FILES_AT_ONCE)  # of this process, for all sources
