"""The device mesh and where arrays live on it."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hybrid_flax.errors import InputError

AXES = ("data", "fsdp", "tensor")


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices on the `data` axis; `fsdp` and `tensor` have size 1.

    Auto axes, said explicitly: with JAX's default, Explicit, cutting a sharded batch into windows
    is a sharding error.
    """
    devices = jax.devices() if devices is None else devices
    shape = (len(devices), 1, 1)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def on_mesh(mesh: Mesh):
    """Decorates what is traced under `jit`, so that kernels inside see the mesh they run on."""

    def decorate(function):
        @functools.wraps(function)
        def traced(*arguments):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*arguments)

        return traced

    return decorate


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Starts copying a host batch to the devices, rows split over them; does not wait."""
    sharding = batch_sharded(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The next batch size that splits evenly over the devices, where any will do."""
    return -(-batch_size // mesh.size) * mesh.size


def check_batch_size(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Raises InputError unless the batch splits evenly over devices and micro-batches."""
    pieces = mesh.size * accumulation_steps
    if batch_size < 1 or batch_size % pieces:
        below = batch_size // pieces * pieces
        raise InputError(
            f"batch_size={batch_size} cannot be split evenly over {mesh.size} devices × "
            f"accumulation_steps={accumulation_steps}; use a multiple of {pieces}, such as "
            f"{below or pieces} or {max(below, pieces) + pieces}"
        )
