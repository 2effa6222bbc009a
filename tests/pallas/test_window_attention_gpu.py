"""The Hopper kernels against the definition: in the interpreter of Mosaic GPU, and on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas.halo_attention.geometry import Halo
from pallas.tiles import gpu as gpu_tiles
from pallas.window_attention.geometry import Windows
from tests.pallas.cases import arrays, definition, distance, kernels, some

# (batch, geometry); heads have 32 channels.
CASES = {
    name: (batch, Windows(height, width, heads, 32, window, "bfloat16", **options))
    for name, batch, height, width, heads, window, options in (
        ("7x7, shifted", 1, 14, 14, 1, (7, 7), {"has_bias": True, "shift": (3, 3)}),
        ("7x7, shifted one way", 1, 7, 14, 1, (7, 7), {"shift": (0, 3)}),
        ("7x7, shared query", 2, 7, 14, 1, (7, 7), {"has_bias": True, "shared_query": True}),
        ("7x7, local", 1, 7, 14, 2, (7, 7), {"has_bias": True, "has_local": True}),
        ("8x8, shifted", 1, 8, 8, 1, (8, 8), {"has_bias": True, "shift": (4, 0)}),
        ("28x2, local", 1, 28, 4, 1, (28, 2), {"has_local": True}),
        ("14x7, local", 1, 14, 7, 2, (14, 7), {"has_local": True}),
        ("14x14", 2, 14, 14, 1, (14, 14), {"has_bias": True}),
        ("14x14, shared query", 1, 14, 28, 1, (14, 14), {"has_bias": True, "shared_query": True}),
        ("9x5", 1, 9, 5, 1, (9, 5), {"has_bias": True}),
        ("12x12, shifted", 1, 12, 12, 1, (12, 12), {"has_bias": True, "shift": (6, 6)}),
    )
} | {
    name: (batch, Halo(height, width, heads, 32, block, halo, "bfloat16"))
    for name, batch, height, width, heads, block, halo in (
        ("halo", 2, 7, 14, 1, 7, 3),
        ("halo of one", 1, 8, 12, 2, 4, 1),
        ("halo wider than its block", 1, 6, 9, 1, 3, 5),
        ("halo of the largest block", 1, 16, 8, 1, 8, 4),
    )
}


def check(name: str, interpret):
    batch, geometry = CASES[name]
    gpu = kernels(geometry).gpu
    assert gpu.refusal(geometry) is None
    inputs = arrays(geometry, batch)
    if isinstance(geometry, Halo):  # both the definition and the kernel round the tables
        inputs = jax.tree.map(lambda x: x.astype(geometry.dtype).astype(x.dtype), inputs)
    shape = (batch, geometry.height, geometry.width, geometry.heads, geometry.dim)
    out_grad = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.bfloat16)

    def exact(inputs):
        inputs = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
        out, gradients = jax.vjp(definition(geometry), *inputs)
        return out, gradients(out_grad.astype(jnp.float32))

    out = gpu.forward(geometry, *inputs, interpret=interpret)
    gradients = gpu.backward(geometry, *inputs, out_grad, interpret=interpret)
    assert jax.tree.map(lambda x: x.dtype, gradients) == jax.tree.map(lambda x: x.dtype, inputs)
    computed, wanted = jax.tree.leaves((out, gradients)), jax.tree.leaves(jax.jit(exact)(inputs))
    assert max(distance(*pair) for pair in zip(computed, wanted, strict=True)) < 1e-2


QUICK = {"7x7, shifted", "7x7, local", "9x5", "halo of one"}


@pytest.mark.parametrize("name", some(CASES, QUICK))
def test_interpreted(name, monkeypatch):
    monkeypatch.setattr(gpu_tiles, "MULTIPROCESSORS", 1)  # so that a CTA walks several windows
    gpu_callbacks.reset_gpu_interpret_mode_state()
    check(name, InterpretGPUParams(detect_races=True))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU of Hopper's kind")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    check(name, False)


@pytest.mark.parametrize(
    "name", ["7x7, shifted", "7x7, local", "14x14, shared query", "9x5", "halo"]
)
def test_lowers_for_hopper(name):
    """To Mosaic's instructions, as far as a machine without CUDA can."""
    batch, geometry = CASES[name]
    gpu = kernels(geometry).gpu
    inputs = arrays(geometry, batch)
    shape = (batch, geometry.height, geometry.width, geometry.heads, geometry.dim)

    def both(inputs, out_grad):
        return gpu.forward(geometry, *inputs), gpu.backward(geometry, *inputs, out_grad)

    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    export = jax.export.export(jax.jit(both), platforms=["cuda"], disabled_checks=unchecked)
    module = export(inputs, jax.ShapeDtypeStruct(shape, jnp.bfloat16)).mlir_module()
    count = 3 if name.startswith(("14x14", "9x5")) else 2
    assert module.count("stablehlo.custom_call @mosaic_gpu") == count


WINDOW = Windows(14, 14, 2, 32, (7, 7), "bfloat16")
HALO = Halo(28, 28, 2, 32, 7, 3, "bfloat16")


@pytest.mark.parametrize(
    ("geometry", "change", "why"),
    [
        (WINDOW, {"dim": 24}, "serve 32 channels per head, not 24"),
        (WINDOW, {"dtype": "float32"}, "compute from bfloat16, not float32"),
        (WINDOW, {"height": 34, "width": 34, "window": (17, 17)}, "at most 256 fit"),
        (WINDOW, {"has_local": True, "shift": (1, 0)}, "local convolution in shifted windows"),
        (HALO, {"dim": 16}, "serve 32 channels per head, not 16"),
        (HALO, {"dtype": "float32"}, "compute from bfloat16, not float32"),
        (HALO, {"block": 14}, "blocks of 14 with a halo of 3 see 20 lines"),
        (HALO, {"halo": 5}, "blocks of 7 with a halo of 5 see 17 lines"),
    ],
)
def test_what_is_refused(geometry, change, why):
    refusal = kernels(geometry).gpu.refusal
    assert refusal(geometry) is None
    assert why in refusal(dataclasses.replace(geometry, **change))
