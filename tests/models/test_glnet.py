import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybrid_flax
from hybrid_flax.models import glnet
from hybrid_flax.training.losses import token_labelling
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function, as_training_function
from hybrid_flax.weights.paths import flatten
from tests import reference

TINY = {"num_classes": 7, "image_size": 64, "dim": 32, "depths": (1, 1, 2, 1), "drop_path": 0.5}

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.fixture(scope="module")
def tiny():
    """Token-labelled, with layer scale: between them all there is, but for STL."""
    return reference.model("glnet_4g_tklb", **TINY, layer_scale=1e-4)


@pytest.fixture(scope="module")
def run(tiny):
    """The tiny model, compiled: run(images, …) → (output, batch statistics)."""
    apply = jax.jit(as_training_function(tiny), static_argnames=("method", "train"))
    return functools.partial(apply, bridge.get_weights(tiny))


@pytest.fixture(scope="module")
def stl():
    return reference.model("glnet_stl_paramslot", **TINY)


def images(batch=2, height=64, width=64, seed=0):
    return jnp.asarray(reference.images(seed, (batch, height, width, 3)))


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def paths(name, **overrides):
    model = bridge.abstract(lambda: hybrid_flax.create_model(name, **overrides))
    return flatten(bridge.get_weights(model))


# ------------------------------------------------------------------------------------- variants


def test_list_models():
    assert hybrid_flax.list_models("glnet*") == [
        "glnet_16g", "glnet_4g", "glnet_4g_tklb", "glnet_9g", "glnet_9g_tklb", "glnet_stl",
        "glnet_stl_paramslot",
    ]  # fmt: skip


def test_every_model_says_where_it_comes_from():
    for name in hybrid_flax.list_models("glnet*"):
        info = hybrid_flax.model_info(name)
        assert info.release_file == f"{name}.pth"
        assert info.weights_entry == ("model_ema" if name == "glnet_16g" else None)
        assert info.eval_transform.crop_fraction == (0.96 if "tklb" in name else 0.875)


def test_only_odd_blocks_of_stage_3_and_all_of_stage_4_are_attention():
    model = bridge.abstract(lambda: hybrid_flax.create_model("glnet_4g"))
    kinds = [
        "".join(
            "A" if isinstance(block.mixer, glnet.MapAttention) else "G" for block in stage.blocks
        )
        for stage in model.stages
    ]
    assert kinds == ["GGGG", "GGGG", "GAGAGAGAGAGAGAGAGA", "AAAA"]


def test_what_the_variants_have_and_have_not():
    blocks = {"depths": (1, 1, 1, 1)}
    four, sixteen = paths("glnet_4g", **blocks), paths("glnet_16g", **blocks)
    assert not [path for path in four if "gamma" in path or "token_head" in path]
    assert sum("gamma" in path for path in sixteen) == 2 * 4
    stl, learned = paths("glnet_stl", **blocks), paths("glnet_stl_paramslot", **blocks)
    assert not [path for path in stl if "position" in path or "mlp/depthwise" in path]
    slots = {path: leaf.shape for path, leaf in learned.items() if path not in stl}
    assert slots["params/stages/1/blocks/0/mixer/init_slots"] == (1, 64, 192)
    assert len(slots) == 3


# ------------------------------------------------------------------------------- the whole model


def test_intermediates_are_named(tiny, stl):
    maps = jax.eval_shape(tiny.intermediates, images())
    mix = ["posconv", "slot_logits", "slots", "local", "mlp", "out"]
    attend = ["posconv", "attn", "mlp", "out"]
    assert maps.keys() == {
        "stem", *(f"s1b0_{part}" for part in mix), "stage1",
        "down2", *(f"s2b0_{part}" for part in mix), "stage2",
        "down3", *(f"s3b0_{part}" for part in mix), *(f"s3b1_{part}" for part in attend), "stage3",
        "down4", *(f"s4b0_{part}" for part in attend), "stage4",
        "norm", "pooled", "aux_tokens", "logits",
    }  # fmt: skip
    assert maps["s2b0_slot_logits"].shape == (2, 64, 64)
    assert maps["aux_tokens"].shape == (2, 4, 7)
    assert "s4b0_posconv" not in jax.eval_shape(stl.intermediates, images())


@pytest.mark.parametrize(
    ("height", "width", "grids"),
    [
        (216, 232, [(54, 58), (27, 29), (14, 15), (7, 8)]),
        (33, 1, [(9, 1), (5, 1), (3, 1), (2, 1)]),
    ],
)
def test_every_image_size_is_taken_and_halves_are_rounded_up(tiny, height, width, grids):
    maps = jax.eval_shape(tiny.features, images(1, height, width))
    assert [x.shape for x in maps] == [
        (1, *grid, dim) for grid, dim in zip(grids, (32, 64, 128, 256), strict=True)
    ]


def test_stl_rounds_down_and_needs_32_pixels(stl):
    maps = jax.eval_shape(stl.features, images(1, 216, 232))
    assert [x.shape[1:3] for x in maps] == [(54, 58), (27, 29), (13, 14), (6, 7)]
    with pytest.raises(ValueError, match="images are 31×64, but this GLNet takes .* from 32"):
        stl(images(1, 31, 64))
    with pytest.raises(ValueError, match="image_size=16: this GLNet takes .* from 32"):
        hybrid_flax.create_model("glnet_stl", image_size=16)
    with pytest.raises(ValueError, match=r"must be \[B, H, W, 3\].*\(1, 3, 64, 64\)"):
        stl(jnp.zeros((1, 3, 64, 64)))


def test_evaluation_adds_half_of_the_best_token(tiny, run):
    maps, _ = run(images(), method="intermediates")
    head = {name: np.asarray(x) for name, x in bridge.get_weights(tiny)["params"]["head"].items()}
    pooled = np.asarray(maps["norm"]).mean((1, 2)) @ head["kernel"] + head["bias"]
    want = pooled + 0.5 * np.asarray(maps["aux_tokens"]).max(1)
    np.testing.assert_allclose(maps["logits"], want, rtol=1e-4, atol=1e-4)


def test_images_do_not_see_each_other_in_evaluation(run):
    first, second = images(2, seed=0), images(2, seed=1)
    mixed, _ = run(jnp.stack([first[0], second[1]]), method="intermediates")
    for i, batch in enumerate((first, second)):
        alone, _ = run(batch, method="intermediates")
        np.testing.assert_allclose(mixed["logits"][i], alone["logits"][i], rtol=1e-4, atol=1e-4)


def test_bfloat16_computes_close_to_float32_and_returns_float32(tiny, run):
    arguments = TINY | {"layer_scale": 1e-4, "dtype": jnp.bfloat16}
    half = bridge.abstract(lambda: hybrid_flax.create_model("glnet_4g_tklb", **arguments))
    apply = as_function(half)
    with jax.numpy_dtype_promotion("standard"):  # Flax's LayerNorm mixes dtypes on purpose
        maps = jax.jit(lambda p, x: apply(p, x, method="intermediates"))(
            bridge.get_weights(tiny), images()
        )
    float32 = {"logits", "pooled", "aux_tokens"} | {f"s{i}b0_slot_logits" for i in (1, 2, 3)}
    assert {name for name, x in maps.items() if x.dtype == jnp.float32} == float32
    logits = run(images(), method="intermediates")[0]["logits"]
    assert np.linalg.norm(maps["logits"] - logits) < 0.03 * np.linalg.norm(logits)


# ------------------------------------------------------------------------------------- training


def test_training_drops_paths_by_key_and_moves_statistics(tiny, run):
    batch = images()
    with pytest.raises(ValueError, match="train=True needs key="):
        tiny(batch, train=True)
    first, statistics = run(batch, train=True, key=jax.random.key(0))
    again, _ = run(batch, train=True, key=jax.random.key(0))
    np.testing.assert_array_equal(first["logits"], again["logits"])
    other, _ = run(batch, train=True, key=jax.random.key(1))
    assert np.linalg.norm(first["logits"] - other["logits"]) > 0.1
    before = flatten(bridge.get_weights(tiny)["batch_stats"])
    after = flatten(statistics)
    assert len(after) == 3 * (2 + 3 + 1)  # stem, transitions, final norm
    assert all(np.any(after[path] != before[path]) for path in before)


@pytest.mark.parametrize("blocks", [("G", "G", "GX", "A"), ("G", "", "GA", "A")])
def test_unknown_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match=r"blocks=\('G', .* letters G \(GLMix\) and A"):
        hybrid_flax.create_model("glnet_4g", blocks=blocks)


def test_drop_path_rates_rise_linearly_over_all_blocks(tiny):
    rates = [block.drop_path_rate for stage in tiny.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.5, 5))


def test_token_labelled_training_gives_every_token_back_to_its_image():
    """A box as large as the map swaps the images altogether, and back after the classifier."""
    model = reference.model("glnet_4g_tklb", **TINY | {"drop_path": 0.0, "depths": (1, 1, 1, 1)})
    outputs = []
    for box in ((0, 0, 0, 0), (0, 2, 0, 2), (0, 1, 0, 2)):
        with mock.patch.object(glnet.model, "mix_token_box", return_value=box):
            run = jax.jit(as_function(model), static_argnames="train")
            weights, batch = bridge.get_weights(model), images(4)
            outputs.append(run(weights, batch, train=True, key=jax.random.key(0)))
    clean, swapped, half = outputs
    assert [output["mixed"] for output in outputs] == [0, 1, 0.5]
    assert clean["token_logits"].shape == (4, 4, 7)
    close = {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(swapped["token_logits"], clean["token_logits"], **close)
    np.testing.assert_allclose(swapped["logits"], clean["logits"][::-1], **close)
    assert np.linalg.norm(clean["logits"] - clean["logits"][::-1]) > 1
    assert np.linalg.norm(half["logits"] - clean["logits"]) > 1
    targets = jax.nn.softmax(normal(0, (4, 7)))
    tokens = jnp.repeat(targets[:, None], 4, axis=1)
    losses = [token_labelling(output, targets, tokens, 0.5) for output in (clean, swapped)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_the_box_is_taken_from_the_mirrored_image():
    x = jnp.broadcast_to(jnp.arange(3.0)[:, None, None, None], (3, 4, 6, 1))
    swapped = glnet.swap_box(x, (0, 1, 1, 3), stride=2)
    want = np.asarray(x).copy()
    want[0, 0:2, 2:6], want[2, 0:2, 2:6] = 2, 0
    np.testing.assert_array_equal(swapped, want)
    np.testing.assert_array_equal(glnet.swap_box(swapped, (0, 2, 2, 6)), x)
    traced = jax.jit(lambda box: glnet.swap_box(x, box, stride=2))((0, 1, 1, 3))
    np.testing.assert_array_equal(traced, want)


def test_boxes_are_drawn_as_cutmix_draws_them():
    keys = jax.random.split(jax.random.key(0), 4000)
    boxes = jax.jit(jax.vmap(lambda key: jnp.stack(glnet.mix_token_box(key, 7, 9))))(keys)
    row0, row1, column0, column1 = np.asarray(boxes).T
    assert (row0.min(), row1.max(), column0.min(), column1.max()) == (0, 7, 0, 9)
    rows, columns = row1 - row0, column1 - column0
    assert (rows >= 0).all()
    inside = (row0 > 0) & (row1 < 7)
    assert set(rows[inside] % 2) == {0}  # a side of 5 gives 4
    random = np.random.default_rng(0)
    side = np.sqrt(1 - random.beta(1, 1, 100_000))
    area = 1.0
    for size in (7, 9):
        half, centre = (size * side).astype(int) // 2, random.integers(0, size, len(side))
        area = area * (np.clip(centre + half, 0, size) - np.clip(centre - half, 0, size))
    assert (rows * columns).mean() == pytest.approx(area.mean(), rel=0.04)
    assert (rows * columns == 0).mean() == pytest.approx((area == 0).mean(), abs=0.02)


def test_token_labelled_training_refuses_sizes_without_a_whole_grid(tiny):
    with pytest.raises(ValueError, match="images are 64×80, .* only multiples of 32"):
        tiny(images(2, 64, 80), train=True, key=jax.random.key(0))


# ---------------------------------------------------------------------------------------- GLMix


def mix(x, entered):
    """A GLMix with slots that matter: (branch, named maps)."""
    variant = hybrid_flax.model_variant("glnet_4g")
    module = glnet.GLMix(32, variant, dtype=jnp.float32, rngs=nnx.Rngs(0))
    module.slot_scale[...] = jnp.asarray(8.0)
    return jax.jit(as_function(module))(bridge.get_weights(module), x, entered)


def test_cosine_similarity_and_its_gradient_at_zero():
    slots, pixels = normal(0, (2, 3, 8)), normal(1, (2, 5, 8))
    a, b = np.asarray(slots), np.asarray(pixels)
    lengths = np.linalg.norm(a, axis=-1)[:, :, None] * np.linalg.norm(b, axis=-1)[:, None]
    want = np.einsum("bsc,blc->bsl", a, b) / lengths
    np.testing.assert_allclose(glnet.cosine_similarity(slots, pixels), want, atol=1e-6)
    zero = jnp.zeros((1, 1, 8))
    gradient = jax.grad(lambda x: glnet.cosine_similarity(x, x).sum())(zero)
    np.testing.assert_array_equal(gradient, 0)


def test_slots_start_from_the_map_that_entered():
    x, entered = normal(0, (1, 14, 12, 32)), normal(1, (1, 14, 12, 32))
    _, maps = mix(x, entered)
    first = np.asarray(entered)[0, 0:2, 0:2].mean((0, 1))  # overlapping bins, the first of 8×8
    pixel = np.asarray(x)[0, 3, 5]
    cosine = first @ pixel / np.linalg.norm(first) / np.linalg.norm(pixel)
    assert maps["slot_logits"].shape == (1, 64, 14 * 12)
    np.testing.assert_allclose(maps["slot_logits"][0, 0, 3 * 12 + 5], 8 * cosine, rtol=1e-4)


def test_one_similarity_gathers_and_dispatches():
    x, entered = normal(0, (1, 9, 9, 32)), normal(1, (1, 9, 9, 32))
    with mock.patch.object(glnet.MultiHeadAttention, "__call__", lambda self, slots: slots):
        branch, maps = mix(x, entered)
    logits = np.asarray(maps["slot_logits"])[0]
    gather, dispatch = np.exp(logits), np.exp(logits)
    gather /= gather.sum(1, keepdims=True)
    dispatch /= dispatch.sum(0, keepdims=True)
    want = dispatch.T @ (gather @ np.asarray(x).reshape(81, 32))
    got = np.asarray(branch - maps["local"]).reshape(81, 32)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_learned_slots_are_the_same_for_every_image(stl):
    mix = stl.stages[0].blocks[0].mixer
    x = normal(0, (2, 8, 8, 32))
    first, _ = mix(x, x)
    second, _ = mix(x, -x)
    np.testing.assert_array_equal(first, second)


# -------------------------------------------------------------------------------- initial values


@pytest.mark.slow
def test_initial_values():
    def init():
        rngs = nnx.Rngs(jax.random.key(1, impl="unsafe_rbg"))  # which compiles fastest
        small = TINY | {"depths": (1, 1, 1, 1), "num_classes": 100, "layer_scale": 1e-4}
        model = hybrid_flax.create_model("glnet_4g_tklb", **small, rngs=rngs)
        return bridge.get_weights(model)

    flat = {path: np.asarray(leaf) for path, leaf in flatten(jax.jit(init)()).items()}
    block, last = "params/stages/0/blocks/0", "params/stages/3/blocks/0"
    assert flat[f"{block}/mixer/slot_scale"] == pytest.approx(32**-0.5)
    assert (flat[f"{block}/mixer/map_gamma"] == np.float32(1e-4)).all()
    qkv = flat[f"{last}/mixer/attn/qkv/kernel"]
    assert np.abs(qkv).max() == pytest.approx(np.sqrt(6 / (4 * 256)), rel=0.01)
    assert not flat[f"{last}/mixer/attn/qkv/bias"].any()
    assert np.std(flat[f"{last}/mixer/attn/proj/kernel"]) == pytest.approx(0.02, rel=0.05)
    for name, fan_in in (("mlp/expand", 256), ("mlp/depthwise", 9), ("position", 9)):
        for leaf in ("kernel", "bias"):
            bound = np.abs(flat[f"{last}/{name}/{leaf}"]).max()
            assert bound == pytest.approx(fan_in**-0.5, rel=0.05)
    assert np.std(flat["params/head/kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.abs(flat["params/token_head/kernel"]).max() == pytest.approx(1 / 16, rel=0.01)
    assert np.abs(flat["params/token_head/bias"]).max() == pytest.approx(1 / 16, rel=0.1)
    assert not flat["params/head/bias"].any()
    kernels = [leaf.tobytes() for path, leaf in flat.items() if path.endswith("kernel")]
    assert len(set(kernels)) == len(kernels)  # no two parameters share a random key


def test_stl_ends_with_plain_transformer_blocks():
    flat = paths("glnet_stl", **TINY)
    names = {
        path.removeprefix("params/stages/3/blocks/0/")
        for path in flat
        if "/stages/3/blocks" in path
    }
    assert names == {
        f"{layer}/{leaf}"
        for layer, leaves in {
            "norm1": ("scale", "bias"), "mixer/attn/qkv": ("kernel", "bias"),
            "mixer/attn/proj": ("kernel", "bias"), "norm2": ("scale", "bias"),
            "mlp/fc1": ("kernel", "bias"), "mlp/fc2": ("kernel", "bias"),
        }.items()
        for leaf in leaves
    }  # fmt: skip
