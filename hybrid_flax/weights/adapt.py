"""Fits the weights of one model to another of the same architecture."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_flax.errors import InputError
from hybrid_flax.layers import resize_position_map, resize_relative_position_bias
from hybrid_flax.models.structure import Structure
from hybrid_flax.weights.differences import summary


def adapt(
    loaded: dict[str, Any], fresh: dict[str, Any], origin: str, structure: Structure
) -> dict[str, Any]:
    """Weights for a model, taken from another checkpoint wherever they can be.

    A classifier for another number of classes is left fresh, and position tables of another image
    size are resized; both are printed. A model without a classifier takes none.

    Args:
      loaded: {path: array} of the checkpoint.
      fresh: {path: array} of the model that is to be filled.
      origin: what to call the checkpoint in messages.
      structure: of both, which says what a classifier and a position table is.

    Raises:
      InputError: the architectures differ; says how many of which parts, with examples.
    """
    fitted, resized, shapes = {}, [], []
    for path, leaf in fresh.items():
        array = loaded.get(path)
        if array is None:
            continue
        if array.shape == leaf.shape:
            fitted[path] = array
        elif structure.is_classifier(path):
            fitted[path] = leaf
            if path.endswith("bias"):
                print(
                    f"the classifier for {array.shape[-1]} classes is replaced by a fresh one for "
                    f"{leaf.shape[-1]}"
                )
        elif re.search(structure.position_bias, path) and _same_from(1, array, leaf):
            window = (round(leaf.shape[0] ** 0.5) + 1) // 2
            fitted[path] = resize_relative_position_bias(jnp.asarray(array), window)
            resized.append(path)
        elif re.search(structure.position_map, path) and _are_maps(array, leaf):
            fitted[path] = _resized_map(jnp.asarray(array), leaf.shape)
            resized.append(path)
        else:
            shapes.append(f"{path}: checkpoint {tuple(array.shape)}, this model {leaf.shape}")
    missing = [path for path in fresh if path not in loaded]
    unexpected = [path for path in loaded if path not in fresh]
    if not any(structure.is_classifier(path) for path in fresh):  # num_classes=0, for features
        unexpected = [path for path in unexpected if not structure.is_classifier(path)]
    if missing or unexpected or shapes:
        raise InputError(
            f"the weights of {origin} are not of this model; nothing was loaded. Give the same "
            f"--config.model.name and overrides\n{summary(missing, unexpected, shapes)}"
        )
    if resized:
        print(f"{len(resized)} learned position tables are resized to this image size")
    return fitted


def _same_from(dimension: int, array: Any, leaf: Any) -> bool:
    return array.ndim == leaf.ndim and array.shape[dimension:] == leaf.shape[dimension:]


def _are_maps(array: Any, leaf: Any) -> bool:
    """Whether both are maps of positions, [H, W, C], or [H·W, C] of a square."""
    if array.ndim == 2:
        are_square = all(math.isqrt(len(each)) ** 2 == len(each) for each in (array, leaf))
        return are_square and _same_from(1, array, leaf)
    return _same_from(2, array, leaf)


def _resized_map(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if x.ndim == 2:
        old, new = math.isqrt(len(x)), math.isqrt(shape[0])
        return resize_position_map(x.reshape(old, old, -1), new, new).reshape(shape)
    return resize_position_map(x, *shape[:2])
