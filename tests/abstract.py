"""Models that are only shapes, built once in a test process."""

import functools

import jax
import jax.numpy as jnp

import hybrid_flax
from hybrid_flax.models.backbone import Backbone
from hybrid_flax.models.registry import tiny_model
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_recording_function
from hybrid_flax.weights.paths import flatten

CLASSES = 1009  # no other dimension has it


@functools.cache
def abstract(name: str, *, tiny: bool = False, dtype: str = "float32") -> Backbone:
    """The model by that name with `CLASSES` classes; `tiny`: of a few small blocks."""
    fields = tiny_model(name) if tiny else {}
    return bridge.abstract(
        lambda: hybrid_flax.create_model(name, num_classes=CLASSES, dtype=dtype, **fields)
    )


@functools.cache
def parameters(name: str, *, tiny: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """{path without the collection: shape and dtype}"""
    return flatten(bridge.get_weights(abstract(name, tiny=tiny))["params"])


@functools.cache
def recorded(name: str, dtype: str) -> tuple[dict, dict]:
    """({name of a map: shape and dtype}, {path of a module: those of its result}), tiny."""
    model = abstract(name, tiny=True, dtype=dtype)
    images = jax.ShapeDtypeStruct((2, model.image_size, model.image_size, 3), jnp.float32)
    apply = functools.partial(as_recording_function(model), method="intermediates")
    maps, outputs = jax.eval_shape(apply, bridge.get_weights(model), images)
    return maps, {path: output for path, (_, output) in outputs.items()}
