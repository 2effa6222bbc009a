"""Batch norm over the whole batch and over groups of images."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_flax import layers
from hybrid_flax.distributed.batch import batch_sharded
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_training_function

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SCALE, BIAS = np.float32([1.5, -0.5, 2.0]), np.float32([0.1, 0.2, -0.3])
MEAN, VAR = np.float32([0.5, -1.0, 2.0]), np.float32([1.0, 4.0, 0.25])


def values(batch=16, size=3, seed=0):
    """Every image has a mean of its own, so that groups differ."""
    rng = np.random.default_rng(seed)
    offsets = rng.normal(size=(batch, 1, 1, 3)) * 3
    return (offsets + rng.normal(size=(batch, size, size, 3))).astype(np.float32)


def norm(group=0):
    model = layers.BatchNorm(3)
    assert layers.group_batch_norms(model, group) == 1
    starts = {"scale": SCALE, "bias": BIAS, "mean": MEAN, "var": VAR}
    for name, start in starts.items():
        getattr(model, name)[...] = jnp.asarray(start)
    return as_training_function(model), bridge.get_weights(model)


def trained(x, group=0):
    apply, weights = norm(group)
    output, statistics = jax.jit(apply, static_argnames="train")(weights, x, train=True)
    return np.asarray(output), jax.device_get(statistics)


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
def test_each_group_is_normalised_alone_and_running_statistics_move_to_the_mean(group):
    x = values()
    output, statistics = trained(x, group)
    groups = x.astype(np.float64).reshape(-1, group * 9, 3)
    mean, var = groups.mean(1, keepdims=True), groups.var(1, keepdims=True)
    want = (groups - mean) / np.sqrt(var + 1e-5) * SCALE + BIAS
    np.testing.assert_allclose(output, want.reshape(x.shape), rtol=1e-4, atol=1e-5)
    unbiased = groups.var(1, ddof=1)
    np.testing.assert_allclose(statistics["mean"], 0.9 * MEAN + 0.1 * groups.mean((0, 1)), 1e-5)
    np.testing.assert_allclose(statistics["var"], 0.9 * VAR + 0.1 * unbiased.mean(0), 1e-5)
    assert statistics["count"] == 1


def test_gradients_are_those_of_groups_on_their_own():
    x, weight = jnp.asarray(values()), jnp.asarray(values(seed=1))

    def loss(group, x, weight):
        apply, weights = norm(group)
        return jnp.sum(apply(weights, x, train=True)[0] * weight)

    got = jax.grad(lambda x: loss(4, x, weight))(x)
    alone = [jax.grad(lambda x, i=i: loss(0, x, weight[i : i + 4]))(x[i : i + 4])
             for i in range(0, 16, 4)]  # fmt: skip
    np.testing.assert_allclose(got, np.concatenate(alone), rtol=1e-4, atol=1e-5)
    whole = jax.grad(lambda x: loss(0, x, weight))(x)
    assert np.abs(np.asarray(got) - whole).max() > 0.1


@pytest.mark.parametrize("group", [16, 17, 128])
def test_a_group_of_the_batch_or_more_is_the_whole_batch(group):
    output, statistics = trained(values())
    other, other_statistics = trained(values(), group)
    np.testing.assert_array_equal(other, output)
    for name, value in statistics.items():
        np.testing.assert_array_equal(other_statistics[name], value)


def test_vectors_have_groups_too():
    x = values()[:, 0, 0]
    output, _ = trained(x, 8)
    for half in (slice(0, 8), slice(8, 16)):
        want = (x[half] - x[half].mean(0)) / np.sqrt(x[half].var(0) + 1e-5) * SCALE + BIAS
        np.testing.assert_allclose(output[half], want, rtol=1e-4, atol=1e-5)


def test_evaluation_knows_no_groups():
    apply, weights = norm(4)
    output, statistics = apply(weights, jnp.asarray(values()))
    want = (values() - MEAN) / np.sqrt(VAR + 1e-5) * SCALE + BIAS
    np.testing.assert_allclose(output, want, rtol=1e-4, atol=1e-5)
    assert statistics["count"] == 0


@pytest.mark.parametrize("group", [0, 2, 4, 8, 6])
def test_eight_devices_give_the_same_and_keep_their_images(group):
    x = values(24)  # three images on each: no group but that of all lies where devices begin
    want, want_statistics = trained(x, group)
    apply, weights = norm(group)
    on_devices = jax.device_put(x, batch_sharded(make_mesh(jax.devices())))
    run = jax.jit(apply, static_argnames="train")
    output, statistics = run(weights, on_devices, train=True)
    np.testing.assert_allclose(output, want, rtol=1e-4, atol=1e-5)
    for name, value in want_statistics.items():
        np.testing.assert_allclose(statistics[name], value, rtol=1e-5)
    text = run.lower(weights, on_devices, train=True).compile().as_text()
    assert "all-" in text  # sums are exchanged,
    assert not re.search(r"3,3,3\]\S* (all-|collective-)", text)  # images are not


def test_groups_that_cannot_be_normalised_are_refused():
    with pytest.raises(
        ValueError, match="in groups of 5 images cannot train on 16: use a multiple"
    ):
        trained(values(), 5)
    with pytest.raises(ValueError, match=r"shape \(16, 3\): it needs two values of each channel"):
        trained(values()[:, 0, 0], 1)


def test_all_batch_norms_of_a_model_are_grouped():
    class Two(nnx.Module):
        def __init__(self):
            self.first = layers.BatchNorm(3)
            self.others = nnx.List([layers.BatchNorm(2)])

    model = Two()
    assert layers.group_batch_norms(model, 4) == 2
    assert (model.first.group, model.others[0].group) == (4, 4)
    assert layers.group_batch_norms(layers.layer_norm(3, rngs=nnx.Rngs(0)), 4) == 0
