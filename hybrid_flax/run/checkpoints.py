"""Checkpoints that are never believed unread: Orbax, plus a checksum for every array.

On disk: `DIRECTORY/STEP/state` (Orbax, the nested tree as it is) and `DIRECTORY/STEP/manifest`, see
`checkpoint_files.py`. On object storage the same; how it gets there: `storage/`. Of several steps
the newest intact one is restored; which are kept: `Checkpoints._delete_old`.

`python -m hybrid_flax.run.checkpoints WORKDIR` prints the step of the newest, for the launch files.
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from hybrid_flax.errors import InputError, TrainingError
from hybrid_flax.run import orbax_io
from hybrid_flax.run.checkpoint_files import (
    DamagedCheckpointError,
    Restored,
    parts_of,
    read_step,
)
from hybrid_flax.run.ending import ending
from hybrid_flax.run.storage.steps import open_steps
from hybrid_flax.sign_of_life import alive


class CheckpointSaveError(TrainingError):
    """A checkpoint could not be written; the message names it and the last one there is."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: a local folder, created by the first save, or one on object storage (`gs://…`).
      keep: how many of the newest steps to keep.
      keep_every_steps: multiples of it are never deleted; 0: none.
      keep_best: how many of the best to keep besides, by what `rate` was told; 0: none.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 3,
        keep_every_steps: int = 0,
        keep_best: int = 0,
    ):
        _check_name(os.fspath(directory))
        self._stored = open_steps(directory)
        self.directory = self._stored.folder  # where steps are written first
        self._keep = keep
        self._keep_every_steps = keep_every_steps
        self._keep_best = keep_best
        self._scores: dict[int, float] = {}
        self._background = ThreadPoolExecutor(1, "checkpoints")
        self._saving: tuple[int, Future[None]] | None = None

    def steps(self) -> list[int]:
        """Steps with a finished save, ascending; nothing is said about their being intact."""
        return self._stored.steps()

    def name(self, step: int) -> str:
        """Path or URL of a step."""
        return f"{self._stored}/{step}"

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> None:
        """Copies the tree to the host, then writes it in the background.

        Waits for the save before it, and raises what went wrong there.

        Args:
          step: name of the checkpoint; an existing one is not written again.
          tree: arrays in nested dictionaries (and the tuples of optimizer states).
          meta: JSON-serialisable facts to keep beside the arrays.
        """
        self.wait()
        if step in self.steps():
            self._delete_old()  # what was the best may not be any more
            return
        parts = parts_of(step, tree, meta)
        try:
            # Orbax notices an unwritable folder only after five minutes of waiting for itself.
            probe = self.directory / f"{step}.probe"
            probe.mkdir(parents=True, exist_ok=True)
            probe.rmdir()
            response = orbax_io.save_async(self.directory / str(step), parts)
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = step, self._background.submit(self._finish, step, response)

    def _finish(self, step: int, response: ocp.AsyncResponse[None]) -> None:
        response.result()
        self._stored.finish(step)
        if step not in self.steps():
            raise FileNotFoundError("it is not there after saving")
        self._delete_old()

    def wait(self) -> None:
        """Returns when the last save is on disk; raises CheckpointSaveError if it failed."""
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            response.result()
        except Exception as error:
            raise self._failed(step, error) from error

    def rate(self, step: int, score: float) -> bool:
        """Notes how good a step is; whether it is among the best, so that it should be saved.

        Of equal scores the earlier step is the better.
        """
        self._scores[step] = score
        return step in self._best(self._scores)

    def _best(self, steps: Iterable[int]) -> list[int]:
        rated = [step for step in steps if step in self._scores]
        return sorted(rated, key=lambda step: (-self._scores[step], step))[: self._keep_best]

    def _delete_old(self) -> None:
        """Deletes what is not to be kept; that it cannot be deleted is no reason to stop."""
        steps = self.steps()
        kept = {*steps[-self._keep :], *self._best(steps)}
        if self._keep_every_steps:
            kept |= {step for step in steps if step % self._keep_every_steps == 0}
        old = [step for step in steps if step not in kept]
        if old and len(kept) == 1:  # then it must be a good one
            try:
                self._read(steps[-1], None)
            except DamagedCheckpointError as error:
                logging.warning(
                    "checkpoint %s is damaged: %s. Older ones are kept", self.name(steps[-1]), error
                )
                return
        for step in old:
            self._stored.delete(step)

    def check_space(self, tree: Any) -> None:
        """Compares the size of a checkpoint with the free space of the disk it is written to.

        Warns if there is not enough for all that are kept at the same time.

        Args:
          tree: anything with `shape` and `dtype`, of what will be saved.

        Raises:
          InputError: not even one fits.
        """
        here = self.directory
        while not here.exists():
            here = here.parent
        free = shutil.disk_usage(here).free
        each = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
        if free < each:
            raise InputError(
                f"{self.directory}: a checkpoint of this run takes {_size(each)}, the disk has "
                f"{_size(free)} left. Free some, or {self._stored.elsewhere}"
            )
        if not self._stored.kept_here:
            return
        # One more than is kept, while the newest is being written.
        most = self._keep + self._keep_best + 1 - min(len(self.steps()), self._keep)
        if free < most * each:
            logging.warning(
                "%s: the disk has %s left, and up to %d more checkpoints of %s each will be there "
                "at the same time. Free some, or lower --config.checkpoint.keep",
                self.directory,
                _size(free),
                most,
                _size(each),
            )

    def restore(self, expected: Any = None) -> Restored | None:
        """The newest intact checkpoint.

        A damaged step is named in a warning and the one before it is tried.

        Args:
          expected: tree of anything with `shape` and `dtype`; None takes whatever is there.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          CheckpointMismatchError: the checkpoint is intact but has other paths, shapes or dtypes.
          InputError: there are checkpoints, but every one is damaged.
        """
        damaged: dict[int, str] = {}
        while steps := [step for step in self.steps() if step not in damaged]:
            step = steps[-1]
            try:
                restored = self._read(step, expected)
            except (DamagedCheckpointError, TrainingError) as error:
                if step not in self.steps():
                    continue  # a run that goes on has deleted it meanwhile
                if isinstance(error, TrainingError):
                    raise
                damaged[step] = str(error)
                logging.warning(
                    "checkpoint %s is damaged and will not be used: %s", self.name(step), error
                )
                continue
            if damaged:
                logging.warning("going back to the intact checkpoint of step %d", step)
            return restored
        if damaged:
            reasons = "\n".join(f"  step {step}: {reason}" for step, reason in damaged.items())
            raise InputError(
                f"every checkpoint in {self._stored} is damaged; nothing was loaded. Restore the "
                f"folder from a copy, or start again in another work directory\n{reasons}"
            )
        return None

    def restore_step(self, step: int) -> Restored:
        """The checkpoint of a step.

        Raises:
          InputError: there is none, or it is damaged.
        """
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"{self._stored} has no checkpoint of step {step}; there are: {there}")
        try:
            return self._read(step, None)
        except DamagedCheckpointError as error:
            raise InputError(f"checkpoint {self.name(step)} is damaged: {error}") from error

    def clear_after(self, step: int) -> None:
        """Makes room for the steps after `step`, which a resumed run will write again.

        Steps that are there were found damaged: they move to `damaged/` beside the checkpoints.
        What an interrupted save left behind is deleted.
        """
        for damaged in self.steps():
            if damaged > step:
                target = self._stored.set_aside(damaged)
                logging.warning("moved the damaged checkpoint of step %s to %s", damaged, target)
        self._stored.delete_unfinished()

    def _read(self, step: int, expected: Any) -> Restored:
        alive()
        with self._stored.open(step) as folder:
            return read_step(folder, step, expected, self.name(step))

    def _failed(self, step: int, reason: object) -> CheckpointSaveError:
        try:
            last = max((other for other in self.steps() if other != step), default="none")
        except (InputError, TrainingError):  # what failed may be where they are
            last = "unknown"
        return CheckpointSaveError(
            f"the checkpoint of step {step} could not be written to {self._stored}: {reason}. "
            f"The last one there is of step {last}"
        )


def _check_name(path: str) -> None:
    """Raises InputError for a path that tensorstore cannot be given."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path!r}: this path is not UTF-8, or the locale is none with UTF-8: checkpoints "
            "cannot lie there. Rename the folder, or start with LC_ALL=C.UTF-8"
        ) from error


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB ({count:,} bytes)"


def main() -> int:
    """Prints the step of a run's newest checkpoint, if there is one; 2 if that is not known."""
    return ending(_main, limited=False) or 0


def _main() -> None:
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("workdir")
    workdir = parser.parse_args().workdir
    folder = os.path.join(workdir, "checkpoints")
    for path in (workdir, folder):
        if os.path.exists(path) and not os.path.isdir(path):
            raise InputError(f"{path} is no folder; expected a run's work directory")
    try:
        steps = Checkpoints(folder).steps()
    except TrainingError as error:
        raise InputError(str(error)) from error
    print(*steps[-1:], end="\n" if steps else "")


if __name__ == "__main__":
    sys.exit(main())
