"""One step of a checkpoint on disk: Orbax's files, and the manifest that proves them."""

import contextlib
import gc
import hashlib
import json
import logging
import sys
import time
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.experimental.v1._src.saving import execution

from hybrid_flax.errors import InputError
from hybrid_flax.weights.paths import flatten

FORMAT = 1

Arrays = dict[str, np.ndarray]  # by path: "params/stem/conv/kernel"


class Restored(NamedTuple):
    """A checkpoint that was read back as it was written."""

    step: int
    arrays: Arrays
    meta: dict[str, Any]


class DamagedCheckpointError(Exception):
    """One step cannot be read back as it was written; the message names what differs."""


class CheckpointMismatchError(InputError):
    """An intact checkpoint of something else; the message lists every path that differs."""


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
