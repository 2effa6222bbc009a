import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from hybrid_flax.distributed.batch import check_batch_size, to_devices
from hybrid_flax.distributed.mesh import make_mesh, replicated
from hybrid_flax.models.gcvit import GCViT
from hybrid_flax.run.compiling import CompiledOnce
from hybrid_flax.settings import from_config, replace
from hybrid_flax.training.optimizers import make_optimizer
from hybrid_flax.training.schedules import make_schedule
from hybrid_flax.training.step import (
    augmented_batch,
    make_eval_step,
    make_train_step,
    new_state,
    weights_of,
)
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function, as_training_function
from hybrid_flax.weights.paths import flatten
from tests import reference

VARIANT = {"dim": 32, "depths": (1, 1, 1, 1), "mlp_ratio": 2}
SIZE = 32


def tiny_config(changes=None):
    config = quickstart.get_config()
    with config.unlocked():
        config.model.overrides = dict(VARIANT)
    config.model.image_size = SIZE
    config.model.num_classes = 10
    config.model.drop_path = 0.3
    config.batch_size = 16
    config.augment.mixup_alpha = 0.8
    config.augment.cutmix_alpha = 1.0
    config.augment.mix_group = 4  # of 16: with eight devices, two hold one group
    config.augment.erasing_probability = 0.25
    return replace(from_config(config), changes or {})


@functools.cache
def model():
    return reference.model("gcvit_s", num_classes=10, image_size=SIZE, drop_path=0.3, **VARIANT)


def batch(size=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, SIZE, SIZE, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, size, dtype=np.int32),
    }


def build(config, mesh):
    """(train step, fresh state on the mesh)"""
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, 10)
    optimizer = make_optimizer(config.optimizer, schedule, GCViT.structure)
    step = make_train_step(as_training_function(model()), optimizer, schedule, config, mesh)
    params = jax.tree.map(jnp.copy, bridge.get_weights(model()))
    state = jax.device_put(new_state(params, optimizer, config.ema_decay), replicated(mesh))
    return step, state


def run(config, mesh, steps):
    step, state = build(config, mesh)
    metrics = []
    for i in range(steps):
        state, m = step(state, to_devices(batch(config.batch_size, seed=i), mesh))
        metrics.append(jax.device_get(m))
    return metrics, jax.device_get(state)


@pytest.fixture(scope="module")
def one_device():
    return run(tiny_config(), make_mesh(jax.devices()[:1]), 3)


@pytest.mark.slow
def test_eight_devices_get_the_loss_of_one(one_device):
    metrics, state = run(tiny_config(), make_mesh(jax.devices()), 3)
    for got, want in zip(metrics, one_device[0], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    assert state["step"] == 3


def test_the_same_run_twice_gives_the_same_bits(one_device):
    metrics, state = run(tiny_config(), make_mesh(jax.devices()[:1]), 3)
    assert metrics == one_device[0]
    for path, leaf in flatten(state).items():
        np.testing.assert_array_equal(leaf, flatten(one_device[1])[path], err_msg=path)


def test_accumulation_gives_the_gradients_of_the_whole_batch():
    # Dropped paths are drawn per micro-batch.
    whole_batch = tiny_config({"model.drop_path": 0.0})
    plain = reference.model("gcvit_s", num_classes=10, image_size=SIZE, drop_path=0.0, **VARIANT)
    apply, params = as_training_function(plain), bridge.get_weights(plain)
    results = []
    for count in (1, 2):
        config = replace(whole_batch, {"accumulation_steps": count})
        mesh = make_mesh(jax.devices()[:4])
        schedule = make_schedule(config.schedule, 1e-3, 10)
        optimizer = make_optimizer(config.optimizer, schedule, GCViT.structure)
        step = make_train_step(apply, optimizer, schedule, config, mesh)
        state = new_state(jax.tree.map(jnp.copy, params), optimizer, config.ema_decay)
        _, metrics = step(jax.device_put(state, replicated(mesh)), to_devices(batch(), mesh))
        results.append(metrics)
    whole, parts = jax.device_get(results)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_the_step_compiles_once_and_consumes_its_state():
    mesh = make_mesh(jax.devices()[:1])
    step, state = build(tiny_config(), mesh)
    first = jax.tree.leaves(state["params"])[0]
    for i in range(3):
        state, _ = step(state, to_devices(batch(seed=i), mesh))
    assert step._cache_size() == 1
    assert first.is_deleted()


def test_another_shape_is_refused():
    once = CompiledOnce(jax.jit(lambda state, batch: state + batch.sum()), "step")
    assert once(jnp.zeros(()), jnp.ones(3)) == 3
    assert once(jnp.zeros(()), jnp.ones(3)) == 3
    with pytest.raises(TypeError, match=r"float32\[3\].*float32\[4\]|shape"):
        once(jnp.zeros(()), jnp.ones(4))


def test_no_collective_gathers_the_images():
    mesh = make_mesh(jax.devices())
    step, state = build(tiny_config(), mesh)
    text = step.lower(state, to_devices(batch(), mesh)).compile().as_text()
    gathers = [
        line for line in text.splitlines() if "all-gather(" in line and f"{SIZE},{SIZE},3" in line
    ]
    assert not gathers


def augmented(step=0, mix_until=None, **changes):
    """(images, targets) of 64 images of the mean colour: what is not 0 afterwards is noise."""
    config = tiny_config()
    augment = dataclasses.replace(
        config.augment, cutmix_alpha=0.0, mix_group=2, erasing_probability=1.0, **changes
    )
    dataset = dataclasses.replace(config.dataset, mean=(0.2, 0.4, 0.6))
    colour = np.uint8([51, 102, 153])  # 255 times the mean
    images = jnp.broadcast_to(jnp.asarray(colour), (64, 32, 32, 3))
    keys = jax.random.key(0), jax.random.key(1)
    images, targets = augmented_batch(
        keys, images, jnp.eye(64), jnp.int32(step), augment, dataset, mix_until
    )
    return np.asarray(images), np.asarray(targets)


def test_erased_noise_is_mixed_or_not_by_the_order():
    shares, noises = [], []
    for before in (False, True):
        images, targets = augmented(erase_before_mix=before)
        noise = np.abs(images).max(-1) > 1e-5
        shares.append(noise.mean())
        noises.append(images[noise].std())
        if not before:  # one rectangle each
            rows, columns = noise.any(2), noise.any(1)
            np.testing.assert_array_equal(noise, rows[:, :, None] & columns[:, None, :])
        else:  # both halves of a pair have both rectangles, in shares that add up to 1
            np.testing.assert_array_equal(noise[::2], noise[1::2])
            own = targets[0, 0]
            assert targets[0, 1] == pytest.approx(1 - own)
    assert noises[0] == pytest.approx(1, abs=0.02)
    assert 0.4 < noises[1] < 0.9
    assert 1.4 < shares[1] / shares[0] < 2


def test_mixing_ends_at_its_step():
    one_hot = np.eye(64, dtype=np.float32)
    assert (augmented(step=6, mix_until=7)[1] != one_hot).any()
    for step in (7, 100):
        np.testing.assert_array_equal(augmented(step, mix_until=7)[1], one_hot)
    np.testing.assert_array_equal(augmented(mix_probability=0.0)[1], one_hot)


def test_the_average_follows_the_parameters(one_device):
    config = tiny_config()
    _, state = run(config, make_mesh(jax.devices()[:1]), 1)
    start = flatten(bridge.get_weights(model()))
    for path, average in flatten(state["ema"]).items():
        want = (
            config.ema_decay * start[path]
            + (1 - config.ema_decay) * flatten(weights_of(state))[path]
        )
        np.testing.assert_allclose(average, want, rtol=1e-6, atol=1e-8)


def test_no_average_without_a_decay():
    config = tiny_config({"ema_decay": 0.0})
    _, state = build(config, make_mesh(jax.devices()[:1]))
    assert "ema" not in state


def test_evaluation_counts_what_the_mask_says():
    config, mesh = tiny_config(), make_mesh(jax.devices())
    step = make_eval_step(as_function(model()), config.dataset, mesh)
    images = batch(16)
    mask = (np.arange(16) < 11).astype(np.float32)
    sums = step(bridge.get_weights(model()), to_devices(images | {"mask": mask}, mesh))
    normal = (images["image"] / 255 - np.array(config.dataset.mean)) / np.array(config.dataset.std)
    logits = np.asarray(
        jax.jit(as_function(model()))(bridge.get_weights(model()), jnp.asarray(normal, jnp.float32))
    )[:11]
    labels = images["label"][:11]
    ranks = (np.argsort(-logits, axis=1) == labels[:, None]).argmax(axis=1)
    assert sums["images"] == 11
    assert sums["top1"] == (ranks < 1).sum()
    assert sums["top5"] == (ranks < 5).sum()
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(11), labels]
    assert float(sums["loss"]) == pytest.approx(losses.sum(), rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_counted_and_not_scored(bad):
    config, mesh = tiny_config(), make_mesh(jax.devices()[:1])
    logits = np.zeros((16, 10), np.float32)
    logits[:, 3] = 1.0
    logits[:5, 0] = bad
    step = make_eval_step(lambda params, images: jnp.asarray(logits), config.dataset, mesh)
    labels = np.array([0] * 6 + [3] * 10, np.int32)
    mask = np.array([0] + [1] * 15, np.float32)
    sums = step({}, to_devices(batch(16) | {"label": labels, "mask": mask}, mesh))
    assert (sums["non_finite"], sums["images"], sums["top1"]) == (4, 11, 10)
    assert np.isfinite(sums["loss"])


def test_a_label_beyond_the_logits_has_no_loss_of_zero():
    config, mesh = tiny_config(), make_mesh(jax.devices()[:1])
    step = make_eval_step(lambda params, images: jnp.ones((16, 10)), config.dataset, mesh)
    rows = {"label": np.full(16, 10, np.int32), "mask": np.ones(16, np.float32)}
    assert np.isnan(step({}, to_devices(batch(16) | rows, mesh))["loss"])


@pytest.mark.parametrize(("size", "accumulation"), [(12, 1), (8, 2), (0, 1)])
def test_a_batch_that_does_not_split_is_refused_with_sizes_that_do(size, accumulation):
    mesh = make_mesh(jax.devices())
    with pytest.raises(
        ValueError,
        match=f"batch_size={size} cannot be split evenly over 8 devices × "
        f"accumulation_steps={accumulation}; use a multiple of {8 * accumulation}, such as 8|16",
    ):
        check_batch_size(size, accumulation, mesh)
    check_batch_size(16, 2, mesh)
