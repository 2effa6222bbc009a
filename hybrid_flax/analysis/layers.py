"""Layers by name: what they give, and how an outcome depends on it.

A layer is one of the model's named maps (`stage3`, `norm`) or a module by its path
(`stages/2/blocks/5`; dots do as well). Models are called as they are, block by block.
"""

import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from hybrid_flax.errors import InputError
from hybrid_flax.models.backbone import Backbone, Maps
from hybrid_flax.models.gramian.network import GramianNet
from hybrid_flax.weights.functions import calls_through


def compiled(
    function: Callable[..., Any], model: Backbone, arrays: Sequence[Any], *static: Any
) -> Any:
    """`function(model, *arrays, *static)`, compiled once for equal models, shapes and `static`.

    Args:
      function: of a module, not made anew for every call.
      static: hashable.
    """
    graph, state = nnx.split(model)
    return _run(function, static, graph, state, tuple(map(jnp.asarray, arrays)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(function, static, graph, state, arrays):
    return function(nnx.merge(graph, state), *arrays, *static)


def stage_maps(model: Backbone) -> tuple[str, ...]:
    """Names of the maps that the stages of a model hand on, from the first to the last."""
    if isinstance(model, GramianNet):
        return tuple(dict.fromkeys((*model.feature_maps, model.trunk.top)))
    return tuple(model.feature_maps)


def last_map(model: Backbone) -> str:
    """The last map of the trunk, which the classifier, or the final norm, sees."""
    return stage_maps(model)[-1]


def classified_map(model: Backbone) -> str:
    """The map whose mean the classifier sees; where it sees otherwise, the last of the trunk."""
    return model.dense_map or last_map(model)


def layer_names(model: Backbone, images: Array) -> tuple[list[str], list[str]]:
    """(names of maps, paths of modules) that are layers: they give [B, h, w, C]."""
    maps, modules = jax.eval_shape(lambda x: _everything(model, x), images)
    named = [name for name, value in maps.items() if value.ndim == 4 and _is_map(name)]
    return named, [path for path, value in modules.items() if value.ndim == 4]


def _is_map(name: str) -> bool:
    return not name.endswith("class_attn")


def _everything(model: Backbone, images: Array) -> tuple[Maps, dict[str, Array]]:
    """(the named maps, what each module gave at its first call)."""
    modules: dict[str, Array] = {}

    def kept(call, path, part, *args, **kwargs):
        output = call(part, *args, **kwargs)
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, jax.Array):
            modules.setdefault(path, value)
        return output

    with calls_through(model, kept):
        maps = model.intermediates(images)
    return maps, modules


def layer_path(layer: str) -> str:
    return layer.strip("/").replace(".", "/")


def value_of(model: Backbone, images: Array, layer: str) -> tuple[Array, Maps]:
    """(what a layer gives, [B, h, w, C]; the named maps).

    Raises InputError for a layer that is not there, or whose output is no map.
    """
    maps, modules = _everything(model, images)
    found = maps.get(layer, modules.get(layer_path(layer)))
    if found is None or found.ndim != 4:
        raise InputError(_unknown(model, images, layer, found))
    return found, maps


def _unknown(model: Backbone, images: Array, layer: str, found: Array | None) -> str:
    names, paths = layer_names(model, images)
    blocks = [path for path in paths if model.structure.is_block(path)]
    close = difflib.get_close_matches(layer_path(layer), [*names, *paths], n=3, cutoff=0.8)
    wrong = (
        f"gives {list(found.shape)}, no map [B, h, w, C]" if found is not None else "is not there"
    )
    return (
        f"layer={layer!r} {wrong} in this {type(model).__name__}. "
        + (f"Did you mean {', '.join(close)}? " if close else "")
        + f"Named maps: {', '.join(names)}. Blocks, and modules in them, by their path: "
        + (f"{', '.join(blocks[:3])}, …, {blocks[-1]}" if blocks else ", ".join(paths[:4]))
    )


def check_all_layers(given: Sequence[str] | None, there: Sequence[str], what: str) -> list[str]:
    """The paths in `there` that are, or lie under, one of the given; all of them for None.

    Raises InputError for one that is not there.
    """
    if given is None:
        return list(there)
    found: list[str] = []
    for layer in given:
        path = layer_path(layer)
        own = [each for each in there if each == path or each.startswith(f"{path}/")]
        if not own:
            raise InputError(
                f"layer={layer!r}: there is no {what} there. Layers with {what}: {', '.join(there)}"
            )
        found += own
    return list(dict.fromkeys(found))


def derivative(
    model: Backbone,
    images: Array,
    layer: str,
    outcome: Callable[[Maps], Float[Array, ""]],
) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
    """(what a layer gives, the derivative of `outcome(named maps)` by it), float32.

    The model's program is cut behind the layer, and the second part differentiated: no module has
    to know that it is looked at.

    Raises InputError for a layer that is not there, or of which the outcome does not depend.
    """

    def program(images):
        value, maps = value_of(model, images, layer)
        return value, outcome(maps)

    closed = jax.make_jaxpr(program)(images)
    jaxpr = closed.jaxpr
    layer_var, outcome_var = jaxpr.outvars
    cut = next((i for i, eqn in enumerate(jaxpr.eqns) if layer_var in eqn.outvars), None)
    before = {var for eqn in jaxpr.eqns[: (cut or 0) + 1] for var in eqn.outvars}
    before |= set(jaxpr.invars)
    after = jaxpr.eqns[cut + 1 :] if cut is not None else []
    used = dict.fromkeys(
        var
        for eqn in after
        for var in eqn.invars
        if not isinstance(var, jax.extend.core.Literal) and var in before
    )
    if cut is None or layer_var not in used:
        raise InputError(
            f"layer={layer!r}: the outcome does not depend on it in this {type(model).__name__}"
        )
    others = [var for var in used if var is not layer_var]
    first = jaxpr.replace(eqns=jaxpr.eqns[: cut + 1], outvars=[layer_var, *others])
    second = jaxpr.replace(invars=[layer_var, *others], eqns=after, outvars=[outcome_var])
    run_first = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(first, closed.consts))
    run_second = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(second, closed.consts))
    value, *rest = run_first(images)
    gradient = jax.grad(lambda value: run_second(value, *rest)[0])(value)
    return value.astype(jnp.float32), gradient.astype(jnp.float32)


def grid_of(places: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a map with so many places, of an image of this height and width.

    Raises InputError where no grid of the image's proportions has them.
    """
    guess = round(np.sqrt(places * height / width))
    for rows in sorted(range(1, places + 1), key=lambda rows: abs(rows - guess)):
        if places % rows == 0:
            return rows, places // rows
    raise InputError(f"{places} places are no map")
