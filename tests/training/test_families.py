"""Every kind of model takes training steps with its own recipe, on small digits.

GC ViT does in test_train.py, through checkpoints and evaluation, Swin in test_attention_paths.py.
"""

import importlib

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
from hybrid_flax.training.step import make_train_step, new_state, weights_of

HEADS = {"gram_dim": 16, "heads": 2}
STAGES = HEADS | {"depths": (1, 1, 2, 1), "taps": 1}

# The config's model, shrunk: image size, and fields of the family's Variant.
MODELS = {
    "l2vit_t": (32, {"dim": 32, "depths": (2, 1, 1, 1)}),
    "glnet_4g_tklb": (64, {"dim": 32, "depths": (1, 1, 2, 1)}),
    "ga_convnext_t": (64, STAGES | {"dims": (16, 32, 32, 64)}),
    "ga_vit_s": (64, HEADS | {"dim": 64, "depth": 2, "head_channels": 2}),
    "unified_convnext_micro": (32, {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1)}),
    "unified_halonet_micro": (224, {"dims": (32, 32, 32, 32), "depths": (1, 1, 1, 1)}),
    "unified_internimage_micro": (32, {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1)}),
    "unified_pvt_micro": (32, {"dims": (32, 32, 80, 64), "depths": (1, 1, 1, 1)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_two_steps_on_the_digits(name):
    image_size, overrides = MODELS[name]
    config = importlib.import_module(f"configs.{name}").get_config()
    config.model.image_size = image_size
    config.model.dtype = "float32"
    with config.unlocked():
        config.model.overrides = overrides
    config.dataset.name = "digits"
    config.dataset.num_workers = 0
    config.batch_size = 8
    config.epochs = 1
    check(config)
    source = open_source("digits", "", "train")
    resolve_classes(config, source)

    mesh = make_mesh(jax.devices()[:1])
    model = bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))
    schedule = cosine_schedule(config.schedule, config.optimizer.learning_rate, 2)
    optimizer = make_optimizer(config.optimizer, schedule)

    @jax.jit
    def begin():
        weights = bridge.get_weights(build_model(config, rngs=nnx.Rngs(0)))
        return new_state(weights, optimizer, config.ema_decay)

    state = jax.device_put(begin(), replicated(mesh))
    before = jax.device_get(weights_of(state))
    step = make_train_step(bridge.as_training_function(model), optimizer, schedule, config, mesh)
    batches = train_batches(
        TrainTransform.from_config(config, source),
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=0,
        num_workers=0,
    )
    losses = []
    for _ in range(2):
        batch = next(batches)
        batch = to_devices({field: batch[field] for field in ("image", "label")}, mesh)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        assert np.isfinite(metrics["grad_norm"])
        assert metrics["grad_norm"] > 0
    batches.close()

    # A fresh classifier knows nothing: ln 10, or for the heads' binary losses ln 2 each.
    expected = 2 * np.log(2) if name.startswith("ga") else np.log(10)
    expected *= 1.5 if name.endswith("tklb") else 1
    assert losses[0] == pytest.approx(expected, rel=0.35)
    after = bridge.flatten(jax.device_get(weights_of(state)))
    moved = [path for path, old in bridge.flatten(before).items() if (after[path] != old).any()]
    assert len(moved) > 0.9 * len(after)
    counts = [value for path, value in after.items() if path.endswith("/count")]
    assert all(count == 2 for count in counts)
    assert counts
