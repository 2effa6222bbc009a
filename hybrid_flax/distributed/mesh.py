"""The device mesh. Batches on it: `batch.py`; the training state on it: `shardings.py`."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hybrid_flax.errors import InputError

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    devices: Sequence[jax.Device] | None = None,
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    num_slices: int = 0,
) -> Mesh:
    """The mesh of all devices with the axes `data`, `fsdp` and `tensor`, of these sizes.

    Images are split over `data` and `fsdp`, weights over `fsdp` and `tensor` by the rules of
    `shardings.py`. Neighbours on `tensor`, then on `fsdp`, are neighbours on the chips' network;
    several slices lie side by side on `data`, so that only gradients pass between them.

    Auto axes, said explicitly: with JAX's default, Explicit, cutting a sharded batch into windows
    is a sharding error.

    Args:
      devices: by default all, of all processes.
      data, fsdp, tensor: sizes; one of them may be -1, the rest.
      num_slices: of a machine whose slices are connected by a slower network; 0: as many as the
        devices say.

    Raises:
      InputError: the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes({"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices))
    slices = _slices(devices, num_slices)
    if sizes[0] % len(slices):
        raise InputError(
            f"--config.mesh.data={sizes[0]} is not a multiple of the {len(slices)} slices, over "
            "which only the axis data may reach; use a smaller fsdp or tensor"
        )
    inside = (sizes[0] // len(slices), *sizes[1:])
    parts = [mesh_utils.create_device_mesh(inside, part) for part in slices]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * 3)


def _sizes(asked: dict[str, int], count: int) -> tuple[int, ...]:
    said = ", ".join(f"--config.mesh.{axis}={size}" for axis, size in asked.items())
    fixed = [size for size in asked.values() if size != -1]
    product = int(np.prod(fixed))
    if min(fixed, default=1) < 1 or len(fixed) < 2:
        raise InputError(f"{said}: expected numbers from 1, and -1, the rest, for one at most")
    if count % product or (len(fixed) == 3 and product != count):
        rest = "" if len(fixed) == 3 else " or a multiple"
        raise InputError(
            f"{said}: this mesh needs {product} devices{rest}, there are {count}; -1 for one axis "
            "takes the rest"
        )
    return tuple(count // product if size == -1 else size for size in asked.values())


def _slices(devices: Sequence[jax.Device], count: int) -> list[Sequence[jax.Device]]:
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    if len(found) == 1 and count > 1 and len(devices) % count == 0:
        size = len(devices) // count  # CPUs and GPUs do not say: in the order of their processes
        return [devices[start : start + size] for start in range(0, len(devices), size)]
    if count not in (0, len(found)):
        raise InputError(
            f"--config.mesh.num_slices={count}: the {len(devices)} devices are in {len(found)} "
            "slices; 0 takes them as they are"
        )
    return list(found.values())


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
