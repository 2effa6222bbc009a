"""Paths of arrays in nested dictionaries: `params/stages/0/blocks/1/attn/qkv/kernel`."""

from typing import Any

import jax
from flax import traverse_util

from hybrid_flax.weights.bridge import Weights


def flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf} of nested dictionaries, and of the tuples that optimizer states are made of."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> Weights:
    """{"a/b": leaf} → {"a": {"b": leaf}}"""
    return traverse_util.unflatten_dict(flat, sep="/")


def unflatten_like(template: Any, flat: dict[str, Any]) -> Any:
    """A tree of the template's structure with the leaves of `flat`, which has all its paths."""
    return jax.tree.unflatten(
        jax.tree.structure(template), [flat[path] for path in flatten(template)]
    )
