"""Between Flax modules and plain nested dictionaries of arrays.

Modules live in `models/` and `layers/`; the training step, optimizer, EMA, checkpoints and
conversion see only dictionaries like `{"stages": {"0": {"blocks": …}}}`. A path is the keys joined
by "/": `stages/0/blocks/1/attn/qkv/kernel`.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx, traverse_util

Params = dict[str, Any]  # nested; leaves are arrays


def get_params(model: nnx.Module) -> Params:
    """The model's parameters. List positions become string keys: "0", "1", …"""
    return _string_keys(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def set_params(model: nnx.Module, params: Params) -> None:
    """Replaces all parameters in place; `params` has the structure `get_params` gives."""
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(model, state)


def abstract(build: Callable[[], nnx.Module]) -> nnx.Module:
    """Builds a model whose parameters are only shapes and dtypes: instant, and without memory.

    `set_params` (or `convert.load_state_dict`) makes a real model of it.
    """
    return nnx.eval_shape(build)


def as_function(model: nnx.Module) -> Callable[..., Any]:
    """Returns `apply(params, *args, method="__call__", **kwargs)`: the model as a pure function."""
    graph, _ = nnx.split(model)

    def apply(params: Params, *args, method: str = "__call__", **kwargs):
        module = nnx.merge(graph, nnx.restore_int_paths(params))
        return getattr(module, method)(*args, **kwargs)

    return apply


def flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf} of nested dictionaries, and of the tuples that optimizer states are made of."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> Params:
    """{"a/b": leaf} → {"a": {"b": leaf}}"""
    return traverse_util.unflatten_dict(flat, sep="/")


def unflatten_like(template: Any, flat: dict[str, Any]) -> Any:
    """A tree of the template's structure with the leaves of `flat`, which has all its paths."""
    return jax.tree.unflatten(
        jax.tree.structure(template), [flat[path] for path in flatten(template)]
    )


def _string_keys(tree):
    if isinstance(tree, dict):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return tree
