import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convert
import hybrid_flax
from convert.state_dict import classifier_width
from hybrid_flax.layers.convolutions import pytorch_init
from hybrid_flax.models.gramian import cswin
from hybrid_flax.models.gramian.aggregation import SqueezeExcite, aggregate, tap_places
from hybrid_flax.models.gramian.heads import gramian_vector, shuffle_channels
from hybrid_flax.models.registry import model_variant
from hybrid_flax.training.losses import gramian as gramian_loss
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function, as_training_function
from hybrid_flax.weights.paths import flatten
from tests import reference

# One of each kind, for images of 64×64 pixels: {name: overrides}.
COMMON = {"num_classes": 7, "image_size": 64, "gram_dim": 16, "drop_path": 0.5, "heads": 2}
STAGES = COMMON | {"depths": (1, 1, 2, 1), "taps": 1}
TINY = {
    "ga_convnext_t": STAGES | {"dims": (16, 32, 32, 64)},
    "ga_cswin_t": STAGES | {"splits": (1, 2, 2), "gram_dim": 64},
    "ga_resnet50": STAGES | {"widths": (8, 8, 16, 16)},
    "ga_vit_s": COMMON | {"dim": 64, "depth": 2, "head_channels": 2},
}
FEATURES = {
    "ga_convnext_t": [(16, 16), (8, 32), (4, 32), (2, 64)],
    "ga_cswin_t": [(16, 64), (8, 128), (4, 256), (2, 512)],
    "ga_resnet50": [(16, 32), (8, 32), (4, 64), (2, 64)],
    "ga_vit_s": [(4, 64)],
}

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def images(batch=2, height=64, width=64, seed=0):
    return jnp.asarray(reference.images(seed, (batch, height, width, 3)))


def abstract(name, **arguments):
    return bridge.abstract(lambda: hybrid_flax.create_model(name, **arguments))


def shapes(name, height, width):
    """Of all maps of the full-size model."""
    model = abstract(name)
    apply = as_function(model)
    return jax.eval_shape(
        lambda weights, images: apply(weights, images, method="intermediates"),
        bridge.get_weights(model),
        jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32),
    )


@functools.cache
def tiny(name):
    return reference.model(name, **TINY[name])


@functools.cache
def training(name):
    """run(images, key) → (head logits, batch statistics), compiled."""
    apply = as_training_function(tiny(name))
    weights = bridge.get_weights(tiny(name))
    run = jax.jit(lambda weights, images, key: apply(weights, images, train=True, key=key))
    return functools.partial(run, weights)


@functools.cache
def evaluated(name):
    apply = as_function(tiny(name))
    run = jax.jit(lambda weights, images: apply(weights, images, method="intermediates"))
    return run(bridge.get_weights(tiny(name)), images())


# ------------------------------------------------------------------------------------- all kinds


@pytest.mark.parametrize("name", TINY)
def test_evaluation_sums_the_heads(name):
    maps = evaluated(name)
    assert (maps["head_logits"].shape, maps["head_logits"].dtype) == ((2, 2, 7), jnp.float32)
    np.testing.assert_allclose(maps["logits"], maps["head_logits"].sum(0), rtol=1e-6)
    spread = np.std(np.asarray(maps["head_logits"]), axis=0)
    assert spread.min() > 0  # no two heads are the same


@pytest.mark.parametrize("name", TINY)
def test_features(name):
    maps = jax.eval_shape(tiny(name).features, images(3))
    assert [(shape.shape[1], shape.shape[3]) for shape in maps] == FEATURES[name]
    assert {shape.shape[0] for shape in maps} == {3}


@pytest.mark.parametrize("name", ["ga_convnext_t", "ga_resnet50", "ga_vit_s"])
def test_training_gives_each_head_and_new_statistics(name):
    run, batch = training(name), images()
    logits, statistics = run(batch, jax.random.key(0))
    assert logits.shape == (2, 2, 7)
    np.testing.assert_array_equal(logits, run(batch, jax.random.key(0))[0])
    assert np.abs(np.asarray(logits - run(batch, jax.random.key(1))[0])).max() > 0
    before = flatten(bridge.get_weights(tiny(name))["batch_stats"])
    after = flatten(statistics)
    assert after.keys() == before.keys()
    assert not np.array_equal(
        after["heads/1/embedding_norm/mean"], before["heads/1/embedding_norm/mean"]
    )
    assert {int(after[path]) for path in after if path.endswith("/count")} == {1}


def test_every_parameter_of_a_head_is_trained():
    apply = as_training_function(tiny("ga_vit_s"))
    weights = bridge.get_weights(tiny("ga_vit_s"))

    def loss(params):
        changed = weights | {"params": params}
        logits, _ = apply(changed, images(4), train=True, key=jax.random.key(0))
        return gramian_loss(logits, jnp.full((4, 7), 1 / 7), -0.8)

    gradients = flatten(jax.jit(jax.grad(loss))(weights["params"]))
    norms = {path: np.linalg.norm(np.ravel(grad)) for path, grad in gradients.items()}
    # A bias just before a batch norm is taken away again, exactly but for rounding.
    cancelled = ("/contraction/bias", "/embedding/bias")
    floor = 1e-5 * max(norms.values())
    for path, norm in norms.items():
        assert (norm < floor) == path.endswith(cancelled), (path, norm)


@pytest.mark.parametrize(
    "name", ["ga_convnext_t", pytest.param("ga_cswin_t", marks=pytest.mark.slow)]
)
def test_bfloat16_computes_close_to_float32_and_returns_float32(name):
    apply = as_function(abstract(name, **TINY[name], dtype=jnp.bfloat16))
    with jax.numpy_dtype_promotion("standard"):  # Flax's LayerNorm mixes dtypes on purpose
        maps = jax.jit(lambda weights, x: apply(weights, x, method="intermediates"))(
            bridge.get_weights(tiny(name)), images()
        )
    assert maps["logits"].dtype == maps["h0_gram"].dtype == jnp.float32
    assert {maps[label].dtype for label in ("stem", "stage4", "stage5", "pooled_0")} == {
        jnp.dtype("bfloat16")
    }
    logits = evaluated(name)["logits"]
    assert np.linalg.norm(maps["logits"] - logits) < 0.03 * np.linalg.norm(logits)


def test_training_needs_a_key_and_two_images():
    with pytest.raises(ValueError, match="train=True needs key="):
        tiny("ga_vit_s")(images(), train=True)
    with pytest.raises(ValueError, match="cannot train on shape .*needs two values"):
        training("ga_vit_s")(images(1), jax.random.key(0))


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(("height", "width"), [(224, 224), (239, 231)])
def test_convnext_takes_224_to_239(height, width):
    maps = shapes("ga_convnext_t", height, width)
    assert maps["aggregate"].shape == (1, 14, 14, 2128)
    assert maps["stage5_se"].shape == (1, 14, 14, 172)
    assert maps["h4_gram"].shape == (1, 18528)
    assert maps["logits"].shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "sides", "text"),
    [
        ("ga_convnext_t", (63, 64), "heights and widths from 64 to 79"),
        ("ga_convnext_t", (64, 80), "64×80, but this GAConvNeXt was built for image_size=64"),
        ("ga_cswin_t", (65, 64), "heights and widths of 64"),
        ("ga_resnet50", (48, 64), "heights and widths from 49 to 64"),
        ("ga_vit_s", (64, 48), "heights and widths of 64"),
        ("ga_vit_s", (64,), r"images must be \[B, H, W, 3\]"),
    ],
)
def test_other_sizes_are_refused_by_name(name, sides, text):
    with pytest.raises(ValueError, match=text):
        tiny(name)(jnp.zeros((1, *sides, 3)))


def test_resnet_takes_less_than_its_size():
    assert shapes("ga_resnet50", 209, 224)["aggregate"].shape == (1, 14, 14, 5664)


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        ("ga_convnext_t", {"image_size": 240}, "image_size=240: GA-ConvNeXt needs .* of 32"),
        ("ga_resnet50", {"image_size": 16}, "image_size=16: GA-ResNet needs a multiple of 32"),
        ("ga_vit_s", {"image_size": 100}, "image_size=100: GA-ViT needs a multiple of 16"),
        ("ga_cswin_t", {"image_size": 112}, "stripes of 1, 2 and 7 .* needs a multiple of 224"),
        ("ga_cswin_t", {"stage5": "mlp"}, "stage5='mlp': expected \"block\" or \"bottleneck\""),
        ("ga_convnext_t", {"depths": (1, 1, 2, 1)}, "2 taps of stage 3 need at least 3 blocks"),
    ],
)  # fmt: skip
def test_impossible_models_are_refused(name, overrides, text):
    with pytest.raises(ValueError, match=text):
        abstract(name, **overrides)


# -------------------------------------------------------------------------------------- the parts


def test_the_gramian_vector_is_the_upper_triangle_row_by_row():
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32)
    flat = x.reshape(2, 15, 4).astype(np.float64)
    matrix = flat.swapaxes(1, 2) @ flat
    want = np.stack([matrix[:, i, j] for i in range(4) for j in range(i, 4)], axis=1)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(gramian_vector(jnp.asarray(x)), want, atol=1e-6)
    # The Gramian does not know where things are, nor how strong the map is.
    turned = jnp.asarray(2 * x[:, ::-1].swapaxes(1, 2))
    np.testing.assert_allclose(gramian_vector(turned), want, atol=1e-6)


def test_the_gramian_vector_of_an_empty_map_has_a_gradient():
    gradient = jax.grad(lambda x: gramian_vector(x).sum())(jnp.zeros((1, 2, 2, 4)))
    assert not np.asarray(gradient).any()


def test_the_channel_shuffle_is_the_inverse_of_shufflenets():
    assert shuffle_channels(jnp.arange(6.0), 2).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize(
    ("depth", "taps", "places"),
    [(9, 2, (3, 6)), (27, 4, (5, 10, 15, 20)), (21, 4, (4, 8, 12, 16)), (32, 4, (6, 12, 18, 24)),
     (6, 3, (1, 2, 3))],
)  # fmt: skip
def test_tap_places(depth, taps, places):
    assert tap_places(depth, taps) == tuple(place - 1 for place in places)


def test_aggregation_doubles_with_half_pixel_centres():
    empty = jnp.zeros((1, 4, 4, 1))
    maps = {"stage1": jnp.ones((1, 16, 16, 2)), "stage2": empty, "stage3": empty}
    maps["stage4"] = jnp.asarray([[0.0, 4.0], [0.0, 4.0]])[None, :, :, None]
    out = aggregate(maps, [empty + 7])
    assert out.shape == (1, 4, 4, 6)
    np.testing.assert_allclose(out[0, 0, 0, :5], [1, 1, 0, 7, 0])
    np.testing.assert_allclose(out[0, :, :, 5], np.tile([0.0, 1.0, 3.0, 4.0], (4, 1)), atol=1e-6)


@pytest.mark.parametrize(("dim", "width"), [(172, 40), (192, 48), (244, 64), (256, 64), (8, 8)])
def test_squeeze_excite_is_rounded_to_eights(dim, width):
    se = SqueezeExcite(dim, kernel_init=pytorch_init, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert se.reduce.kernel.shape == (1, 1, dim, width)


def test_stripes_are_vertical_in_the_first_half_and_horizontal_in_the_second():
    block = cswin.Block(64, 2, 0.0, "auto", dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 6, 64)), jnp.float32)
    attend = jax.jit(block.attend)
    before, after = attend(x), attend(x.at[0, 1, 2, :32].add(1.0))
    seen = [np.abs(np.asarray(b - a)).max((0, 3)) > 0 for b, a in zip(before, after, strict=True)]
    columns, rows = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    columns[:, 2:4] = rows[:2] = True
    np.testing.assert_array_equal(seen[0], columns)
    np.testing.assert_array_equal(seen[1], rows)


def test_drop_path_rates():
    model = abstract("ga_convnext_t", drop_path=0.18)
    rates = [block.drop_path_rate for stage in model.trunk.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.18, 19)[:18])
    assert model.trunk.stage5.drop_path_rate == 0.18
    assert {head.gram_layer.blocks[0].drop_path_rate for head in model.heads} == {0.18}
    model = abstract("ga_cswin_t", drop_path=0.24)
    rates = [block.drop_path_rate for blocks in model.trunk.stages for block in blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.24, 25))
    assert model.trunk.stage5.block.drop_path_rate == 0.24


def initial_head(name):
    variant = dataclasses.replace(model_variant(name), gram_dim=64)
    return tiny(name).make_head(variant, 100, dtype=jnp.float32, rngs=nnx.Rngs(1))


def test_initial_values_of_convnext():
    head = initial_head("ga_convnext_t")
    block = head.gram_layer.blocks[0]
    for layer in (head.embedding, head.classifier, head.attn.q, block.depthwise, block.mlp.fc1):
        assert np.std(np.asarray(layer.kernel)) == pytest.approx(0.02, rel=0.05)
    for layer in (head.embedding, head.classifier, head.mlp.fc1, block.depthwise, block.mlp.fc1):
        assert not np.asarray(layer.bias).any()
    assert (np.asarray(block.gamma) == np.float32(1e-6)).all()
    assert (np.asarray(head.gamma1) == np.float32(1e-4)).all()
    assert (np.asarray(head.gamma2) == np.float32(1e-4)).all()


def test_initial_values_of_cswin():
    head = initial_head("ga_cswin_t")
    assert np.std(np.asarray(head.attn.q.kernel)) == pytest.approx(0.02, rel=0.05)
    assert not np.asarray(head.gram_layer.qkv.bias).any()
    for layer, fan_in in (
        (head.contraction, 512 // 8),
        (head.embedding, 64 * 65 // 2 // 8),
        (head.mlp.fc2, 2048 // 2),
        (head.gram_layer.lepe[1], 9),
    ):
        for values in (layer.kernel, layer.bias):
            assert 0.8 < np.abs(np.asarray(values)).max() * np.sqrt(fan_in) <= 1.0001


# ------------------------------------------------------------------------- parameters, conversion


@pytest.mark.parametrize(("name", "millions"), [("ga_resnet50", 22.385), ("ga_vit_s", 22.870)])
def test_reconstructions_have_the_published_size_with_one_head_too(name, millions):
    leaves = jax.tree.leaves(bridge.get_weights(abstract(name, heads=1))["params"])
    assert round(sum(leaf.size for leaf in leaves) / 1e6, 3) == millions


def test_stage5_as_a_bottleneck():
    weights = bridge.get_weights(abstract("ga_cswin_t", stage5="bottleneck"))
    assert sum(leaf.size for leaf in jax.tree.leaves(weights["params"])) == 40_751_144


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("ga_convnext_t", ["stem.0.weight", "stages.1.downsample.1.bias", "stages.4.se.fc1.weight",
                           "gram_layer.1.blocks.0.conv_dw.weight", "ga.0.gamma_1"]),
        ("ga_cswin_t", ["stage1_conv_embed.12.bias", "stage3.1.attns.1.get_v.weight",
                        "merge3.norm.weight", "stage5.2.qkv.weight", "gram_layer.1.1.proj.bias"]),
        ("ga_resnet50", ["conv1.weight", "layer2.0.downsample.1.running_mean",
                         "layer3.1.bn3.weight", "stage5.downsample.0.bias", "fc.1.bias"]),
        ("ga_vit_s", ["patch_embed.proj.bias", "pos_embed", "blocks.1.attn.qkv.weight",
                      "norm.weight", "gram_embedding.0.1.num_batches_tracked"]),
    ],
)  # fmt: skip
def test_conversion_round_trips_to_the_bit(name, keys):
    state = convert.to_state_dict(tiny(name))
    assert set(keys) <= state.keys()
    copy = abstract(name, **TINY[name])
    convert.load_state_dict(copy, state)
    again = convert.to_state_dict(copy)
    assert again.keys() == state.keys()
    assert all(again[key].tobytes() == state[key].tobytes() for key in state)
    assert classifier_width(copy, state) == 7
