import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hybrid_flax.layers import relative_position_bias
from pallas.dispatch import UnservedShapeError, choose
from pallas.halo_attention import halo_attention
from pallas.halo_attention.geometry import Halo
from pallas.window_attention import reference, window_attention
from pallas.window_attention.geometry import Windows
from tests.pallas.cases import arrays, differences, distance, kernels, some
from tests.parity import GOLDEN

pytestmark = pytest.mark.usefixtures("strict_dtypes")


# ----------------------------------------------------------------------- against the official code

CASES = json.loads((GOLDEN / "ops" / "ops.json").read_text())["cases"]


def halo(query, key, value, row_table, column_table, args, implementation):
    qkv = jnp.stack([query, key, value], axis=3)
    sizes = {"block": args["block"], "halo": args["halo"]}
    return halo_attention(qkv, row_table, column_table, **sizes, implementation=implementation)


def swin(query, key, value, bias_table, args, implementation):
    qkv = jnp.stack([query, key, value], axis=3)
    bias = relative_position_bias(bias_table, args["window"])
    sizes = {"window": args["window"], "shift": args["shift"]}
    return window_attention(qkv, bias, **sizes, implementation=implementation)


ATTENTIONS = {
    "halo_attention": (halo, ("q", "k", "v", "height_rel", "width_rel")),
    "swin_attention": (swin, ("q", "k", "v", "bias_table")),
}


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case["op"] in ATTENTIONS],
    ids=lambda case: case["file"].removesuffix(".npz"),
)
def test_agrees_with_the_official_code(case, implementation):
    attend, names = ATTENTIONS[case["op"]]
    attend = functools.partial(attend, args=case["args"], implementation=implementation)
    golden = np.load(GOLDEN / "ops" / case["file"])

    @jax.jit
    def run(cotangent, *inputs):
        out, gradients = jax.vjp(attend, *inputs)
        return out, *gradients(cotangent.reshape(out.shape))

    outputs = run(golden["cotangent"], *(golden[name] for name in names))
    wanted = ("out", *(f"grad_{name}" for name in names))
    for got, name in zip(outputs, wanted, strict=True):
        assert distance(got.reshape(golden[name].shape), golden[name]) < 1e-5, name
    if case["op"] == "halo_attention":  # rows that no pair of query and key can reach
        unread = 2 * case["args"]["halo"]
        assert not np.any(outputs[4][:unread])
        assert np.all(np.any(outputs[4][unread:], axis=1))


def test_shift_mask_separates_what_only_rolling_brought_together():
    mask = reference.shift_mask(14, 14, (7, 7), (3, 3))
    assert (mask.shape, mask.dtype, set(mask.ravel())) == ((4, 49, 49), np.float32, {0.0, -100.0})
    assert not mask[0].any()  # the first window has no border inside
    assert (mask[1][0, 3], mask[1][0, 4]) == (0, -100)  # the last columns begin at the fourth
    assert (mask[2][0, 7 * 3], mask[2][0, 7 * 4]) == (0, -100)


def test_the_mask_is_the_official_one():
    for case in CASES:
        golden = np.load(GOLDEN / "ops" / case["file"])
        if case["op"] == "swin_attention" and case["args"]["shift"]:
            args = case["args"]
            window, shift = (args["window"],) * 2, (args["shift"],) * 2
            mask = reference.shift_mask(*golden["q"].shape[1:3], window, shift)
            np.testing.assert_array_equal(mask, golden["attn_mask"])


# ------------------------------------------------------------------------------- unusual shapes

ODD = {
    "one window": (Windows(7, 7, 4, 32, (7, 7), "float32", has_bias=True), 1),
    "one head of 16 channels": (Windows(7, 14, 1, 16, (7, 7), "float32", has_bias=True), 3),
    "heads of 24 channels": (Windows(5, 10, 2, 24, (5, 5), "float32", has_bias=True), 1),
    "heads of 64 channels": (Windows(14, 14, 3, 64, (7, 7), "float32", (3, 3), True), 2),
    "heads of 160 channels": (Windows(4, 8, 2, 160, (4, 4), "float32"), 1),
    "windows of one place": (Windows(3, 3, 2, 32, (1, 1), "float32"), 1),
    "shifted one way": (Windows(8, 8, 2, 16, (4, 4), "float32", (0, 1), True), 1),
    "shifted rectangles": (Windows(6, 12, 4, 32, (3, 4), "float32", (2, 1)), 1),
    "shared query, five heads": (
        Windows(10, 5, 5, 32, (5, 5), "float32", has_bias=True, shared_query=True),
        2,
    ),
    "shared query, shifted": (
        Windows(8, 12, 4, 32, (4, 4), "float32", (2, 1), has_bias=True, shared_query=True),
        2,
    ),
    "tall, all at once": (
        Windows(12, 4, 4, 32, (6, 2), "float32", (0, 0), True, True, True),
        2,
    ),
    "wide, local": (Windows(4, 12, 4, 32, (2, 6), "float32", has_local=True), 1),
    "halo of one block": (Halo(7, 7, 2, 32, 7, 3, "float32"), 1),
    "halo of one": (Halo(8, 12, 3, 24, 4, 1, "float32"), 1),
    "no halo": (Halo(6, 9, 1, 16, 3, 0, "float32"), 2),
    "halo wider than its block": (Halo(6, 6, 8, 32, 3, 5, "float32"), 1),
}


QUICK = {"heads of 24 channels", "shared query, shifted", "wide, local", "halo of one"}


@pytest.mark.parametrize("name", some(ODD, QUICK))
def test_odd_shapes_agree_with_the_definition(name):
    assert max(differences(*ODD[name])) < 1e-5


@pytest.mark.parametrize(
    "geometry",
    [
        Windows(14, 14, 8, 32, (7, 7), "bfloat16", (3, 3), has_bias=True),
        Windows(14, 14, 3, 32, (7, 7), "bfloat16", has_bias=True, shared_query=True),
        pytest.param(
            Windows(14, 14, 4, 32, (14, 14), "bfloat16", has_bias=True), marks=pytest.mark.slow
        ),
        pytest.param(
            Windows(14, 14, 4, 32, (14, 2), "bfloat16", has_local=True), marks=pytest.mark.slow
        ),
        Halo(14, 14, 4, 32, 7, 3, "bfloat16"),
    ],
    ids=["shifted", "shared", "large", "stripes", "halo"],
)
def test_bfloat16_is_near_the_definition_in_float32(geometry):
    assert max(differences(geometry, batch=2)) < 1e-2


def test_rows_whose_neighbours_are_all_masked_keep_their_own_value():
    """Shifted by 1 in windows of 2, the last window is four corners that see only themselves."""
    geometry = Windows(2, 2, 1, 16, (2, 2), "float32", (1, 1))
    qkv, *_ = arrays(geometry, 1)
    for implementation in ("xla", "pallas"):
        out = window_attention(qkv, window=2, shift=1, implementation=implementation)
        np.testing.assert_allclose(out, qkv[:, :, :, 2], rtol=1e-5)


# ----------------------------------------------------------------- under jit, on a mesh, and again


def loss(qkv, bias, implementation="pallas"):
    out = window_attention(qkv, bias, window=7, shift=3, implementation=implementation)
    return (out**2).sum()


@pytest.fixture(scope="module")
def inputs():
    return arrays(Windows(14, 14, 4, 32, (7, 7), "float32", (3, 3), has_bias=True), 8)[:2]


def test_a_mesh_neither_changes_the_gradients_nor_gathers_the_batch(inputs):
    want = jax.jit(jax.grad(loss, argnums=(0, 1)))(*inputs)
    for shape in ((8, 1, 1), (2, 2, 2)):
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        step = jax.jit(
            jax.grad(loss, argnums=(0, 1)),
            in_shardings=(batch, NamedSharding(mesh, PartitionSpec())),
            out_shardings=(batch, NamedSharding(mesh, PartitionSpec())),
        )
        with jax.set_mesh(mesh):
            got, text = step(*inputs), step.lower(*inputs).compile().as_text()
        for one, other in zip(got, want, strict=True):
            assert distance(one, other) < 1e-6
        for line in text.splitlines():
            gathers = "all-gather(" in line or "all-to-all(" in line
            # The bias is small and may move; heads on `tensor` come back together at the end.
            assert not (gathers and "8,14,14" in line), line


def test_checkpoint_and_scan_give_the_same_gradients(inputs):
    qkv, bias = inputs
    want = jax.grad(loss, argnums=1)(qkv, bias)

    @jax.jit
    def accumulated(bias):
        def add(total, part):
            return total + jax.grad(jax.checkpoint(loss), argnums=1)(part, bias), None

        return jax.lax.scan(add, jnp.zeros_like(bias), qkv.reshape(4, 2, *qkv.shape[1:]))[0]

    assert distance(accumulated(bias), want) < 1e-6


# ------------------------------------------------------------------------ what serves what, errors


def test_what_serves_what():
    fits = Windows(56, 56, 4, 32, (7, 7), "bfloat16", (3, 3), has_bias=True)
    large = Windows(24, 24, 24, 32, (24, 24), "bfloat16", has_bias=True)
    tall = Windows(8, 8, 4, 32, (4, 2), "bfloat16", (1, 0))

    def chosen(implementation, platform, geometry):
        return choose(implementation, platform, geometry, kernels(geometry))

    assert chosen("auto", "tpu", fits).kernel == "tpu"
    assert chosen("xla", "tpu", fits).kernel is None
    assert chosen("auto", "cpu", fits).kernel is None
    assert chosen("pallas", "cpu", fits).kernel == "tpu interpreted"
    assert chosen("pallas", "rocm", fits).kernel is None
    assert chosen("auto", "tpu", large).kernel is None
    assert "vector memory" in chosen("auto", "tpu", large).why
    assert chosen("pallas", "tpu", large).kernel == "tpu"
    assert "higher than wide" in chosen("pallas", "tpu", tall).why
    with pytest.raises(ValueError, match="implementation='cuda': expected one of"):
        chosen("cuda", "tpu", fits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": (2, 14, 14, 2, 4, 32)}, "expected [B, H, W, 3, h, d], query, key and value"),
        ({"query": (2, 7, 7, 4, 32)}, "expected [B, H, W, 2, h, d], key and value"),
        ({"qkv": (2, 14, 12, 3, 4, 32)}, "window=(7, 7) does not divide the map of qkv"),
        ({"bias": (4, 49, 48)}, "bias is float32[4, 49, 48]: expected float32 [4, 49, 49]"),
        ({"shift": 7}, "shift=(7, 7): expected from 0 to below window=(7, 7)"),
        ({"window": (7, 7, 7)}, "window=(7, 7, 7): expected a whole number or (height, width)"),
        ({"local_kernel": (3, 3, 4, 16)}, "local_kernel is float32[3, 3, 4, 16]: expected"),
        ({"qkv_dtype": jnp.float16}, "qkv is float16: expected bfloat16 or float32"),
        ({"bias_dtype": jnp.bfloat16}, "bias is bfloat16[4, 49, 49]: expected float32 [4, 49, 49]"),
        (
            {"qkv": (2, 14, 14, 2, 4, 32), "query": (2, 7, 7, 4, 32), "query_dtype": jnp.bfloat16},
            "query is bfloat16[2, 7, 7, 4, 32]: expected float32 [2, 7, 7, 4, 32]",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    shapes = {"qkv": (2, 14, 14, 3, 4, 32), "bias": (4, 49, 49)} | changes
    dtypes = {name: shapes.pop(f"{name}_dtype", jnp.float32) for name in ("qkv", "bias", "query")}
    options = {"window": shapes.pop("window", 7), "shift": shapes.pop("shift", 0)}
    given = {
        name: jnp.zeros(shape, dtypes.get(name, jnp.float32)) for name, shape in shapes.items()
    }
    with pytest.raises(ValueError) as error:
        window_attention(**given, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("block", "halo", "table", "message"),
    [
        (5, 3, 21, "block=5 does not divide the map of qkv (1, 14, 14, 3, 2, 32)"),
        (7, -1, 9, "halo=-1: expected 0 or more places"),
        (7, 3, 24, "row_table is float32[24, 32]: expected float32 [25, 32]"),
    ],
)
def test_what_does_not_fit_a_halo_is_named(block, halo, table, message):
    qkv, table = jnp.zeros((1, 14, 14, 3, 2, 32)), jnp.zeros((table, 32))
    with pytest.raises(ValueError) as error:
        halo_attention(qkv, table, table, block=block, halo=halo)
    assert message in str(error.value)


def tall_and_shifted(qkv):
    return window_attention(qkv, window=(14, 7), shift=(3, 3), implementation="pallas").sum()


def test_a_kernel_that_was_asked_for_is_not_replaced_in_silence():
    qkv = jnp.ones((1, 14, 14, 3, 1, 32))
    message = r"no kernel for platform cpu serves Windows\(.*window=\(14, 7\).*higher than wide"
    for function in (tall_and_shifted, jax.grad(tall_and_shifted)):
        with pytest.raises(UnservedShapeError, match=message):
            jax.jit(function)(qkv)


def test_only_the_platform_that_is_lowered_for_refuses():
    """Float32 is for TPUs, whoever traces it."""
    qkv = jax.ShapeDtypeStruct((1, 14, 14, 3, 1, 32), jnp.float32)
    traced = jax.jit(lambda qkv: window_attention(qkv, window=7, implementation="pallas")).trace(
        qkv
    )
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    with pytest.raises(UnservedShapeError, match="platform cuda .*bfloat16, not float32"):
        traced.lower(lowering_platforms=("cuda",))
