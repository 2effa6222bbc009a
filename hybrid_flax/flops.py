"""Multiply-adds of a program, counted in the program itself."""

import math
from collections.abc import Callable

import jax
from jax.extend import core

# What Pallas traces to; beside each stands its definition, for other platforms.
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


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return equation.outvars[0].aval.size * (kernel.size // outputs)
    if name in _KERNELS:
        return 0
    if name == "while":
        raise ValueError("the multiply-adds of a loop of unknown length cannot be counted")
    inner = [_count(sub) for value in params.values() for sub in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * params.get("length", 1)  # of a scan


def _jaxprs(value):
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
