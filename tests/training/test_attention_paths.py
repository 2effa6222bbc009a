"""Whole training steps with the kernels, interpreted, and with XLA, on the digits."""

import importlib
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from hybrid_flax import bridge
from hybrid_flax.config import build_model, check, resolve_classes
from hybrid_flax.data.loader import TrainTransform, train_batches
from hybrid_flax.data.sources import open_source
from hybrid_flax.distributed.mesh import make_mesh, replicated, to_devices
from hybrid_flax.training.optimizers import cosine_schedule, make_optimizer
from hybrid_flax.training.step import make_train_step, new_state
from pallas.window_attention import tpu_tiles

STEPS = 20

# Image size, and fields of the Variant that make the model small.
MODELS = {
    "gcvit_xxt": (64, {"dim": 32, "depths": (2, 1, 1, 1)}),
    "unified_swin_micro": (224, {"dims": (32, 32, 32, 32), "depths": (2, 1, 1, 1)}),
}


def prepare(name: str, attention: str, devices: int, images: int):
    """(step, its state, batches) of a small model with its own recipe, but for the attention."""
    image_size, overrides = MODELS[name]
    config = importlib.import_module(f"configs.{name}").get_config()
    config.model.image_size = image_size
    config.model.dtype = "float32"
    config.model.attention = attention
    with config.unlocked():
        config.model.overrides = overrides
    config.dataset.name = "digits"
    config.dataset.num_workers = 0
    config.batch_size = images
    config.optimizer.learning_rate = 1e-3
    check(config)
    source = open_source("digits", "", "train")
    resolve_classes(config, source)

    mesh = make_mesh(jax.devices()[:devices])
    model = bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))
    schedule = cosine_schedule(config.schedule, config.optimizer.learning_rate, 1)
    optimizer = make_optimizer(config.optimizer, schedule)

    @jax.jit
    def begin():
        weights = bridge.get_weights(build_model(config, rngs=nnx.Rngs(0)))
        return new_state(weights, optimizer, config.ema_decay)

    state = jax.device_put(begin(), replicated(mesh))
    step = make_train_step(bridge.as_training_function(model), optimizer, schedule, config, mesh)
    batches = train_batches(
        TrainTransform.from_config(config, source),
        batch_size=images,
        seed=config.seed,
        start_step=0,
        num_workers=0,
    )
    on_devices = (
        to_devices({field: batch[field] for field in ("image", "label")}, mesh) for batch in batches
    )
    return step, state, on_devices


@pytest.fixture(autouse=True)
def one_window_at_a_time(monkeypatch):
    """In the schedule: it compiles faster."""
    monkeypatch.setattr(tpu_tiles, "UNROLLED_TOKENS", 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_curve_is_the_same_on_every_path(name):
    curves = {}
    for attention in ("pallas", "xla"):
        step, state, batches = prepare(name, attention, devices=1, images=2)
        losses = curves[attention] = []
        for batch in itertools.islice(batches, STEPS):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(curves["pallas"], curves["xla"], rtol=1e-5)
    assert len(set(curves["xla"])) == STEPS


def test_a_step_on_eight_devices_gathers_no_batch():
    step, state, batches = prepare("gcvit_xxt", "pallas", devices=8, images=8)
    text = step.lower(state, next(batches)).compile().as_text()
    assert "all-reduce" in text  # of the gradients
    assert "all-gather" not in text
    assert "all-to-all" not in text
