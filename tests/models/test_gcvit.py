import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybrid_flax
from hybrid_flax.models import gcvit
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function
from hybrid_flax.weights.paths import flatten
from tests import reference

TINY = {"num_classes": 7, "image_size": 64, "dim": 32, "depths": (1, 2, 2, 1), "drop_path": 0.5}

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.fixture(scope="module")
def tiny():
    return reference.model("gcvit_s", **TINY)


@pytest.fixture(scope="module")
def run(tiny):
    """The tiny model, compiled: run(images, …)."""
    apply = jax.jit(as_function(tiny), static_argnames=("method", "train"))
    return functools.partial(apply, bridge.get_weights(tiny))


def images(batch=2, height=64, width=64, seed=0):
    return jnp.asarray(reference.images(seed, (batch, height, width, 3)))


@pytest.mark.parametrize(
    ("name", "size", "dim"), [("gcvit_xxt", 224, 64), ("gcvit_l_512", 512, 192)]
)
def test_shapes(name, size, dim):
    model = bridge.abstract(lambda: hybrid_flax.create_model(name))
    batch = jax.ShapeDtypeStruct((3, size, size, 3), jnp.float32)
    apply = as_function(model)
    maps = jax.eval_shape(
        lambda p, x: apply(p, x, method="intermediates"), bridge.get_weights(model), batch
    )
    assert (maps["logits"].shape, maps["logits"].dtype) == ((3, 1000), jnp.float32)
    assert [maps[f"stage{i}_blocks"].shape for i in range(1, 5)] == [
        (3, size // stride, size // stride, dim * stride // 4) for stride in (4, 8, 16, 32)
    ]


@pytest.mark.parametrize("size", [16, 100, 225])
def test_sizes_without_whole_windows_are_refused(size):
    with pytest.raises(ValueError, match=f"image_size={size}: GC ViT needs a multiple of 32"):
        hybrid_flax.create_model("gcvit_xxt", image_size=size)


@pytest.mark.parametrize(("height", "width"), [(61, 64), (62, 63)])
def test_up_to_three_pixels_less_are_accepted(tiny, height, width):
    assert jax.eval_shape(tiny, images(1, height, width)).shape == (1, 7)


@pytest.mark.parametrize(("height", "width"), [(60, 64), (64, 65), (128, 128), (32, 64)])
def test_other_sizes_are_refused_by_name(tiny, height, width):
    with pytest.raises(ValueError, match=f"{height}×{width}, but .*image_size=64 .* 61 to 64"):
        tiny(images(1, height, width))


def test_images_do_not_see_each_other(run):
    first, second = images(2, seed=0), images(2, seed=1)
    mixed = jnp.stack([first[0], second[1]])
    np.testing.assert_allclose(run(mixed)[0], run(first)[0], atol=1e-5)
    np.testing.assert_allclose(run(mixed)[1], run(second)[1], atol=1e-5)


def test_intermediates_are_named(tiny):
    maps = jax.eval_shape(tiny.intermediates, images())
    stages = [f"{kind}{i}{part}" for i in range(1, 5) for kind, part in _STAGE_LABELS]
    assert maps.keys() == {"stem", *stages, "norm", "pooled", "logits"}
    assert maps["query1"].shape == (2, 2, 2, 32)
    assert maps["query3"].shape == (2, 4, 4, 128)
    features = jax.eval_shape(tiny.features, images())
    assert features == [maps[f"stage{i}_blocks"] for i in range(1, 5)]


_STAGE_LABELS = (("query", ""), ("stage", "_blocks"), ("stage", ""))


def test_training_drops_paths_by_key_only(tiny, run):
    batch = images()
    with pytest.raises(ValueError, match="train=True needs key="):
        tiny(batch, train=True)
    first = run(batch, train=True, key=jax.random.key(0))
    np.testing.assert_array_equal(first, run(batch, train=True, key=jax.random.key(0)))
    assert np.abs(np.asarray(first - run(batch, train=True, key=jax.random.key(1)))).max() > 0
    np.testing.assert_allclose(run(batch), run(batch, key=jax.random.key(0)), atol=1e-5)


def test_drop_path_rates_rise_linearly_over_all_blocks(tiny):
    rates = [block.drop_path_rate for stage in tiny.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.5, 6))


def test_blocks_alternate_between_local_and_global(tiny):
    assert [block.attn.is_global for block in tiny.stages[2].blocks] == [False, True]


def test_bfloat16_computes_close_to_float32_and_returns_float32(tiny, run):
    half = bridge.abstract(lambda: hybrid_flax.create_model("gcvit_s", **TINY, dtype=jnp.bfloat16))
    apply = as_function(half)
    with jax.numpy_dtype_promotion("standard"):  # Flax's LayerNorm mixes dtypes on purpose
        maps = jax.jit(lambda p, x: apply(p, x, method="intermediates"))(
            bridge.get_weights(tiny), images()
        )
    assert maps["logits"].dtype == jnp.float32
    assert maps["stage4_blocks"].dtype == jnp.bfloat16
    logits = run(images())
    assert np.linalg.norm(maps["logits"] - logits) < 0.03 * np.linalg.norm(logits)


def test_max_pool_padding_never_wins():
    pooled = gcvit.max_pool(jnp.full((1, 4, 4, 1), -3.0))
    assert (pooled == -3).all()


def test_initial_values():
    options = {"dtype": jnp.float32, "rngs": nnx.Rngs(1)}
    block = gcvit.Block(
        64,
        7,
        is_global=False,
        mlp_ratio=2,
        initial_scale=1e-5,
        drop_path_rate=0.0,
        implementation="auto",
        **options,
    )
    flat = flatten(bridge.get_weights(block)["params"])
    assert np.std(flat["mlp/fc1/kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(flat["attn/position_bias"]) == pytest.approx(0.02, rel=0.2)
    assert (flat["gamma1"] == np.float32(1e-5)).all()
    assert not flat["attn/qkv/bias"].any()
    first = gcvit.conv(3, 32, 3, stride=2, use_bias=True, **options)  # of the stem
    assert 0 < np.abs(first.bias).max() <= 1 / np.sqrt(27)
    kernels = [np.asarray(leaf).tobytes() for path, leaf in flat.items() if path.endswith("kernel")]
    assert len(set(kernels)) == len(kernels)  # no two parameters share a random key


def test_variants_without_layer_scale_have_no_gamma():
    model = bridge.abstract(lambda: hybrid_flax.create_model("gcvit_t"))
    assert not [path for path in flatten(bridge.get_weights(model)) if "gamma" in path]
