"""PyTorch state_dicts in and out of our models: strict both ways, exact to the bit.

Each family has a rules file with `MODEL`, `RENAMES` and `derived_buffers`. The rules turn our
parameter paths into the release's keys; how an array is laid out follows from its name and rank.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import gcvit
from hybrid_flax import bridge
from hybrid_flax.errors import InputError

_FAMILIES = (gcvit,)

# Our axis order → PyTorch's, by rank of a kernel: (in, out) → (out, in); HWIO → OIHW.
_KERNEL_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}


class _Entry(NamedTuple):
    path: str  # in our model
    axes: tuple[int, ...]  # transposes our array into PyTorch's
    shape: tuple[int, ...]  # in PyTorch's layout
    dtype: np.dtype


def load_state_dict(model: nnx.Module, state: Mapping[str, np.ndarray]) -> None:
    """Fills a model, in place, with the arrays of a PyTorch state_dict.

    Args:
      model: from `create_model`; it may be abstract (`bridge.abstract`).
      state: {key: array} as `load_checkpoint` returns it; PyTorch tensors are taken too. Buffers
        that follow from the architecture (relative position indices) may be left out.

    Raises:
      ValueError: listing every missing, unexpected, mis-shaped or unusable key at once; the model
        is unchanged then.
    """
    table, buffers = _table(model), _rules(model).derived_buffers(model)
    wrong_shape, wrong_value, params = [], [], {}
    for key, array in state.items():
        array = np.asarray(array)
        if key in buffers:
            if array.shape != buffers[key].shape or not np.array_equal(array, buffers[key]):
                wrong_value.append(
                    f"{key}: {array.dtype} {array.shape} differs from the one that this model's "
                    f"windows imply, {buffers[key].shape}"
                )
        elif key in table:
            entry = table[key]
            if array.shape != entry.shape:
                wrong_shape.append(f"{key}: file {array.shape}, model {entry.shape}")
            elif not _widens(array.dtype, entry.dtype):
                wrong_value.append(
                    f"{key}: {array.dtype} does not fit into {entry.dtype} without loss"
                )
            else:
                array = array.transpose(np.argsort(entry.axes)).astype(entry.dtype)
                params[entry.path] = jnp.asarray(array)
    problems = {
        "missing": [key for key in table if key not in state],
        "unexpected": [key for key in state if key not in table and key not in buffers],
        "mis-shaped": wrong_shape,
        "unusable": wrong_value,
    }
    if any(problems.values()):
        lines = [
            f"  {len(found)} {kind}:\n" + "\n".join(f"    {line}" for line in found)
            for kind, found in problems.items()
            if found
        ]
        raise InputError(
            f"this state_dict does not fit {type(model).__name__} as it was built (variant, "
            "num_classes, image_size); nothing was loaded\n" + "\n".join(lines)
        )
    bridge.set_params(model, bridge.unflatten(params))


def to_state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """The model as the state_dict its authors' code loads: same keys, layouts, dtypes and bits."""
    flat = bridge.flatten(bridge.get_params(model))
    state = {
        key: np.ascontiguousarray(np.asarray(flat[entry.path]).transpose(entry.axes))
        for key, entry in _table(model).items()
    }
    return state | _rules(model).derived_buffers(model)


def classifier_width(model: nnx.Module, state: Mapping[str, np.ndarray]) -> int:
    """The number of classes a state_dict was trained for; the model's own if it cannot be told.

    Args:
      model: of the right family and variant, with any number of classes.
    """
    for key, entry in _table(model).items():
        if entry.path == "head/bias":
            return len(state[key]) if key in state and np.ndim(state[key]) == 1 else entry.shape[0]
    raise AssertionError(f"{type(model).__name__} has no parameter head/bias")


def _rules(model: nnx.Module):
    for rules in _FAMILIES:
        if isinstance(model, rules.MODEL):
            return rules
    known = ", ".join(rules.MODEL.__name__ for rules in _FAMILIES)
    raise InputError(f"no conversion rules for {type(model).__name__}; there are some for {known}")


def _table(model: nnx.Module) -> dict[str, _Entry]:
    """{release key: where it goes in our model}, one entry for every parameter."""
    rules, table = _rules(model), {}
    for path, leaf in bridge.flatten(bridge.get_params(model)).items():
        key = path
        for pattern, replacement in rules.RENAMES:
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"/(kernel|scale)$", "/weight", key).replace("/", ".")
        axes = tuple(range(leaf.ndim))
        if path.endswith("/kernel"):
            axes = _KERNEL_AXES[leaf.ndim]
        shape = tuple(leaf.shape[axis] for axis in axes)
        if key in table:
            raise AssertionError(f"the rules map both {table[key].path} and {path} to {key}")
        table[key] = _Entry(path, axes, shape, np.dtype(leaf.dtype))
    return table


def _widens(source: np.dtype, target: np.dtype) -> bool:
    """Whether every value of `source` is exactly a value of `target`, both floating point."""
    return jnp.issubdtype(source, jnp.floating) and np.can_cast(source, target, "safe")
