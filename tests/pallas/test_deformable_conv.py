"""Deformable sampling: the definition against the official code, the kernels against it."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from pallas.deformable_conv import deformable_sampling, gpu, tpu
from pallas.deformable_conv.geometry import Sampling
from pallas.dispatch import choose
from tests.pallas.cases import (
    DETECTION,
    arrays,
    definition,
    differences,
    distance,
    kernels,
    model_geometries,
    out_shape,
    some,
)
from tests.parity import GOLDEN

CASES = [
    case
    for case in json.loads((GOLDEN / "ops" / "ops.json").read_text())["cases"]
    if "deform" in case["op"]
]

IMPLEMENTATIONS = ("xla", "pallas")

pytestmark = pytest.mark.usefixtures("strict_dtypes")


# ----------------------------------------------------------------------- against the official code


def official_cases():
    """(case, implementation): the definition with all, the kernels with one that is quick."""
    for case in CASES:
        name = case["file"].removesuffix(".npz")
        for implementation in IMPLEMENTATIONS:
            slow = implementation == "pallas" and name != "stm_deform_0"
            marks = pytest.mark.slow if slow else ()
            yield pytest.param(case, implementation, id=f"{name}-{implementation}", marks=marks)


@pytest.mark.parametrize(("case", "implementation"), list(official_cases()))
def test_agrees_with_the_official_code(case, implementation):
    """The unified models' op and InternImage's own, which differ only in their options."""
    golden, args = np.load(GOLDEN / "ops" / case["file"]), case["args"]
    groups, size = args["groups"], args.get("kernel", args.get("kernel_h"))
    options = {
        "kernel_size": size,
        "stride": args["stride"],
        "dilations": tuple(args["dilations"] if "dilations" in args else [args["dilation"]]),
        "offset_scale": args["offset_scale"],
        "remove_center": bool(args.get("remove_center")),
        "implementation": implementation,
    }
    if len(options["dilations"]) == 1:
        options["padding"] = args["pad"]
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


# ---------------------------------------------------------------------------- what it is defined as


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def sample_at(request):
    """(x, y) → [sample, its derivative by x, its derivative by y]"""

    @jax.jit
    @jax.value_and_grad
    def sample(position):
        value = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]).reshape(1, 2, 3, 1, 1)
        first = (0, 0, 0, 0, 0)  # the only place that counts
        offsets = jnp.zeros((1, 2, 3, 1, 1, 2)).at[first].set(position)
        mask = jnp.zeros((1, 2, 3, 1, 1)).at[first].set(1.0)
        options = {"kernel_size": 1, "implementation": request.param}
        return deformable_sampling(value, offsets, mask, **options).sum()

    def sample_at(x, y):
        value, gradient = sample(jnp.array([x, y], jnp.float32))
        return [float(value), *gradient.tolist()]

    return sample_at


def test_places_between_pixels_and_on_them(sample_at):
    assert sample_at(0.5, 0.0) == [1.5, 1.0, 10.5]
    assert sample_at(1.0, 0.5) == [9.0, 9.0, 14.0]  # on the lattice: the cell to the right


def test_samples_fade_out_at_the_border_and_are_nothing_beyond(sample_at):
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


def test_gradients_are_those_of_finite_differences():
    """Between pixels, of the definition, which the kernels are held to."""
    geometry = Sampling(4, 5, 4, 5, 1, 2, 3, "float32")
    value, offsets, mask = arrays(geometry, 1)
    offsets = jnp.round(offsets) + 0.3 + 0.4 * jax.nn.sigmoid(offsets)
    bounds = {"eps": 1e-2, "atol": 1e-2, "rtol": 1e-2}
    function = jax.jit(definition(geometry))
    check_grads(function, (value, offsets, mask), order=1, modes="rev", **bounds)


def test_the_centre_feature_scale_mixes_in_the_place_itself():
    geometry = Sampling(4, 5, 4, 5, 2, 8, 3, "float32")
    inputs, share = arrays(geometry, 1), jnp.linspace(0, 1, 40).reshape(1, 4, 5, 2)
    plain = deformable_sampling(*inputs, kernel_size=3)
    mixed = deformable_sampling(*inputs, kernel_size=3, center_scale=share)
    want = plain * (1 - share[..., None]) + inputs[0] * share[..., None]
    np.testing.assert_allclose(mixed, want, atol=1e-6)
    halves = (x.astype(jnp.bfloat16) for x in inputs)
    mixed = deformable_sampling(*halves, kernel_size=3, center_scale=share.astype(jnp.bfloat16))
    assert mixed.dtype == jnp.bfloat16
    assert distance(mixed, want) < 1e-2


# ------------------------------------------------------------------- kernels against the definition

ODD = {
    "offsets far outside": Sampling(13, 20, 13, 20, 1, 16, 3, "float32", offset_scale=30.0),
    "strided": Sampling(11, 8, 6, 4, 4, 4, 3, "float32", stride=2, padding=1, offset_scale=0.5),
    "padded and dilated": Sampling(9, 8, 13, 12, 1, 16, 5, "float32", padding=6, dilations=(2,)),
    "even kernel": Sampling(6, 7, 5, 6, 2, 8, 2, "float32", padding=0),
    "without centre": Sampling(8, 7, 8, 7, 2, 8, 3, "float32", remove_center=True),
    "two dilations": Sampling(6, 5, 6, 5, 4, 4, 3, "float32", dilations=(1, 2), offset_scale=0.5),
    "one pixel": Sampling(1, 1, 1, 1, 1, 1, 3, "float32"),
    "groups that fill no register": Sampling(5, 9, 5, 9, 10, 24, 3, "float32"),
    "groups of two registers": Sampling(5, 4, 5, 4, 2, 160, 3, "float32"),
    "more columns than a register has lanes": Sampling(3, 140, 3, 140, 1, 8, 2, "float32"),
    "130 places": Sampling(10, 13, 10, 13, 1, 16, 3, "float32"),
}


QUICK = {"offsets far outside", "strided", "two dilations"}


@pytest.mark.parametrize("name", some(ODD, QUICK))
def test_kernels_agree_with_the_definition(name):
    assert max(differences(ODD[name], batch=2)) < 1e-5


@pytest.mark.parametrize("name", some(["offsets far outside", "strided"], ["strided"]))
def test_maps_are_cut_into_bands_that_fit(name, monkeypatch):
    geometry = ODD[name]
    room = tpu.Kernel(geometry).vmem_bytes() - 1
    monkeypatch.setattr(tpu, "BUDGETS", (room, room))
    assert tpu.Kernel(geometry).bands > 1
    assert max(differences(geometry, batch=2)) < 1e-5


def test_bfloat16_is_near_the_definition_in_float32():
    assert max(differences(Sampling(14, 14, 14, 14, 8, 16, 3, "bfloat16"))) < 1e-2


@pytest.mark.slow
def test_every_shape_of_the_models_agrees_with_the_definition():
    geometries = model_geometries("unified_internimage_*")
    for geometry in geometries:
        trained = dataclasses.replace(geometry, dtype="bfloat16")
        assert choose("auto", "tpu", trained, kernels(trained)).kernel == "tpu", geometry
    # All groups do the same.
    single = {dataclasses.replace(geometry, groups=1) for geometry in geometries}
    assert {geometry.height for geometry in single} == {56, 28, 14, 7}
    wrong = {geometry: found for geometry in single if max(found := differences(geometry)) > 1e-5}
    assert not wrong


@pytest.mark.parametrize("module", [tpu, gpu], ids=lambda module: module.__name__)
def test_masks_and_offsets_that_are_not_numbers(module):
    """Zero masks hide what they weigh; points that are nowhere count as nothing, as defined."""
    geometry = Sampling(7, 7, 7, 7, 2, 16, 3, "float32")
    value, offsets, mask = arrays(geometry, 1)
    offsets = offsets.at[0, 3, 3, 0, 4].set(jnp.nan).at[0, 2, 2, 1, 0].set(jnp.inf)
    forward = jax.jit(functools.partial(module.forward, geometry, interpret=True))
    backward = jax.jit(functools.partial(module.backward, geometry, interpret=True))
    for given in (mask, jnp.zeros_like(mask)):
        inputs = value, offsets, given
        out, *grads = forward(*inputs), *backward(*inputs, jnp.ones_like(value))
        assert all(jnp.isfinite(x).all() for x in (out, *grads))
        np.testing.assert_allclose(out, definition(geometry)(*inputs), atol=1e-5)


# The Hopper kernels' programs, with XLA's loads and stores in the place of their own.


@pytest.mark.parametrize(
    "name",
    some(
        ["offsets far outside", "without centre", "groups that fill no register", "130 places"],
        ["without centre"],
    ),
)
def test_hopper_kernels_agree_with_the_definition(name):
    assert max(differences(ODD[name], batch=2, target="gpu")) < 1e-5


def test_hopper_kernels_know_strides_and_dilations():
    strided = Sampling(13, 8, 5, 3, 2, 8, 2, "float32", stride=3, padding=2, offset_scale=4.0)
    dilated = Sampling(6, 5, 6, 5, 4, 8, 2, "float32", dilations=(1, 3), offset_scale=0.5)
    for geometry in (strided, dilated):
        assert max(differences(geometry, target="gpu")) < 1e-5


@pytest.mark.slow
def test_shapes_of_the_models_agree_on_hopper():
    """A middle stage at 224 pixels, and a detector's last; all groups do the same."""
    for height, width in ((28, 28), (25, 42)):
        geometry = Sampling(*(height, width) * 2, 1, 16, 3, "float32")
        assert max(differences(geometry, target="gpu")) < 1e-5, geometry


def test_hopper_kernels_serve_the_models_at_every_size():
    for size in ((224, 224), DETECTION):
        for geometry in model_geometries("unified_internimage_micro", size):
            for dtype in ("bfloat16", "float32"):
                assert gpu.refusal(dataclasses.replace(geometry, dtype=dtype)) is None


def test_hopper_kernels_refuse_what_their_addresses_do_not_reach():
    geometry = Sampling(56, 56, 56, 56, 7, 16, 3, "bfloat16")
    shapes = (jax.ShapeDtypeStruct((6200, *x.shape[1:]), x.dtype) for x in arrays(geometry, 1))
    with pytest.raises(ValueError, match=r"value \[6200, .* Take a smaller batch per device"):
        jax.eval_shape(functools.partial(gpu.forward, geometry), *shapes)


@pytest.mark.slow
def test_bfloat16_on_hopper_is_near_the_definition_in_float32():
    geometry = Sampling(14, 14, 14, 14, 8, 16, 3, "bfloat16")
    assert max(differences(geometry, target="gpu")) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU of Hopper's kind")
@pytest.mark.parametrize("name", [name for name in ODD if gpu.refusal(ODD[name]) is None])
def test_on_a_gpu(name):
    geometry = ODD[name]
    inputs = arrays(geometry, 2)
    out_grad = jax.random.normal(jax.random.key(0), out_shape(geometry, 2))

    def both(interpret):
        forward, backward = (
            functools.partial(f, geometry, *inputs, interpret=interpret)
            for f in (gpu.forward, gpu.backward)
        )
        return forward(), *backward(out_grad)

    for one, again, other in zip(both(False), both(False), both(True), strict=True):
        np.testing.assert_array_equal(one, again)
        assert distance(one, other) < 1e-5


# ----------------------------------------------------------------- under jit, on a mesh, and again


def loss(value, offsets, mask, implementation="pallas"):
    out = deformable_sampling(value, offsets, mask, kernel_size=3, implementation=implementation)
    return (out**2).sum()


@pytest.fixture(scope="module")
def inputs():
    return arrays(Sampling(7, 7, 7, 7, 2, 16, 3, "float32"), 8)


def test_a_mesh_neither_changes_the_gradients_nor_gathers_the_batch(inputs):
    gradients = jax.grad(loss, argnums=(0, 1, 2))
    want = jax.jit(gradients)(*inputs)
    for shape in ((8, 1, 1), (2, 2, 2)):
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        step = jax.jit(gradients, in_shardings=batch, out_shardings=batch)
        with jax.set_mesh(mesh):
            got, text = step(*inputs), step.lower(*inputs).compile().as_text()
        for one, other in zip(got, want, strict=True):
            assert distance(one, other) < 1e-6
        for line in text.splitlines():
            gathers = "all-gather(" in line or "all-to-all(" in line
            assert not (gathers and "8,7,7" in line), line


def test_dilations_that_differ_are_not_mixed_up_on_a_mesh():
    geometry = Sampling(6, 5, 6, 5, 4, 4, 3, "float32", dilations=(1, 2, 3))
    inputs, options = arrays(geometry, 1), {"kernel_size": 3, "dilations": (1, 2, 3)}
    mesh = jax.make_mesh((1, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        out = deformable_sampling(*inputs, **options, implementation="pallas")
    assert distance(out, definition(geometry)(*inputs)) < 1e-6


def test_a_second_run_gives_the_same_bits_and_checkpoint_the_same_numbers(inputs):
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    again = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2)))
    for one, two, three in zip(step(*inputs), step(*inputs), again(*inputs), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, three, rtol=0, atol=1e-6)  # fused otherwise


@pytest.mark.parametrize(("platform", "calls"), [("tpu", 2), ("cuda", 3)])
def test_nothing_is_gathered_or_scattered(platform, calls):
    geometry = Sampling(14, 14, 14, 14, 2, 16, 3, "bfloat16")
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    export = jax.export.export(step, platforms=[platform], disabled_checks=unchecked)
    text = export(*arrays(geometry, 8)).mlir_module()
    assert len(re.findall(r"custom_call @(tpu_custom_call|mosaic_gpu)", text)) == calls
    assert "stablehlo.scatter" not in text
    assert "stablehlo.gather" not in text


# ------------------------------------------------------------------------ what serves what, errors


def test_what_serves_what():
    fits = Sampling(56, 56, 56, 56, 7, 16, 3, "bfloat16")
    large = Sampling(200, 336, 200, 336, 7, 16, 3, "bfloat16")  # a detector's

    def chosen(implementation, platform, geometry):
        return choose(implementation, platform, geometry, kernels(geometry))

    assert chosen("auto", "tpu", fits).kernel == "tpu"
    assert chosen("auto", "cuda", fits).kernel is None
    assert "not yet measured" in chosen("auto", "cuda", fits).why
    assert chosen("pallas", "cuda", large).kernel == "gpu"
    wide = dataclasses.replace(fits, channels=20)
    assert chosen("pallas", "cuda", wide).why == (
        "groups of 20 channels: expected a multiple of 8, 32 at most"
    )
    assert chosen("pallas", "cpu", fits).kernel == "tpu interpreted"
    assert chosen("auto", "tpu", large).kernel == "tpu"
    wide = dataclasses.replace(large, width=3360, out_width=3360)
    assert "does not fit into a core's vector memory" in chosen("auto", "tpu", wide).why


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"value": (1, 2, 2, 4)}, {}, "value has shape (1, 2, 2, 4): expected [B, H, W, groups,"),
        ({"offsets": (1, 2, 2, 1, 18)}, {}, "offsets has shape (1, 2, 2, 1, 18): expected [B, Ho,"),
        (
            {"offsets": (1, 2, 2, 1, 8, 2)},
            {},
            "offsets is float32[1, 2, 2, 1, 8, 2]: expected floating point [1, 2, 2, 1, 9, 2], to "
            "fit value [1, 2, 2, 1, 4] and the 9 points of kernel_size=3 with remove_center=False",
        ),
        (
            {"offsets": (1, 2, 3, 1, 9, 2)},
            {},
            "offsets has shape (1, 2, 3, 1, 9, 2), for (2, 3) places: expected (2, 2) for the map",
        ),
        ({}, {"padding": 0}, "expected (0, 0) for the map of value (1, 2, 2, 1, 4), with kernel_"),
        ({"mask": (1, 2, 2, 9)}, {}, "mask is float32[1, 2, 2, 9]: expected floating point"),
        ({}, {"kernel_size": 0}, "kernel_size=0, stride=1, dilations=(1,): expected a kernel"),
        ({}, {"remove_center": True}, "the 8 points of kernel_size=3 with remove_center=True"),
        ({}, {"center_scale": jnp.ones((1, 2, 2))}, "center_scale has shape (1, 2, 2): expected"),
        ({}, {"implementation": "cuda"}, "implementation='cuda': expected one of"),
    ],
)
def test_errors_name_what_does_not_fit(shapes, options, message):
    known = {"value": (1, 2, 2, 1, 4), "offsets": (1, 2, 2, 1, 9, 2), "mask": (1, 2, 2, 1, 9)}
    arrays = {name: jnp.zeros(shape) for name, shape in (known | shapes).items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        deformable_sampling(**arrays, **{"kernel_size": 3, **options})


def test_values_of_other_types_are_refused():
    arrays = jnp.zeros((1, 2, 2, 1, 4), jnp.float16), jnp.zeros((1, 2, 2, 1, 9, 2))
    with pytest.raises(ValueError, match="value is float16: expected bfloat16 or float32"):
        deformable_sampling(*arrays, jnp.zeros((1, 2, 2, 1, 9)), kernel_size=3)
