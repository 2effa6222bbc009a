"""Work directories on object storage: gs://…, s3://… and whatever else fsspec has a driver for.

A bucket has no folders, renames nothing and locks nothing, but replaces each object as a whole. So
a run writes to a temporary folder of this machine as ever. What is finished is copied to the
bucket, which is all that another machine needs to go on; the temporary folder is never read again.

A checkpoint counts from the moment at which its last object, COMPLETE, is there.
"""

import atexit
import contextlib
import logging
import os
import pathlib
import platform
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator

import fsspec
from etils import epath

from hybrid_flax.errors import InputError, TrainingError

COMPLETE = "hybrid_flax_complete"
_REFRESH = 20.0  # seconds between signs of life
_SILENT = 90.0  # seconds without one after which a run is not alive

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # stack traces of what it also raises


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether it is the URL of a folder on object storage, or looks like one with a slash lost."""
    return re.match(r"\w\w+:/", os.fspath(path)) is not None


class Bucket:
    """A folder on object storage.

    Names are relative to it, with slashes. All methods raise OSError for what went wrong there.

    Args:
      url: such as gs://bucket/runs/gcvit_b.

    Raises:
      InputError: the URL has no bucket, there is no driver for it, or it is not installed.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        if not re.match(r"\w+://[^/]", url):
            raise InputError(
                f"{url}: expected a folder in a bucket, such as gs://bucket/runs/gcvit_b, or a "
                "local one without a scheme"
            )
        try:
            # What another machine wrote must be seen at once.
            self._files, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:  # says what to install
            raise InputError(f"{url}: {error}") from error
        except ValueError as error:
            raise InputError(
                f"{url}: expected a local folder, or one that fsspec knows, such as gs://… or "
                f"s3://… ({error})"
            ) from error

    def names(self, folder: str = "") -> list[str]:
        """Of all objects in a folder and the folders in it, relative to it."""
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
        """What is not there is none the worse."""
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


def _files_in(folder: str | os.PathLike) -> list[str]:
    """Names of all files in a local folder and the folders in it, relative to it."""
    paths = pathlib.Path(folder).rglob("*")
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def _check_whole(folder: epath.Path, there: dict[str, int]) -> None:
    """A copy that was cut short is not always an error of the driver; it is OSError here."""
    for name, size in there.items():
        here = os.path.getsize(folder / name)
        if here != size:
            raise OSError(f"the copy of {name} is not whole: {here} bytes here, {size} there")


def scratch() -> str:
    """A temporary folder, deleted when the process ends (unless it is killed)."""
    folder = tempfile.mkdtemp(prefix="hybrid_flax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class BucketSteps:
    """The steps of a run's checkpoints on object storage; as `FolderSteps` for a local folder."""

    KEPT_HERE = False  # only the one that is being written or read
    ELSEWHERE = "set TMPDIR to a folder on another disk"

    def __init__(self, url: str):
        self._bucket = Bucket(url)
        self.folder = epath.Path(scratch())

    def __str__(self) -> str:
        return self._bucket.url

    def steps(self) -> list[int]:
        with self._outages():
            return sorted(self._finished(self._bucket.names()))

    def finish(self, step: int) -> None:
        """Copies a step that was written here."""
        folder = self.folder / str(step)
        names = _files_in(folder)
        self._bucket.upload(folder, names, str(step))
        there = self._bucket.sizes(str(step))
        _check_whole(folder, {name: there.get(name, 0) for name in names})
        self._bucket.write(f"{step}/{COMPLETE}", "")
        folder.rmtree()

    @contextlib.contextmanager
    def open(self, step: int) -> Iterator[epath.Path]:
        """A local folder with the step in it."""
        folder = self.folder / f"read-{step}"
        try:
            with self._outages():  # which say nothing about the checkpoint itself
                there = self._bucket.sizes(str(step))
                self._bucket.download(there, folder, str(step))
                _check_whole(folder, there)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def delete(self, step: int) -> None:
        """That it cannot be deleted is no reason to stop."""
        try:
            self._remove(step)
        except OSError as error:
            logging.warning("cannot delete %s/%d: %s. Training goes on", self, step, error)

    def _remove(self, step: int):
        self._bucket.delete([f"{step}/{COMPLETE}"])  # what is half deleted is no checkpoint
        self._bucket.delete(f"{step}/{name}" for name in self._bucket.names(str(step)))

    def set_aside(self, step: int) -> str:
        """Moves a step to `damaged/` beside the others; says where to."""
        run = Bucket(os.path.dirname(self._bucket.url))
        here = os.path.basename(self._bucket.url)
        with self._outages():
            for name in self._bucket.names(str(step)):
                run.copy(f"{here}/{step}/{name}", f"damaged/{step}/{name}")
            self._remove(step)
        return f"{run.url}/damaged/{step}"

    def delete_unfinished(self) -> None:
        with self._outages():
            names = self._bucket.names()
            finished = {str(step) for step in self._finished(names)}
            self._bucket.delete(name for name in names if name.split("/")[0] not in finished)

    @staticmethod
    def _finished(names: list[str]) -> list[int]:
        parts = [name.split("/") for name in names]
        return [int(part[0]) for part in parts if part[0].isdigit() and part[1:] == [COMPLETE]]

    @contextlib.contextmanager
    def _outages(self):
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"cannot read or change the checkpoints in {self}: {error}. Nothing is lost; the "
                "same command tries again"
            ) from error


class Mirror:
    """Keeps the small files of a run's folder on object storage, and others from using it.

        with Mirror("gs://bucket/run") as mirror:
            ...                # in mirror.folder, a temporary one
            mirror.push()

    What has changed is copied by `push`, every 20 seconds, and at the end. A sign of life goes with
    it: who starts while there is one waits until it changes, or for 90 seconds.

    Args:
      url: of the run; its checkpoints have their own ways.

    Raises:
      InputError: no driver; on entering: it cannot be written, or another run is alive in it.
    """

    def __init__(self, url: str):
        self._bucket = Bucket(url)
        self.folder = scratch()
        self.has_checkpoints = False  # before this start
        self._pushed: dict[str, tuple[int, int]] = {}
        self._me = f"process {os.getpid()} on {platform.node()}, {time.time_ns()}"
        self._left = threading.Event()
        self._pushing = threading.Lock()
        self._thread = threading.Thread(target=self._keep_pushing, name="mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        try:
            self._claim()
            names = self._bucket.names()
            self.has_checkpoints = any(name.startswith("checkpoints/") for name in names)
            # What a start reads; to other records, such as TensorBoard's, it only adds.
            records = [n for n in names if "/" not in n and n.endswith((".json", ".jsonl"))]
            self._bucket.download(records, self.folder)
        except OSError as error:
            raise InputError(
                f"cannot use the work directory {self._bucket.url}: {error}. Does the bucket "
                "exist, and may these credentials read, write and delete in it?"
            ) from error
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._left.set()
        self._thread.join()
        try:
            self.push()
            self._bucket.delete([".lock"])
        except OSError as error:
            logging.warning("cannot write to %s: %s", self._bucket.url, error)

    def push(self) -> None:
        """Copies what has changed.

        Raises:
          TrainingError: another run has taken the work directory over.
          OSError: it cannot be written.
        """
        with self._pushing:
            self._check_mine()
            changed = {}
            for name in _files_in(self.folder):
                if not name.startswith(".") and not name.endswith(".tmp"):
                    stat = os.stat(os.path.join(self.folder, name))
                    seen = stat.st_mtime_ns, stat.st_size
                    if self._pushed.get(name) != seen:
                        changed[name] = seen
            if changed:
                self._bucket.upload(self.folder, changed)
            self._pushed |= changed
            self._live()

    def _keep_pushing(self):
        while not self._left.wait(_REFRESH):
            try:
                self.push()
            except TrainingError:
                return  # the run meets it at its next `push`
            except OSError as error:
                logging.warning("cannot write to %s: %s. Trying again", self._bucket.url, error)

    def _live(self):
        self._bucket.write(".lock", f"{self._me}\n{time.time_ns()}")

    def _check_mine(self):
        found = self._bucket.read(".lock")
        if found is not None and not found.startswith(f"{self._me}\n"):
            raise TrainingError(
                f"another process ({found.split(',')[0]}) has taken {self._bucket.url} over while "
                f"this one was not heard of for {_SILENT:.0f} s; this one stops, that one goes on"
            )

    def _claim(self):
        found = self._bucket.read(".lock")
        if found is not None:
            whose = found.split(",")[0]
            logging.warning(
                "%s was left in use by %s; waiting up to %.0f s for a sign of life",
                self._bucket.url,
                whose,
                _SILENT,
            )
            end = time.monotonic() + _SILENT
            while time.monotonic() < end:
                time.sleep(min(_SILENT / 20, 5.0))
                now = self._bucket.read(".lock")
                if now is None:
                    break
                if now != found:
                    raise InputError(
                        f"another process ({now.split(',')[0]}) is training in "
                        f"{self._bucket.url}; wait for it, or choose another --workdir"
                    )
        self._live()
        time.sleep(min(_SILENT / 90, 1.0))  # who claims it at the same time
        if not (self._bucket.read(".lock") or "").startswith(f"{self._me}\n"):
            raise InputError(
                f"another process began to train in {self._bucket.url} at the same time; choose "
                "another --workdir for one of them"
            )
