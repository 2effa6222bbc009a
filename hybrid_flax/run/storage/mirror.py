"""A run's small files on object storage, and the lock that keeps others from using it."""

import logging
import os
import platform
import threading
import time

from hybrid_flax.errors import InputError, TrainingError
from hybrid_flax.run.storage.bucket import Bucket, files_in, scratch

_REFRESH = 20.0  # seconds between signs of life
_SILENT = 90.0  # seconds without one after which a run is not alive


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
            for name in files_in(self.folder):
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
