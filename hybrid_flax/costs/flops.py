"""Multiply-adds of a program, counted in the program itself."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from hybrid_flax.models.backbone import Backbone
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function

# Primitives of Pallas; beside each stands its definition, for other platforms.
_KERNELS = ("pallas_call", "mpmd_map", "core_map")


def count_multiply_adds(function: Callable, *arguments) -> int:
    """Counts the multiply-adds of all matrix products and convolutions in `function(*arguments)`.

    This is what papers call FLOPs of a model. Elementwise work, norms, softmax and pooling are not
    counted. Where the program chooses between formulations (by platform), the dearest counts: a
    convolution counts as one, even where it runs as a sum, and attention as its definition, even
    where a kernel computes it.

    Args:
      function: any traceable function.
      *arguments: arrays, or `jax.ShapeDtypeStruct`s: nothing is computed.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def training_flops(model: Backbone, image_size: int, batch_size: int) -> int:
    """Counts one training step: three forward passes, two FLOPs for each multiply-add.

    Args:
      model: abstract or real.
    """
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    apply, weights = as_function(model), bridge.get_weights(model)
    return 6 * batch_size * count_multiply_adds(apply, weights, image)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    inputs, outputs = (
        [_shape(var) for var in vars] for vars in (equation.invars, equation.outvars)
    )
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return math.prod(outputs[0]) * math.prod(inputs[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        channels = inputs[1][params["dimension_numbers"].rhs_spec[0]]
        return math.prod(outputs[0]) * (math.prod(inputs[1]) // channels)
    if name in _KERNELS:
        return 0
    if name == "while":
        raise ValueError("the multiply-adds of a loop of unknown length cannot be counted")
    inner = [_count(sub) for value in params.values() for sub in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * params.get("length", 1)  # of a scan


def _shape(variable: Any) -> tuple[int, ...]:
    """Reads a variable's or literal's shape; () for what is no array."""
    return getattr(variable.aval, "shape", ())


def _jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
