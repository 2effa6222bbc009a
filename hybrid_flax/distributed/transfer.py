"""Copies between host memory and a state that several processes hold together.

Only the first process touches the checkpoints: the others need no storage, and which step is
restored cannot differ between them.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def gather_to_host(tree: Any) -> Any:
    """The tree, with every array that this process has only a part of as a whole in its memory.

    All processes have to call it: they gather. Array by array, so that no device holds two.
    """

    def gathered(leaf: jax.Array):
        if leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return leaf.addressable_data(0)
        assert isinstance(leaf.sharding, NamedSharding)
        replicated = leaf.sharding.update(spec=PartitionSpec())
        whole = jax.jit(_same, out_shardings=replicated)(leaf)
        return jax.device_get(whole.addressable_data(0))

    return jax.tree.map(gathered, tree)


def _same(x):
    return x


def broadcast_from_first(
    arrays: dict[str, np.ndarray] | None, like: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The arrays that the first process has, in every process, to the bit.

    Args:
      arrays: by path; None in the other processes.
      like: anything with `shape` and `dtype`, under the same paths in all processes.
    """
    if jax.process_count() == 1:
        assert arrays is not None
        return arrays

    def sent(name):
        shape, dtype = like[name].shape, np.dtype(like[name].dtype)
        array = np.zeros(shape, dtype) if arrays is None else np.asarray(arrays[name])
        # It is sent as a sum, which would lose the sign of -0.0: as integers.
        bits = np.ascontiguousarray(array).reshape(-1).view(f"u{dtype.itemsize}")
        return np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(dtype).reshape(shape)

    return {name: sent(name) for name in like}


def put(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has, on the devices as the shardings (or one for all) say."""

    def placed(array, sharding):
        array = np.asarray(array)
        return from_parts(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(placed, tree, jax.tree.broadcast(shardings, tree))


def from_parts(
    shape: tuple[int, ...], sharding: Sharding, part: Callable[[Any], np.ndarray]
) -> jax.Array:
    """Starts copying the parts of an array that lie on this process's devices; does not wait.

    This is `jax.make_array_from_callback`, which JAX's transfer guard takes for an accident.

    Args:
      part: from a tuple of slices to that part of the array.
    """
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(shape, sharding, part)
