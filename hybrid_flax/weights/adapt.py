"""Fits the weights of one model to another of the same architecture."""

import re
from typing import Any

import jax.numpy as jnp

from hybrid_flax.errors import InputError
from hybrid_flax.layers import resize_position_map, resize_relative_position_bias
from hybrid_flax.models.structure import Structure


def adapt(
    loaded: dict[str, Any], fresh: dict[str, Any], origin: str, structure: Structure
) -> dict[str, Any]:
    """Weights for a model, taken from another checkpoint wherever they can be.

    A classifier for another number of classes is left fresh, and position tables of another image
    size are resized; both are printed.

    Args:
      loaded: {path: array} of the checkpoint.
      fresh: {path: array} of the model that is to be filled.
      origin: what to call the checkpoint in messages.
      structure: of both, which says what a classifier and a position table is.

    Raises:
      InputError: the architectures differ; every difference is listed.
    """
    fitted, resized, problems = {}, [], []
    for path, leaf in fresh.items():
        array = loaded.get(path)
        if array is None:
            problems.append(f"{path}: not in the checkpoint, this model {leaf.shape}")
        elif array.shape == leaf.shape:
            fitted[path] = array
        elif structure.is_classifier(path):
            fitted[path] = leaf
            if path.endswith("bias"):
                print(
                    f"the classifier for {array.shape[0]} classes is replaced by a fresh one for "
                    f"{leaf.shape[0]}"
                )
        elif re.search(structure.position_bias, path) and array.shape[1] == leaf.shape[1]:
            window = (round(leaf.shape[0] ** 0.5) + 1) // 2
            fitted[path] = resize_relative_position_bias(jnp.asarray(array), window)
            resized.append(path)
        elif re.search(structure.position_map, path) and array.shape[2] == leaf.shape[2]:
            fitted[path] = resize_position_map(jnp.asarray(array), *leaf.shape[:2])
            resized.append(path)
        else:
            problems.append(f"{path}: checkpoint {array.shape}, this model {leaf.shape}")
    problems += [f"{path}: only in the checkpoint" for path in loaded if path not in fresh]
    if problems:
        raise InputError(
            f"the weights of {origin} are not of this model; nothing was loaded. Give the same "
            "--config.model.name and overrides\n  " + "\n  ".join(problems)
        )
    if resized:
        print(f"{len(resized)} learned position tables are resized to this image size")
    return fitted
