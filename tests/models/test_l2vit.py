import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybrid_flax
from hybrid_flax import layers
from hybrid_flax.models import l2vit
from hybrid_flax.weights import bridge
from hybrid_flax.weights.class_map import read_class_map, select_classes
from hybrid_flax.weights.functions import as_function, as_training_function
from hybrid_flax.weights.paths import flatten, unflatten
from tests import reference

TINY = {"num_classes": 7, "image_size": 64, "dim": 32, "depths": (2, 1, 2, 1), "drop_path": 0.5}
SHALLOW = TINY | {"depths": (1, 1, 1, 1)}

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.fixture(scope="module")
def tiny():
    return reference.model("l2vit_t", **TINY)


@pytest.fixture(scope="module")
def run(tiny):
    """The tiny model, compiled: run(images, …) → (output, batch statistics)."""
    apply = jax.jit(as_training_function(tiny), static_argnames=("method", "train"))
    return functools.partial(apply, bridge.get_weights(tiny))


def images(batch=2, height=64, width=64, seed=0):
    return jnp.asarray(reference.images(seed, (batch, height, width, 3)))


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_list_models():
    assert hybrid_flax.list_models("l2vit*") == ["l2vit_b", "l2vit_b_384", "l2vit_s", "l2vit_t"]


def test_window_and_image_size_change_no_weight():
    shapes = [
        jax.tree.map(jnp.shape, bridge.get_weights(bridge.abstract(functools.partial(
            hybrid_flax.create_model, name
        )))) for name in ("l2vit_b", "l2vit_b_384")
    ]  # fmt: skip
    assert shapes[0] == shapes[1]
    windows = [hybrid_flax.model_variant(name).window for name in ("l2vit_b", "l2vit_b_384")]
    assert windows == [7, 12]


def test_every_model_says_where_it_comes_from():
    for name in hybrid_flax.list_models("l2vit*"):
        info = hybrid_flax.model_info(name)
        assert info.download_url.endswith(f"/releases/download/v1.0/{info.release_file}")
        assert info.licence == "MIT"
    info = hybrid_flax.model_info("l2vit_b_384")
    assert (info.image_size, info.eval_transform.crop_mode) == (384, "squash")


def test_intermediates_are_named(tiny):
    maps = jax.eval_shape(tiny.intermediates, images())
    assert maps.keys() == {
        "stem", "stage1_block1", "stage1_block2", "stage1",
        "down2", "stage2_block1", "stage2",
        "down3", "stage3_block1", "stage3_block2", "stage3",
        "down4", "stage4_block1", "stage4", "norm", "pooled", "logits",
    }  # fmt: skip
    assert maps["down3"].shape == (2, 4, 4, 128)
    assert (maps["logits"].shape, maps["logits"].dtype) == ((2, 7), jnp.float32)


@pytest.mark.parametrize(
    ("height", "width", "grids"),
    [
        (201, 246, [(51, 62), (26, 31), (13, 16), (7, 8)]),
        (33, 47, [(9, 12), (5, 6), (3, 3), (2, 2)]),
        (1, 5, [(1, 2), (1, 1), (1, 1), (1, 1)]),
    ],
)
def test_every_image_size_is_taken(tiny, height, width, grids):
    maps = jax.eval_shape(tiny.features, images(1, height, width))
    assert [x.shape for x in maps] == [
        (1, *grid, dim) for grid, dim in zip(grids, (32, 64, 128, 256), strict=True)
    ]


def test_channels_first_and_sizes_below_one_are_refused(tiny):
    with pytest.raises(ValueError, match=r"must be \[B, H, W, 3\].*\(1, 3, 64, 64\)"):
        tiny(jnp.zeros((1, 3, 64, 64)))
    with pytest.raises(ValueError, match="image_size=0: expected a whole number from 1"):
        hybrid_flax.create_model("l2vit_t", image_size=0)


def test_images_do_not_see_each_other_in_evaluation(run):
    first, second = images(2, seed=0), images(2, seed=1)
    mixed, _ = run(jnp.stack([first[0], second[1]]))
    np.testing.assert_allclose(mixed[0], run(first)[0][0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], run(second)[0][1], atol=1e-5)


def test_training_drops_paths_by_key_and_moves_statistics(tiny, run):
    batch = images()
    with pytest.raises(ValueError, match="train=True needs key="):
        tiny(batch, train=True)
    first, statistics = run(batch, train=True, key=jax.random.key(0))
    np.testing.assert_array_equal(first, run(batch, train=True, key=jax.random.key(0))[0])
    other, _ = run(batch, train=True, key=jax.random.key(1))
    assert np.linalg.norm(first - other) > 0.1 * np.linalg.norm(first)

    before = flatten(bridge.get_weights(tiny)["batch_stats"])
    after = flatten(statistics)
    assert len(after) == 3 * (2 + 2)  # two norms in the stem, one in each linear block
    assert all(np.any(after[path] != before[path]) for path in before)
    evaluated, statistics = run(batch)
    np.testing.assert_array_equal(evaluated, run(batch, key=jax.random.key(0))[0])
    for path, leaf in flatten(statistics).items():
        np.testing.assert_array_equal(leaf, before[path])


def test_drop_path_rates_rise_linearly_over_all_blocks(tiny):
    rates = [block.drop_path_rate for stage in tiny.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.5, 6))


def test_drop_path_spares_the_position_convolutions():
    block = l2vit.WindowBlock(32, 7, 1 - 1e-7, "auto", dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = normal(0, (1, 7, 7, 32))
    run = jax.jit(as_function(block), static_argnames="train")
    got = run(bridge.get_weights(block), x, train=True, key=jax.random.key(0))
    y = x + block.position1(x)
    np.testing.assert_allclose(got, y + block.position2(y), atol=1e-6)


def test_bfloat16_computes_close_to_float32_and_returns_float32(tiny, run):
    half = bridge.abstract(lambda: hybrid_flax.create_model("l2vit_t", **TINY, dtype=jnp.bfloat16))
    apply = as_function(half)
    with jax.numpy_dtype_promotion("standard"):  # Flax's LayerNorm mixes dtypes on purpose
        maps = jax.jit(lambda p, x: apply(p, x, method="intermediates"))(
            bridge.get_weights(tiny), images()
        )
    assert maps["logits"].dtype == jnp.float32
    assert {maps[f"stage{i}"].dtype for i in range(1, 5)} == {jnp.dtype("bfloat16")}
    logits, _ = run(images())
    assert np.linalg.norm(maps["logits"] - logits) < 0.03 * np.linalg.norm(logits)


# ------------------------------------------------------------------------------------ attention


def test_linear_attention_is_a_weighted_mean_of_the_values_times_the_temperature():
    query, key, value = (60 * normal(seed, (2, 5, 3, 8)) for seed in range(3))
    temperature = jnp.asarray([0.5, 1.0, 2.0]).reshape(3, 1, 1)
    weights = np.einsum("bnhd,bmhd->bhnm", np.maximum(query, 0), np.maximum(key, 0))
    totals = weights.sum(-1, keepdims=True)
    assert totals.min() > 100
    want = np.einsum("bhnm,bmhe->bnhe", weights / totals, value) * np.asarray(temperature[:, 0])
    got = l2vit.linear_attention(query, key, value, temperature)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-4)


def test_below_the_floor_of_100_linear_attention_fades():
    ones = jnp.ones((1, 3, 1, 4))  # Q · Σ K = 12
    temperature = jnp.ones((1, 1, 1))
    got = l2vit.linear_attention(ones, ones, ones, temperature)
    np.testing.assert_allclose(got, 0.12, rtol=1e-6)
    negative = l2vit.linear_attention(-ones, ones, ones, temperature)
    np.testing.assert_array_equal(negative, 0)
    gradient = jax.grad(lambda q: l2vit.linear_attention(q, ones, ones, temperature).sum())(ones)
    np.testing.assert_allclose(gradient, 0.12, rtol=1e-6)  # none through the normaliser


def test_linear_attention_sums_in_float32():
    ones = jnp.ones((1, 4099, 1, 4), jnp.bfloat16)  # a sum in bfloat16 would stop at 256
    out = l2vit.linear_attention(ones, ones, ones, jnp.ones((1, 1, 1)))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, 1, rtol=1e-6)


def test_padding_takes_part_in_window_attention():
    attn = l2vit.WindowAttention(32, 7, "auto", dtype=jnp.float32, rngs=nnx.Rngs(0))
    attn.qkv.bias[...] = normal(0, (96,))
    x = normal(1, (1, 5, 6, 32))
    padded = layers.pad_to_multiple(x, 7)
    assert padded.shape == (1, 7, 7, 32)
    np.testing.assert_allclose(attn(x), attn(padded)[:, :5, :6], atol=1e-6)


def test_downsampling_pads_after_its_norm():
    down = l2vit.Down(32, 64, dtype=jnp.float32, rngs=nnx.Rngs(0))
    down.norm.bias[...] = normal(0, (32,))
    x = normal(1, (1, 3, 3, 32))
    corner = down.norm(x)[0, 2, 2] @ down.proj.kernel[0, 0]
    np.testing.assert_allclose(down(x)[0, 1, 1], corner, atol=1e-5)


def test_concentration_activates_before_its_batch_norm():
    local = l2vit.LocalConcentration(8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = normal(0, (2, 9, 9, 8))
    local(x, train=True)
    activated = np.asarray(jax.nn.gelu(local.depthwise1(x), approximate=False))
    np.testing.assert_allclose(local.bn.mean[...], 0.1 * activated.mean((0, 1, 2)), atol=1e-7)


# ------------------------------------------------------------------------------------ detection


def test_the_detection_trunk_normalises_every_stage_and_has_no_classifier(tiny):
    trunk = reference.model("l2vit_b_384", **SHALLOW, detection=True)
    assert {stage.blocks[0].attn.window for stage in trunk.stages} == {7}
    flat = flatten(bridge.get_weights(trunk))
    assert not [path for path in flat if path.startswith(("params/head", "params/norm/"))]
    with pytest.raises(ValueError, match="built with detection=True and has no classifier"):
        trunk(images())

    weights = flatten(bridge.get_weights(tiny))
    fresh = {p: jnp.full_like(leaf, p.endswith("scale")) for p, leaf in flat.items()}
    bridge.set_weights(trunk, unflatten(fresh | {p: weights[p] for p in flat if p in weights}))
    apply = jax.jit(as_function(trunk), static_argnames="method")
    for i, x in enumerate(apply(bridge.get_weights(trunk), images(1), method="features")):
        assert x.shape == (1, 16 >> i, 16 >> i, 32 << i)
        np.testing.assert_allclose(x.mean(-1), 0, atol=1e-4)
        np.testing.assert_allclose(x.std(-1), 1, atol=1e-3)


# --------------------------------------------------------------------------------------- weights


def test_initial_values():
    def init():
        rngs = nnx.Rngs(jax.random.key(1, impl="unsafe_rbg"))  # which compiles fastest
        first = TINY | {"depths": (2, 1, 1, 1)}
        return bridge.get_weights(hybrid_flax.create_model("l2vit_t", **first, rngs=rngs))

    flat = {path: np.asarray(leaf) for path, leaf in flatten(jax.jit(init)()).items()}
    temperature = flat["params/stages/0/blocks/1/attn/temperature"]
    np.testing.assert_allclose(temperature, np.full((1, 1, 1), 32**-0.5), rtol=1e-6)
    for name in ("local/depthwise2", "mlp/fc1", "attn/qkv"):
        kernel = flat[f"params/stages/0/blocks/1/{name}/kernel"]
        assert np.std(kernel) == pytest.approx(0.02, rel=0.05)
        assert not flat[f"params/stages/0/blocks/1/{name}/bias"].any()
    assert not flat["params/stages/0/embed/conv1/bias"].any()
    kernels = [leaf.tobytes() for path, leaf in flat.items() if path.endswith("kernel")]
    assert len(set(kernels)) == len(kernels)  # no two parameters share a random key


def test_classes_are_picked_from_the_head(tmp_path):
    weights = {
        "params/norm/bias": np.ones(2),
        "params/head/kernel": np.arange(10).reshape(5, 2).T,
        "params/head/bias": np.arange(5),
    }
    (tmp_path / "map.txt").write_text("4\n0\n2\n")
    rows = read_class_map(tmp_path / "map.txt", num_classes=3)
    picked = select_classes(weights, rows, l2vit.L2ViT.structure)
    assert picked["params/head/kernel"].T.tolist() == [[8, 9], [0, 1], [4, 5]]
    assert picked["params/head/bias"].tolist() == [4, 0, 2]
    assert picked["params/norm/bias"] is weights["params/norm/bias"]
    assert weights["params/head/bias"].shape == (5,)


def test_wrong_class_maps_are_refused_by_name(tmp_path):
    file = tmp_path / "map.txt"
    file.write_text("4\n0\n")
    with pytest.raises(ValueError, match="map.txt has 2 class indices, expected 1000"):
        read_class_map(file)
    file.write_text("4\nn02119789\n")
    with pytest.raises(ValueError, match="map.txt, line 2: 'n02119789' is not a class index"):
        read_class_map(file)
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="map.txt, line 1: .* is not UTF-8"):
        read_class_map(file)
    head = {"head/kernel": np.zeros((2, 5)), "head/bias": np.zeros(5)}
    with pytest.raises(ValueError, match="index 5 is out of range: .* 5 classes, 0 to 4"):
        select_classes(head, [0, 5], l2vit.L2ViT.structure)
    with pytest.raises(ValueError, match="index -1 is out of range"):
        select_classes(head, [-1], l2vit.L2ViT.structure)
    with pytest.raises(ValueError, match="class index 3 is given more than once"):
        select_classes(head, [3, 1, 3], l2vit.L2ViT.structure)
    with pytest.raises(ValueError, match="no class indices were given"):
        select_classes(head, [], l2vit.L2ViT.structure)
