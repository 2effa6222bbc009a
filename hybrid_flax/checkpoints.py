"""Checkpoints that are never believed unread: Orbax, plus a checksum for every array.

Orbax writes and restores; it loads a flipped bit without a word, casts dtypes silently and never
falls back. So beside its files we keep a manifest with shape, dtype and CRC-32 of every array, and
on restoring compare the tree first, then every array, and take the step before a damaged one.

On disk: `DIRECTORY/STEP/state` (Orbax, the nested tree as it is) and `DIRECTORY/STEP/manifest`. On
object storage the same; how it gets there: `buckets.py`.

`python -m hybrid_flax.checkpoints WORKDIR` prints the step of the newest, for the launch files.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.experimental.v1._src.saving import execution

from hybrid_flax.bridge import flatten, unflatten
from hybrid_flax.buckets import BucketSteps, is_bucket
from hybrid_flax.errors import InputError, TrainingError

FORMAT = 1

Arrays = dict[str, np.ndarray]  # by path: "params/stem/conv/kernel"


class DamagedCheckpointError(Exception):
    """One step cannot be read back as it was written; the message names what differs."""


class CheckpointSaveError(TrainingError):
    """A checkpoint could not be written; the message names it and the last one there is."""


class CheckpointMismatchError(InputError):
    """An intact checkpoint of something else; the message lists every path that differs."""


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
        self._stored = (
            BucketSteps(os.fspath(directory)) if is_bucket(directory) else FolderSteps(directory)
        )
        self.directory = self._stored.folder  # where steps are written first
        self._keep = keep
        self._keep_every_steps = keep_every_steps
        self._keep_best = keep_best
        self._scores: dict[int, float] = {}
        self._background = ThreadPoolExecutor(1, "checkpoints")
        self._saving: tuple[int, Future] | None = None

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
        # A copy, because the next step reuses (donates) these buffers.
        arrays = {path: np.array(leaf) for path, leaf in flatten(tree).items()}
        manifest = {"format": FORMAT, "step": step, "meta": meta}
        manifest["arrays"] = {path: _describe(array) for path, array in arrays.items()}
        manifest["digest"] = _digest(manifest)
        try:
            # Orbax notices an unwritable folder only after five minutes of waiting for itself.
            probe = self.directory / f"{step}.probe"
            probe.mkdir(parents=True, exist_ok=True)
            probe.rmdir()
            with _context():
                response = ocp.save_checkpointables_async(
                    self.directory / str(step),
                    {"state": unflatten(arrays), "manifest": manifest},
                )
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = step, self._background.submit(self._finish, step, response)

    def _finish(self, step: int, response: ocp.AsyncResponse) -> None:
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
                f"{_size(free)} left. Free some, or {self._stored.ELSEWHERE}"
            )
        if not self._stored.KEPT_HERE:
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

    def restore(self, expected: Any = None) -> tuple[int, Arrays, dict[str, Any]] | None:
        """The newest intact checkpoint, as (step, {path: NumPy array}, meta).

        A damaged step is named in a warning and the one before it is tried.

        Args:
          expected: tree of anything with `shape` and `dtype`; None takes whatever is there.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          CheckpointMismatchError: the checkpoint is intact but has other paths, shapes or dtypes.
          InputError: there are checkpoints, but every one is damaged.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                arrays, meta = self._read(step, expected)
            except DamagedCheckpointError as error:
                damaged[step] = str(error)
                logging.warning(
                    "checkpoint %s is damaged and will not be used: %s", self.name(step), error
                )
                continue
            if damaged:
                logging.warning("going back to the intact checkpoint of step %d", step)
            return step, arrays, meta
        if damaged:
            reasons = "\n".join(f"  step {step}: {reason}" for step, reason in damaged.items())
            raise InputError(
                f"every checkpoint in {self._stored} is damaged; nothing was loaded. Restore the "
                f"folder from a copy, or start again in another work directory\n{reasons}"
            )
        return None

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

    def _read(self, step: int, expected: Any) -> tuple[Arrays, dict[str, Any]]:
        with self._stored.open(step) as folder:
            return self._read_from(folder, step, expected)

    def _read_from(
        self, folder: epath.Path, step: int, expected: Any
    ) -> tuple[Arrays, dict[str, Any]]:
        manifest = _load(folder, "manifest")
        if not isinstance(manifest, dict) or manifest.get("digest") != _digest(manifest):
            raise DamagedCheckpointError("its manifest does not match its own checksum")
        if manifest["format"] > FORMAT:
            raise InputError(
                f"{self.name(step)} has checkpoint format {manifest['format']}; this "
                f"version of hybrid_flax reads up to {FORMAT}. Update hybrid_flax"
            )
        arrays = manifest["arrays"]
        if expected is not None:
            shapes = {
                path: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"])
                for path, entry in arrays.items()
            }
            check_same(shapes, expected, f"checkpoint {self.name(step)}")
        found = {path: np.asarray(leaf) for path, leaf in flatten(_load(folder, "state")).items()}
        problems = [f"array {path} is missing" for path in arrays if path not in found]
        problems += [f"array {path} should not be there" for path in found if path not in arrays]
        problems += [
            f"array {path} differs from what was saved"
            for path, array in found.items()
            if path in arrays and _describe(array) != arrays[path]
        ]
        if problems or manifest["step"] != step:
            raise DamagedCheckpointError("; ".join(problems) or f"it is of step {manifest['step']}")
        return found, manifest["meta"]

    def _failed(self, step: int, reason: object) -> CheckpointSaveError:
        try:
            last = max((other for other in self.steps() if other != step), default="none")
        except TrainingError:  # what failed may be where they are
            last = "unknown"
        return CheckpointSaveError(
            f"the checkpoint of step {step} could not be written to {self._stored}: {reason}. "
            f"The last one there is of step {last}"
        )


class FolderSteps:
    """The steps of a run's checkpoints in a local folder, where Orbax renames what is finished."""

    KEPT_HERE = True
    ELSEWHERE = "choose another --workdir"

    def __init__(self, folder: str | os.PathLike):
        self.folder = epath.Path(os.path.abspath(folder))  # Orbax reads from no other

    def __str__(self) -> str:
        return str(self.folder)

    def steps(self) -> list[int]:
        if not self.folder.exists():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def finish(self, step: int) -> None:
        """Of a step that Orbax has written into the folder."""

    @contextlib.contextmanager
    def open(self, step: int) -> Iterator[epath.Path]:
        """A local folder with the step in it."""
        yield self.folder / str(step)

    def delete(self, step: int) -> None:
        """That it cannot be deleted is no reason to stop."""
        path = self.folder / str(step)
        with _warned(path):
            # What is half deleted must not pass for a checkpoint.
            path = path.rename(path.with_name(f"{step}.deleted"))
            with _warned(path):
                path.rmtree()

    def set_aside(self, step: int) -> str:
        """Moves a step to `damaged/` beside the others; says where to."""
        target = self.folder.parent / "damaged" / str(step)
        if target.exists():
            target.rmtree()
        target.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / str(step)).rename(target)
        return str(target)

    def delete_unfinished(self) -> None:
        if self.folder.exists():
            for path in self.folder.iterdir():
                if not path.name.isdigit():
                    with _warned(path):
                        path.rmtree()


@contextlib.contextmanager
def _warned(path: epath.Path):
    try:
        yield
    except OSError as error:
        logging.warning("cannot delete %s: %s. Training goes on; delete it by hand", path, error)


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB ({count:,} bytes)"


def _load(folder: epath.Path, name: str):
    with _quiet_background():
        try:
            with _context():
                return ocp.load_checkpointables(folder, {name: None})[name]
        except Exception as error:  # whatever Orbax and TensorStore raise on unreadable files
            while error.__cause__ is not None:
                error = error.__cause__
            reason = f"{type(error).__name__}: {str(error)[:300]}"
        time.sleep(0.5)  # for the reads that are still under way
        gc.collect()
    raise DamagedCheckpointError(f"its {name} cannot be read ({reason})")


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="manifest")
    context = ocp.Context()
    # Of several processes only the one that has the folder comes here: Orbax would wait for all.
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    # Orbax 0.12.8 does so even then, to compare the folder's name.
    execution._check_directory_consistency = lambda directory: None
    context.checkpointables.registry = registry
    return context


@contextlib.contextmanager
def _quiet_background():
    """Keeps one damaged array from being reported a thousand times.

    Orbax abandons all other reads at the first that fails. asyncio reports each abandoned task, and
    each read that still ends reports that its event loop is closed.
    """
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _describe(array: np.ndarray) -> dict[str, Any]:
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "crc32": zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data),
    }


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_same(found: Any, expected: Any, where: str) -> None:
    """Raises CheckpointMismatchError listing all paths whose presence, shape or dtype differs.

    Args:
      found, expected: trees of anything with `shape` and `dtype`.
      where: what `found` is, for the message.
    """
    theirs, ours = (
        {
            path: f"{np.dtype(leaf.dtype)} {tuple(leaf.shape)}"
            for path, leaf in flatten(tree).items()
        }
        for tree in (found, expected)
    )
    lines = [f"{path}: only there, {theirs[path]}" for path in theirs if path not in ours]
    lines += [f"{path}: not there, here {ours[path]}" for path in ours if path not in theirs]
    lines += [
        f"{path}: there {theirs[path]}, here {ours[path]}"
        for path in ours
        if path in theirs and theirs[path] != ours[path]
    ]
    if lines:
        raise CheckpointMismatchError(
            f"{where} is of another model or optimizer; nothing was loaded. {len(lines)} "
            "differences:\n  " + "\n  ".join(lines)
        )


class SavedWeights(NamedTuple):
    """The weights in a work directory, or in what `python -m convert` wrote.

    Paths begin with the collection: `params/head/bias`, `batch_stats/norm/mean`.
    """

    step: int
    trained: Arrays
    averaged: Arrays  # empty if the run kept no average
    meta: dict[str, Any]  # "model", "num_classes", "image_size", …


def load_weights(folder: str) -> SavedWeights:
    """The newest intact weights of a work directory or a converted checkpoint.

    Raises:
      InputError: there is no checkpoint, or none is intact.
    """
    restored = Checkpoints(os.path.join(folder, "checkpoints")).restore()
    if restored is None:
        raise InputError(
            f"there is no checkpoint in {os.path.join(folder, 'checkpoints')}; give the work "
            "directory of a training run, or a folder that `python -m convert` wrote"
        )
    step, arrays, meta = restored
    averaged = {
        path.removeprefix("ema/"): array
        for path, array in arrays.items()
        if path.startswith("ema/")
    }
    trained = {
        path: array
        for path, array in arrays.items()
        if path.startswith(("params/", "batch_stats/"))
    }
    return SavedWeights(step, trained, averaged, meta)


def main() -> int:
    """Prints the step of a run's newest checkpoint, if there is one; 2 if that is not known."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("workdir")
    workdir = parser.parse_args().workdir
    try:
        steps = Checkpoints(os.path.join(workdir, "checkpoints")).steps()
    except (InputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*steps[-1:], end="\n" if steps else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
