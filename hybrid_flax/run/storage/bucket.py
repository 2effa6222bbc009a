"""A folder on object storage: gs://…, s3://… or abfs://…, by fsspec's drivers."""

import atexit
import contextlib
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable

import fsspec

from hybrid_flax.errors import InputError

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # stack traces of what it also raises


SCHEMES = ("gs", "gcs", "s3", "abfs", "abfss", "az")


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether it is the URL of a folder on object storage, or looks like a URL of any kind."""
    return re.match(r"[A-Za-z][\w+.-]+:[/:]", os.fspath(path)) is not None


class Bucket:
    """A folder on object storage.

    Names are relative to it, with slashes. All methods raise OSError for what went wrong there.

    Args:
      url: such as gs://bucket/runs/gcvit_b.

    Raises:
      InputError: it is no URL of a bucket, or its driver is not installed.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        # fsspec would also write over HTTP or SSH, into archives, caches and this process's memory.
        if not re.match(rf"({'|'.join(SCHEMES)})://[^/:]", url):
            raise InputError(
                f"{url}: expected a folder in a bucket, such as gs://bucket/runs/gcvit_b, s3://… "
                "or abfs://…, or a local one without a scheme"
            )
        try:
            # What another machine wrote must be seen at once.
            self._files, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:  # says what to install
            raise InputError(f"{url}: {error}") from error

    def names(self, folder: str = "") -> list[str]:
        """Lists all objects in a folder and the folders in it, relative to it."""
        return sorted(self.sizes(folder))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of all objects in a folder and the folders in it, by name relative to it."""
        top = self._path(folder)
        with _as_os_error():
            found = self._files.find(top, detail=True)
        return {os.path.relpath(path, top): about["size"] for path, about in found.items()}

    def read(self, name: str) -> str | None:
        """The text of an object; None if there is none."""
        with _as_os_error():
            try:
                return self._files.cat_file(self._path(name)).decode()
            except FileNotFoundError:
                return None

    def write(self, name: str, text: str) -> None:
        with _as_os_error():
            self._files.pipe_file(self._path(name), text.encode())

    def upload(self, folder: str | os.PathLike, names: Iterable[str], to: str = "") -> None:
        """Files of a local folder, in any order."""
        names = list(names)
        with _as_os_error():
            self._files.put(
                [os.path.join(folder, name) for name in names],
                [self._path(to, name) for name in names],
            )

    def download(self, names: Iterable[str], folder: str | os.PathLike, top: str = "") -> None:
        """Objects of a folder here into a local one."""
        names = list(names)
        for name in names:
            if ".." in name.split("/"):
                raise OSError(f"{self.url} has an object whose name leads out of it: {name}")
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        with _as_os_error():
            self._files.get(
                [self._path(top, name) for name in names],
                [os.path.join(folder, name) for name in names],
            )

    def copy(self, name: str, to: str) -> None:
        with _as_os_error():
            self._files.copy(self._path(name), self._path(to))

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; one that is not there is none the worse."""
        with _as_os_error(), contextlib.suppress(FileNotFoundError):
            if paths := [self._path(name) for name in names]:
                self._files.rm(paths)

    def _path(self, *names: str) -> str:
        return "/".join((self._root, *filter(None, names)))


@contextlib.contextmanager
def _as_os_error():
    """Drivers raise errors of their own, which nobody here could name."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {str(error)[:300]}") from error


def files_in(folder: str | os.PathLike) -> list[str]:
    """Names of all files in a local folder and the folders in it, relative to it."""
    paths = pathlib.Path(folder).rglob("*")
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def scratch() -> str:
    """A temporary folder, deleted when the process ends (unless it is killed)."""
    folder = tempfile.mkdtemp(prefix="hybrid_flax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
