"""How batches lie on the mesh: which rows are whose, and how they get there."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_flax.distributed.transfer import from_parts
from hybrid_flax.errors import InputError
from hybrid_flax.sign_of_life import alive

BATCH_AXES = ("data", "fsdp")


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first axis split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch this process has to read, ascending: those of its own devices."""
    rows = batch_size // batch_parts(mesh)
    return np.concatenate([np.arange(part * rows, (part + 1) * rows) for part in _own_parts(mesh)])


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Starts copying this process's rows of a batch to its devices; does not wait.

    The arrays that it returns have the rows of all processes. It is a sign of life: whatever a
    program does with images, it comes here for each batch.
    """
    alive()
    sharding, parts = batch_sharded(mesh), _own_parts(mesh)

    def whole(array: np.ndarray) -> jax.Array:
        rows = len(array) // len(parts)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            place = parts.index((index[0].start or 0) // rows)
            return array[place * rows : (place + 1) * rows]

        shape = (rows * batch_parts(mesh), *array.shape[1:])
        return from_parts(shape, sharding, part)

    return {name: whole(array) for name, array in batch.items()}


@functools.cache
def _own_parts(mesh: Mesh) -> list[int]:
    """Which parts of a batch lie on devices of this process; ascending, but maybe with gaps."""
    places = batch_sharded(mesh).addressable_devices_indices_map((batch_parts(mesh),)).values()
    return sorted({place[0].start or 0 for place in places if place})


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The next batch size that splits evenly over the devices, where any will do."""
    parts = batch_parts(mesh)
    return -(-batch_size // parts) * parts


def check_batch_size(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Raises InputError unless the batch splits evenly over devices and micro-batches."""
    pieces = batch_parts(mesh) * accumulation_steps
    if batch_size < 1 or batch_size % pieces:
        below = batch_size // pieces * pieces
        raise InputError(
            f"batch_size={batch_size} cannot be split evenly over {batch_parts(mesh)} devices × "
            f"accumulation_steps={accumulation_steps}; use a multiple of {pieces}, such as "
            f"{below or pieces} or {max(below, pieces) + pieces}"
        )
