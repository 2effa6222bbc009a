"""Between Flax modules and plain nested dictionaries of arrays.

Modules live in `models/` and `layers/`; the training step, optimizer, EMA, checkpoints and
conversion see only dictionaries like `{"params": {"stages": {"0": {"blocks": …}}}}`. A path is the
keys joined by "/": `params/stages/0/blocks/1/attn/qkv/kernel`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)
Weights = dict[str, Any]  # {"params": nested, "batch_stats": nested where a model has batch norms}

_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def get_weights(model: nnx.Module) -> Weights:
    """The model's parameters and batch statistics. List positions become keys: "0", "1", …"""
    collections = {
        name: string_keys(nnx.to_pure_dict(nnx.state(model, kind)))
        for name, kind in _COLLECTIONS.items()
    }
    return {name: tree for name, tree in collections.items() if tree}


def set_weights(model: nnx.Module, weights: Weights) -> None:
    """Replaces all weights in place; they have the structure that `get_weights` gives."""
    for name, kind in _COLLECTIONS.items():
        state = nnx.state(model, kind)
        nnx.replace_by_pure_dict(state, weights.get(name, {}))
        nnx.update(model, state)


def abstract(build: Callable[[], Model]) -> Model:
    """Builds a model whose weights are only shapes and dtypes: instant, and without memory.

    `set_weights` (or `convert.load_state_dict`) makes a real model of it.
    """
    return nnx.eval_shape(build)


def string_keys(tree: Any) -> Any:
    """Turns all keys of nested dictionaries into strings: list positions are numbers in Flax."""
    if isinstance(tree, dict):
        return {str(key): string_keys(value) for key, value in tree.items()}
    return tree
