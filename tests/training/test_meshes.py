"""The same step on every mesh: what is learned does not depend on where the arrays lie.

The model has batch norms, and images are mixed in groups that lie across the devices.
"""

import functools
import importlib

import jax
import numpy as np
import pytest
from flax import nnx

from hybrid_flax.build import build_model, training_program
from hybrid_flax.distributed.batch import to_devices
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.distributed.transfer import put
from hybrid_flax.settings import from_config
from hybrid_flax.training.step import weights_of
from hybrid_flax.weights import bridge
from hybrid_flax.weights.paths import flatten, unflatten_like


def config(**overrides):
    config = importlib.import_module("configs.l2vit_t").get_config()
    with config.unlocked():
        config.model.overrides = {"dim": 32, "depths": (1, 1, 1, 1)}
    config.model.num_classes = 10
    config.model.image_size = 32
    config.model.dtype = "float32"
    config.batch_size = 16
    config.augment.mix_group = 4
    config.optimizer.name = "sgd"  # Adam's first steps make whole numbers of rounding errors
    config.optimizer.learning_rate = 1e-2
    config.schedule.warmup_epochs = 0.0
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in overrides.items()}
    )
    return from_config(config)


@functools.cache
def weights():
    model = build_model(config(), rngs=nnx.Rngs(0))
    return jax.device_get(bridge.get_weights(model))


def batch(seed):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, 16, dtype=np.int32),
    }


def run(count=8, **overrides):
    """([(loss, gradient norm)], final state) of two steps."""
    settings = config(**overrides)
    mesh = make_mesh(jax.devices()[:count], **vars(settings.mesh))
    program = training_program(settings, mesh, 10)
    state = put(jax.jit(program.begin)(weights()), program.shardings)
    metrics = []
    for seed in range(2):
        state, found = program.train_step(state, to_devices(batch(seed), mesh))
        metrics.append((float(found["loss"]), float(found["grad_norm"])))
    return metrics, state


def evaluated(state, count=8, **overrides):
    """Sums over a batch of the trained and of the averaged weights."""
    settings = config(**overrides)
    mesh = make_mesh(jax.devices()[:count], **vars(settings.mesh))
    program = training_program(settings, mesh, 10)
    images = to_devices(batch(9) | {"mask": np.ones(16, np.float32)}, mesh)
    both = weights_of(state), state["ema"]
    return jax.device_get([program.eval_step(weights, images) for weights in both])


@functools.cache
def one_device(accumulation_steps):
    metrics, state = run(1, accumulation_steps=accumulation_steps)
    return metrics, jax.device_get(flatten(state))


@pytest.mark.parametrize(
    ("overrides", "kernel"),
    [
        pytest.param({}, (64, 256), marks=pytest.mark.slow),
        pytest.param({"mesh__fsdp": 8}, (64, 32), marks=pytest.mark.slow),
        ({"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, (32, 128)),
        pytest.param(
            {"sharding__optimizer_over_data": True, "model__remat": "blocks"},
            (64, 256),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"mesh__num_slices": 2, "mesh__fsdp": 4, "accumulation_steps": 2},
            (64, 64),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_every_mesh_learns_the_same(overrides, kernel):
    want, state_wanted = one_device(overrides.get("accumulation_steps", 1))
    got, state = run(**overrides)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    flat = flatten(state)
    for path, array in state_wanted.items():
        scale = np.abs(array).max() + 1e-3
        np.testing.assert_allclose(
            np.asarray(flat[path]) / scale, array / scale, atol=1e-3, err_msg=path
        )
    fc1 = "stages/1/blocks/0/mlp/fc1/kernel"
    assert flat[f"params/{fc1}"].addressable_shards[0].data.shape == kernel
    if overrides.keys() & {"sharding__optimizer_over_data", "mesh__tensor"}:
        want = evaluated(unflatten_like(state, state_wanted), 1)
        for got, sums in zip(evaluated(state, **overrides), want, strict=True):
            assert got["loss"] == pytest.approx(sums["loss"], rel=1e-3)
            assert got["images"] == sums["images"] == 16
    if "sharding__optimizer_over_data" in overrides:
        assert flat[f"ema/params/{fc1}"].addressable_shards[0].data.shape == (64, 32)
