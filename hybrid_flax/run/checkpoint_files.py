"""One checkpoint on disk: Orbax's files, and the manifest that proves them.

Orbax loads a flipped bit without a word and casts dtypes silently. So beside its files stands a
manifest with shape, dtype and CRC-32 of every array; reading compares the tree first, then every
array.
"""

import hashlib
import json
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from hybrid_flax.errors import InputError
from hybrid_flax.run import orbax_io
from hybrid_flax.weights.differences import summary
from hybrid_flax.weights.paths import flatten, unflatten

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
    """An intact checkpoint of something else; the message says which paths differ."""


def parts_of(step: int, tree: Any, meta: dict[str, Any]) -> dict[str, Any]:
    """The parts of a checkpoint, for `orbax_io.save_async`: copies of the arrays, and the manifest.

    Args:
      tree: arrays in nested dictionaries (and the tuples of optimizer states).
      meta: JSON-serialisable facts to keep beside the arrays.
    """
    # A copy, because the next step reuses (donates) these buffers.
    arrays = {path: np.array(jax.device_get(leaf)) for path, leaf in flatten(tree).items()}
    manifest = {"format": FORMAT, "step": step, "meta": meta}
    manifest["arrays"] = {path: _describe(array) for path, array in arrays.items()}
    manifest["digest"] = _digest(manifest)
    return {"state": unflatten(arrays), "manifest": manifest}


def read_step(folder: epath.Path, step: int, expected: Any, name: str) -> Restored:
    """Reads a checkpoint and compares every array with its checksum.

    Args:
      expected: tree of anything with `shape` and `dtype`; None takes whatever is there.
      name: what to call it in messages.

    Raises:
      DamagedCheckpointError: it is not what was written.
      CheckpointMismatchError: it is intact but has other paths, shapes or dtypes.
      InputError: it is of a newer format.
    """
    manifest = _load(folder, "manifest")
    if not isinstance(manifest, dict) or manifest.get("digest") != _digest(manifest):
        raise DamagedCheckpointError("its manifest does not match its own checksum")
    if manifest["format"] > FORMAT:
        raise InputError(
            f"{name} has checkpoint format {manifest['format']}; this version of hybrid_flax reads "
            f"up to {FORMAT}. Update hybrid_flax"
        )
    arrays = manifest["arrays"]
    if expected is not None:
        shapes = {
            path: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"])
            for path, entry in arrays.items()
        }
        check_same(shapes, expected, f"checkpoint {name}")
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
    return Restored(step, found, manifest["meta"])


def _load(folder: epath.Path, part: str) -> Any:
    try:
        return orbax_io.load(folder, part)
    except orbax_io.UnreadableError as error:
        raise DamagedCheckpointError(str(error)) from error


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
    """Raises CheckpointMismatchError, with a summary, where presence, shape or dtype differ.

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
    shapes = [
        f"{path}: there {theirs[path]}, here {ours[path]}"
        for path in ours
        if path in theirs and theirs[path] != ours[path]
    ]
    missing = [path for path in ours if path not in theirs]
    unexpected = [path for path in theirs if path not in ours]
    if missing or unexpected or shapes:
        raise CheckpointMismatchError(
            f"{where} is of another model or optimizer; nothing was loaded. "
            f"{len(missing + unexpected + shapes)} differences:\n"
            f"{summary(missing, unexpected, shapes)}"
        )
