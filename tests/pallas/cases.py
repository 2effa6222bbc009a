"""The models' geometries, arrays for them, and the comparison of a kernel with the definition."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybrid_flax
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function
from pallas import deformable_conv, halo_attention, window_attention
from pallas.deformable_conv.geometry import Sampling
from pallas.dispatch import Kernels, recorded
from pallas.halo_attention.geometry import Halo
from pallas.window_attention.geometry import Windows

Geometry = Windows | Halo | Sampling
DETECTION = (800, 1344)  # pixels of an image, padded, as detectors are trained


def some(names: Iterable[str], quick: Iterable[str]) -> list:
    """For parametrize: all of the names, those that are not among `quick` only in make test-all."""
    quick = set(quick)
    assert quick <= set(names)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def kernels(geometry: Geometry) -> Kernels:
    """The modules that serve a geometry."""
    operations = {Sampling: deformable_conv, Windows: window_attention, Halo: halo_attention}
    return operations[type(geometry)].choice.KERNELS


def arrays(geometry: Geometry, batch: int):
    """The arguments of a kernel, from the normal distribution; masks of a sampling sum to 1."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    if isinstance(geometry, Sampling):
        *places, channels = out_shape(geometry, batch)
        map_shape = (batch, geometry.height, geometry.width, geometry.groups, channels)
        value, offsets = (
            normal(*shape, dtype=geometry.dtype)
            for shape in (map_shape, (*places, geometry.points, 2))
        )
        return value, offsets, jax.nn.softmax(normal(*places, geometry.points))
    heads, dim = geometry.heads, geometry.dim
    shape, dtype = (batch, geometry.height, geometry.width), geometry.dtype
    if isinstance(geometry, Halo):
        tables = (normal(2 * geometry.window - 1, dim) for _ in range(2))
        return (normal(*shape, 3, heads, dim, dtype=dtype), *tables)
    tokens = geometry.window[0] * geometry.window[1]
    shared, biased, local = geometry.shared_query, geometry.has_bias, geometry.has_local
    return (
        normal(*shape, 2 if shared else 3, heads, dim, dtype=dtype),
        normal(heads, tokens, tokens) if biased else None,
        normal(batch, *geometry.window, heads, dim, dtype=dtype) if shared else None,
        normal(3, 3, heads, dim) if local else None,
    )


def out_shape(geometry: Geometry, batch: int) -> tuple[int, ...]:
    """Of the result."""
    if isinstance(geometry, Sampling):
        places = (geometry.out_height, geometry.out_width)
        return (batch, *places, geometry.groups, geometry.channels)
    return (batch, geometry.height, geometry.width, geometry.heads, geometry.dim)


def argument_shapes(geometry: Geometry, batch: int):
    """Shapes of `arrays`, and of the gradient of the result, which is last."""
    given = jax.eval_shape(lambda: arrays(geometry, batch))
    return (*given, jax.ShapeDtypeStruct(out_shape(geometry, batch), geometry.dtype))


def model_geometries(pattern: str, size: tuple[int, int] = (224, 224)) -> dict:
    """{geometry: what `auto` picks by platform} of what the 224-pixel models trace at a size."""
    found = {}
    for name in hybrid_flax.list_models(pattern):
        if hybrid_flax.model_info(name).image_size == 224:
            model = bridge.abstract(lambda name=name: hybrid_flax.create_model(name))
            images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
            with recorded() as calls:
                jax.eval_shape(as_function(model), bridge.get_weights(model), images)
            found |= dict(calls)
    return found


def definition(geometry: Geometry):
    """`reference.py` with the arguments of a kernel."""
    if isinstance(geometry, Sampling):
        return functools.partial(deformable_conv.reference.deformable_sampling, geometry)
    if isinstance(geometry, Halo):
        return functools.partial(
            halo_attention.reference.halo_attention, block=geometry.block, halo=geometry.halo
        )

    def attend(qkv, bias, query, local_kernel):
        return window_attention.reference.window_attention(
            qkv,
            bias,
            window=geometry.window,
            shift=geometry.shift,
            query=query,
            local_kernel=local_kernel,
        )

    return attend


def differences(geometry: Geometry, batch: int = 1, target: str = "tpu") -> list[float]:
    """Relative L2 distances of the result and gradients of a target's kernel, interpreted.

    From the definition in float32, whatever the dtype of the geometry.
    """
    inputs = arrays(geometry, batch)
    cotangent = np.random.default_rng(1).normal(size=out_shape(geometry, batch))
    cotangent = jnp.asarray(cotangent, jnp.float32)

    @jax.jit
    def defined(inputs):
        inputs = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
        out, gradients = jax.vjp(definition(geometry), *inputs)
        return out, gradients(cotangent)

    @jax.jit
    def computed(inputs):
        module = getattr(kernels(geometry), target)
        out = module.forward(geometry, *inputs, interpret=True)
        given = cotangent.astype(out.dtype)
        return out, module.backward(geometry, *inputs, given, interpret=True)

    pairs = zip(jax.tree.leaves(computed(inputs)), jax.tree.leaves(defined(inputs)), strict=True)
    return [distance(got, want) for got, want in pairs]


def distance(got, want) -> float:
    """Relative L2."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
