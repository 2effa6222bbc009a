"""The device mesh, and how batches lie on it. Where the training state lies: `rules.py`."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hybrid_flax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


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
    `rules.py`. Neighbours on `tensor`, then on `fsdp`, are neighbours on the chips' network;
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

    The arrays that it returns have the rows of all processes.
    """
    sharding, parts = batch_sharded(mesh), _own_parts(mesh)

    def whole(array: np.ndarray) -> jax.Array:
        rows = len(array) // len(parts)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            place = parts.index((index[0].start or 0) // rows)
            return array[place * rows : (place + 1) * rows]

        shape = (rows * batch_parts(mesh), *array.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: whole(array) for name, array in batch.items()}


@functools.cache
def _own_parts(mesh: Mesh) -> list[int]:
    """Which parts of a batch lie on devices of this process; ascending, but maybe with gaps."""
    places = batch_sharded(mesh).addressable_devices_indices_map((batch_parts(mesh),)).values()
    return sorted({place[0].start or 0 for place in places})


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
