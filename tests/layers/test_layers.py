import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_flax import layers
from hybrid_flax.layers import convolutions

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_relative_position_index():
    index = layers.relative_position_index(7)
    assert index.shape == (49, 49)
    assert index.dtype == np.int64
    assert (index[0, 0], index[0, 1], index[8, 0]) == (84, 83, 98)


def test_bias_table_keeps_its_values_at_the_same_window():
    table = normal(0, (169, 4))
    np.testing.assert_allclose(layers.resize_relative_position_bias(table, 7), table, atol=1e-6)


@pytest.mark.parametrize("window", [1, 4, 12])
def test_bias_table_is_resized_as_pytorch_does(window):
    torch = pytest.importorskip("torch")
    table = normal(0, (169, 4))
    want = torch.nn.functional.interpolate(
        torch.tensor(np.asarray(table)).T.reshape(1, 4, 13, 13),
        size=(2 * window - 1,) * 2,
        mode="bicubic",
        align_corners=False,
    )
    got = layers.resize_relative_position_bias(table, window)
    np.testing.assert_allclose(got, want.reshape(4, -1).T.numpy(), atol=1e-5)


def test_both_depthwise_formulations_agree_with_their_gradients():
    x, kernel, probe = normal(0, (2, 9, 7, 6)), normal(1, (3, 3, 1, 6)), normal(2, (2, 9, 7, 6))
    results = [
        jax.value_and_grad(lambda x, k, f=f: jnp.sum(f(x, k) * probe), argnums=(0, 1))(x, kernel)
        for f in (convolutions.depthwise_as_shifted_sum, convolutions.depthwise_as_grouped_conv)
    ]
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_depthwise_is_a_grouped_convolution_on_accelerators_and_a_sum_on_cpus():
    layer = layers.DepthwiseConv(8, 3, rngs=nnx.Rngs(0))
    traced = jax.jit(lambda x: layer(x)).trace(jnp.zeros((1, 4, 4, 8)))
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    on_gpu = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.convolution" not in on_cpu
    assert "feature_group_count = 8" in on_gpu


def test_strided_convolution_pads_both_sides_as_pytorch():
    torch = pytest.importorskip("torch")
    layer = layers.conv(3, 5, 3, stride=2, use_bias=True, rngs=nnx.Rngs(0))
    x = normal(0, (2, 8, 10, 3))
    want = torch.nn.functional.conv2d(
        torch.tensor(np.asarray(x)).permute(0, 3, 1, 2),
        torch.tensor(np.asarray(layer.kernel[...]).transpose(3, 2, 0, 1)),
        torch.tensor(np.asarray(layer.bias[...])),
        stride=2,
        padding=1,
    )
    np.testing.assert_allclose(layer(x), want.permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_pointwise_is_a_1x1_convolution():
    layer = layers.PointwiseConv(4, 6, rngs=nnx.Rngs(0))
    x = normal(0, (2, 3, 5, 4))
    want = jax.lax.conv_general_dilated(
        x, layer.kernel[...], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer(x), want, atol=1e-5)


@pytest.mark.parametrize(
    "make", [layers.DepthwiseConv, lambda c, k, rngs: layers.conv(c, c, k, rngs=rngs)]
)
def test_convolutions_start_as_pytorch_starts_them(make):
    kernel = make(64, 3, rngs=nnx.Rngs(0)).kernel[...]
    bound = 1 / np.sqrt(np.prod(kernel.shape[:3]))  # fan-in
    assert np.abs(kernel).max() <= bound
    assert np.std(kernel) == pytest.approx(bound / np.sqrt(3), rel=0.1)


def test_drop_path_drops_whole_images_at_its_rate_and_keeps_the_mean():
    branch = jnp.ones((4000, 2, 3))
    dropped = layers.drop_path(branch, 0.25, jax.random.key(0))
    per_image = np.asarray(dropped).reshape(4000, -1)
    assert (per_image == per_image[:, :1]).all()
    assert set(np.unique(per_image)) == {0, np.float32(1 / 0.75)}
    assert per_image.mean() == pytest.approx(1, abs=0.03)
    other = layers.drop_path(branch, 0.25, jax.random.key(1))
    assert (np.asarray(other) != np.asarray(dropped)).any()


def test_drop_path_is_off_without_a_key_or_a_rate():
    branch = normal(0, (4, 3))
    assert layers.drop_path(branch, 0.9, None) is branch
    assert layers.drop_path(branch, 0.0, jax.random.key(0)) is branch
