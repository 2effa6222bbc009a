"""The steps of a run's checkpoints on object storage."""

import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Iterator

from etils import epath

from hybrid_flax.errors import TrainingError
from hybrid_flax.run.storage.bucket import Bucket, files_in, scratch
from hybrid_flax.run.storage.parts import PARTS, step_of

COMPLETE = "hybrid_flax_complete"


def _check_whole(folder: epath.Path, there: dict[str, int]) -> None:
    """Raises OSError for a copy that was cut short, which is not always an error of the driver."""
    for name, size in there.items():
        here = os.path.getsize(folder / name)
        if here != size:
            raise OSError(f"the copy of {name} is not whole: {here} bytes here, {size} there")


class BucketSteps:
    """See `Steps`. A step counts when its last object, an empty one, has been written."""

    kept_here = False
    elsewhere = "set TMPDIR to a folder on another disk"

    def __init__(self, url: str):
        self._bucket = Bucket(url)
        self.folder = epath.Path(scratch())

    def __str__(self) -> str:
        return self._bucket.url

    def steps(self) -> list[int]:
        with self._outages():
            return sorted(self._finished(self._bucket.names()))

    def finish(self, step: int) -> None:
        folder = self.folder / str(step)
        names = files_in(folder)
        self._bucket.upload(folder, names, str(step))
        there = self._bucket.sizes(str(step))
        _check_whole(folder, {name: there.get(name, 0) for name in names})
        self._bucket.write(f"{step}/{COMPLETE}", "")
        folder.rmtree()

    @contextlib.contextmanager
    def open(self, step: int) -> Iterator[epath.Path]:
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
        try:
            self._remove(step)
        except OSError as error:
            logging.warning("cannot delete %s/%d: %s. Training goes on", self, step, error)

    def _remove(self, step: int) -> None:
        self._bucket.delete([f"{step}/{COMPLETE}"])  # what is half deleted is no checkpoint
        self._bucket.delete(f"{step}/{name}" for name in self._bucket.names(str(step)))

    def set_aside(self, step: int) -> str:
        run = Bucket(os.path.dirname(self._bucket.url))
        here = os.path.basename(self._bucket.url)
        with self._outages():
            taken = {name.split("/")[0] for name in run.names("damaged")}
            targets = itertools.chain([str(step)], (f"{step}-{i}" for i in itertools.count(2)))
            target = next(f"damaged/{name}" for name in targets if name not in taken)
            for name in self._bucket.names(str(step)):
                run.copy(f"{here}/{step}/{name}", f"{target}/{name}")
            self._remove(step)
        return f"{run.url}/{target}"

    def delete_unfinished(self) -> None:
        """Of numbered folders with parts of a checkpoint; all else is somebody's."""
        with self._outages():
            names = self._bucket.names()
            parts = [name.split("/") for name in names]
            ours = {part[0] for part in parts if part[1:2] and part[1] in (*PARTS, COMPLETE)}
            unfinished = ours - {str(step) for step in self._finished(names)}
            self._bucket.delete(
                name
                for name, part in zip(names, parts, strict=True)
                if part[0] in unfinished and step_of(part[0]) is not None
            )

    @staticmethod
    def _finished(names: list[str]) -> list[int]:
        parts = [name.split("/") for name in names]
        steps = [step_of(part[0]) for part in parts if part[1:] == [COMPLETE]]
        return [step for step in steps if step is not None]

    @contextlib.contextmanager
    def _outages(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"cannot read or change the checkpoints in {self}: {error}. Nothing is lost; the "
                "same command tries again"
            ) from error
