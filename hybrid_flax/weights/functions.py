"""Flax modules as pure functions of their weights: plain, rematerialised, recording."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from hybrid_flax.layers import scanned_blocks
from hybrid_flax.models.backbone import Backbone
from hybrid_flax.weights.bridge import Weights, string_keys

# What of each block is kept for the backward pass: everything; what comes in; and what the products
# with its weights give, but not those of attention.
REMAT = {
    "none": None,
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def as_function(model: Backbone, *, scan: bool = False) -> Callable[..., Any]:
    """The model as a pure function: `apply(weights, *args, method="__call__", **kwargs)`.

    `scan` makes equal blocks one loop, see `layers/blocks.py`.
    """
    run = as_training_function(model, scan=scan)

    def apply(weights: Weights, *args, **kwargs):
        return run(weights, *args, **kwargs)[0]

    return apply


def as_training_function(
    model: Backbone, remat: str = "none", *, scan: bool = False
) -> Callable[..., tuple[Any, Weights]]:
    """Like `as_function`, but returns (output, batch statistics after the call).

    The second is what `weights["batch_stats"]` should be next: {} for a model without batch norms.
    `remat` is what the backward pass finds in memory, see `REMAT`; the rest it computes again.
    """
    with_weights = _with_weights(model)
    policy = REMAT[remat]

    def apply(weights: Weights, *args, method: str = "__call__", **kwargs):
        module = with_weights(weights)
        with contextlib.ExitStack() as stack:
            if policy:
                stack.enter_context(_rematerialised(module, policy))
            if scan:
                stack.enter_context(scanned_blocks(policy))
            output = getattr(module, method)(*args, **kwargs)
        return output, string_keys(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))

    return apply


def as_recording_function(model: Backbone) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Like `as_function`, but returns (output, {path: (number, what that submodule gave)}).

    A path names a module: `stages/0/blocks/1/attn`. The numbers count the calls as they ended.
    Submodules that give no array are left out.
    """
    with_weights = _with_weights(model)

    def apply(weights: Weights, *args, method: str = "__call__", **kwargs):
        module = with_weights(weights)
        records: dict[str, tuple[int, jax.Array]] = {}
        with _recording(module, records):
            output = getattr(module, method)(*args, **kwargs)
        return output, records

    return apply


def _with_weights(model: Backbone) -> Callable[[Weights], Backbone]:
    """Gives what makes copies of the model with other weights, also under a trace."""
    graph, _ = nnx.split(model)

    def merge(weights: Weights) -> Backbone:
        return nnx.merge(graph, *(nnx.restore_int_paths(tree) for tree in weights.values()))

    return merge


@contextlib.contextmanager
def _recording(module: nnx.Module, records: dict[str, tuple[int, jax.Array]]):
    def recorded(call, path, part, *args, **kwargs):
        output = call(part, *args, **kwargs)
        if isinstance(output, jax.Array):
            records.setdefault(path, (len(records), output))
        return output

    with calls_through(module, recorded):
        yield


@contextlib.contextmanager
def _rematerialised(module: Backbone, policy: Callable[..., bool]):
    """Inside it, the blocks that the model's structure names are computed again backwards."""
    structure = module.structure

    def kept(call, path, block, *args, **kwargs):
        if not structure.is_block(path):
            return call(block, *args, **kwargs)
        graph, state = nnx.split(block)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

        @functools.partial(jax.checkpoint, policy=policy)
        def run(state, arrays):
            given = dict(zip(places, arrays, strict=True))
            args, kwargs = jax.tree.unflatten(
                treedef, [given.get(i, x) for i, x in enumerate(leaves)]
            )
            copy = nnx.merge(graph, state)
            return call(copy, *args, **kwargs), nnx.state(copy, nnx.BatchStat)

        output, statistics = run(state, [leaves[i] for i in places])
        nnx.update(block, statistics)
        return output

    with calls_through(module, kept):
        yield


@contextlib.contextmanager
def calls_through(module: nnx.Module, through: Callable[..., Any]):
    """Inside it, calls of submodules go through `through(call, path, submodule, *args)`.

    A call that a submodule makes of itself, by `super().__call__`, is part of the first.
    """
    paths = {id(part): "/".join(map(str, path)) for path, part in nnx.iter_modules(module)}
    kinds = {type(part) for _, part in nnx.iter_modules(module) if part is not module}
    calls: dict[type, Callable[..., Any]] = {}
    for kind in kinds:
        for parent in kind.__mro__:  # a class may inherit its call
            if "__call__" in vars(parent):
                calls[kind] = vars(parent)["__call__"]
                break
    own = {kind for kind in calls if "__call__" in vars(kind)}
    running: set[int] = set()

    def wrapped(call):
        @functools.wraps(call)
        def wrapper(self, *args, **kwargs):
            if id(self) not in paths or id(self) in running:
                return call(self, *args, **kwargs)
            running.add(id(self))
            try:
                return through(call, paths[id(self)], self, *args, **kwargs)
            finally:
                running.discard(id(self))

        return wrapper

    for kind, call in calls.items():
        kind.__call__ = wrapped(call)  # type: ignore[method-assign]  # that is the point
    try:
        yield
    finally:
        for kind, call in calls.items():
            if kind in own:
                kind.__call__ = call  # type: ignore[method-assign]
            else:
                del kind.__call__
