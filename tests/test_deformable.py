import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_flax.layers import deformable_sampling
from tests.parity import GOLDEN

CASES = [
    case
    for case in json.loads((GOLDEN / "ops" / "ops.json").read_text())["cases"]
    if "deform" in case["op"]
]

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"].removesuffix(".npz"))
def test_agrees_with_the_official_code(case):
    """The unified models' op and InternImage's own, which differ only in their options."""
    golden, args = np.load(GOLDEN / "ops" / case["file"]), case["args"]
    groups, size = args["groups"], args.get("kernel", args.get("kernel_h"))
    options = {
        "kernel_size": size,
        "stride": args["stride"],
        "dilations": tuple(args["dilations"] if "dilations" in args else [args["dilation"]]),
        "offset_scale": args["offset_scale"],
        "remove_center": bool(args.get("remove_center")),
    }
    assert {dilation * (size // 2) for dilation in options["dilations"][:1]} == {args["pad"]}
    value_name = "value" if "value" in golden else "input"
    names, places = (value_name, "offset", "mask"), golden["out"].shape[1:3]
    batch, height, width, _ = golden[value_name].shape
    shapes = (
        (batch, height, width, groups, -1),
        (batch, *places, groups, size**2 - options["remove_center"], 2),
        (batch, *places, groups, size**2 - options["remove_center"]),
    )
    inputs = [jnp.asarray(golden[n]).reshape(s) for n, s in zip(names, shapes, strict=True)]

    @jax.jit
    def run(cotangent, *inputs):
        out, gradients = jax.vjp(lambda *x: deformable_sampling(*x, **options), *inputs)
        return out, gradients(cotangent.reshape(out.shape))

    out, gradients = run(golden["cotangent"], *inputs)
    close(out, golden["out"])
    for name, gradient in zip(names, gradients, strict=True):
        close(gradient, golden[f"grad_{name}"])


def close(got, want):
    np.testing.assert_allclose(np.asarray(got).reshape(want.shape), want, rtol=1e-5, atol=1e-5)


@jax.jit
@jax.value_and_grad
def sample(position):
    value = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]).reshape(1, 2, 3, 1, 1)
    offset, mask = position.reshape(1, 1, 1, 1, 1, 2), jnp.ones((1, 1, 1, 1, 1))
    return deformable_sampling(value, offset, mask, kernel_size=1).sum()


def sample_at(x, y):
    """[sample, its derivative by x, its derivative by y]"""
    value, gradient = sample(jnp.array([x, y], jnp.float32))
    return [float(value), *gradient.tolist()]


def test_places_between_pixels_and_on_them():
    assert sample_at(0.5, 0.0) == [1.5, 1.0, 10.5]
    assert sample_at(1.0, 0.5) == [9.0, 9.0, 14.0]  # on the lattice: the cell to the right


def test_samples_fade_out_at_the_border_and_are_nothing_beyond():
    assert sample_at(-0.75, 0.0) == [0.25, 1.0, 1.75]
    assert sample_at(2.0, 1.0) == [32.0, -32.0, -32.0]
    for x, y in ((-1.0, 0.0), (0.0, -1.0), (3.0, 0.0), (0.0, 2.0), (-1e9, 0.5), (0.5, 3e38)):
        assert sample_at(x, y) == [0.0, 0.0, 0.0]


def test_without_offsets_and_with_equal_weights_it_is_average_pooling():
    value = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 6, 2, 3)), jnp.float32)
    out = jax.jit(functools.partial(deformable_sampling, kernel_size=3))(
        value, jnp.zeros((1, 5, 6, 2, 9, 2)), jnp.full((1, 5, 6, 2, 9), 1 / 9)
    )
    np.testing.assert_allclose(out[0, 2, 3], value[0, 1:4, 2:5].mean((0, 1)), atol=1e-6)
    corner = value[0, :2, :2].sum((0, 1)) / 9
    np.testing.assert_allclose(out[0, 0, 0], corner, atol=1e-6)


def test_points_must_fit_the_kernel():
    arrays = (jnp.zeros((1, 2, 2, 1, 4)), jnp.zeros((1, 2, 2, 1, 8, 2)), jnp.zeros((1, 2, 2, 1, 8)))
    with pytest.raises(ValueError, match="kernel_size=3 with remove_center=False has 9 points"):
        deformable_sampling(*arrays, kernel_size=3)
    assert deformable_sampling(*arrays, kernel_size=3, remove_center=True).shape == (1, 2, 2, 1, 4)


def test_bfloat16_values_are_sampled_in_float32_and_returned_as_they_came():
    rng = np.random.default_rng(0)
    value, offsets, mask = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((1, 4, 4, 1, 8), (1, 4, 4, 1, 9, 2), (1, 4, 4, 1, 9))
    )
    run = jax.jit(functools.partial(deformable_sampling, kernel_size=3))
    out = run(value, offsets, mask)
    exact = run(*(x.astype(jnp.float32) for x in (value, offsets, mask)))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_training_stores_no_gathered_pixels():
    """Only the inputs are kept for the gradient; the pixels of all points would be far more."""
    shapes = ((1, 16, 16, 2, 16), (1, 16, 16, 2, 9, 2), (1, 16, 16, 2, 9))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    residuals = jax.eval_shape(
        lambda *x: jax.vjp(lambda *y: deformable_sampling(*y, kernel_size=3), *x)[1], *inputs
    )
    stored = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    assert stored <= 1.1 * sum(np.prod(shape) for shape in shapes)
