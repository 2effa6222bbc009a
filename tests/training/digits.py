"""Small models that train on the digits, each with its own recipe."""

import functools

import jax
from flax import nnx

import configs
from hybrid_flax.build import build_model, resolve_classes
from hybrid_flax.data.loader import train_batches
from hybrid_flax.data.sources import open_source
from hybrid_flax.data.transforms import TrainTransform
from hybrid_flax.distributed.batch import to_devices
from hybrid_flax.distributed.mesh import make_mesh, replicated
from hybrid_flax.settings import from_config, replace
from hybrid_flax.training.optimizers import make_optimizer
from hybrid_flax.training.schedules import make_schedule
from hybrid_flax.training.step import make_train_step, new_state
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_training_function

HEADS = {"gram_dim": 16, "heads": 2, "depths": (1, 1, 2, 1), "taps": 1}

# The config's model, shrunk: image size, and fields of the family's Variant.
MODELS = {
    "gcvit_xxt": (64, {"dim": 32, "depths": (2, 1, 1, 1)}),
    "l2vit_t": (32, {"dim": 32, "depths": (2, 1, 1, 1)}),
    "glnet_4g": (64, {"dim": 32, "depths": (1, 1, 1, 1)}),
    "glnet_4g_tklb": (64, {"dim": 32, "depths": (1, 1, 1, 1)}),
    "ga_convnext_t": (64, HEADS | {"dims": (16, 32, 32, 64)}),
    "unified_convnext_micro": (32, {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1)}),
    "unified_pvt_micro": (32, {"dims": (32, 32, 80, 64), "depths": (1, 1, 1, 1)}),
    "unified_swin_micro": (224, {"dims": (32, 32, 32, 32), "depths": (2, 1, 1, 1)}),
}


def prepare(name: str, batch_size: int, *, devices: int = 1, **changes):
    """(step, its first state, batches); `changes` by the config's field with "." as "__"."""
    config, source = _recipe(name)
    config = replace(
        config,
        {"batch_size": batch_size}
        | {field.replace("__", "."): value for field, value in changes.items()},
    )
    mesh = make_mesh(jax.devices()[:devices])
    model = bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, 1)
    optimizer = make_optimizer(config.optimizer, schedule, model.structure)
    step = make_train_step(as_training_function(model), optimizer, schedule, config, mesh)
    # A copy: the step consumes its state.
    state = jax.device_put(_first_state(name), replicated(mesh), may_alias=False)
    batches = train_batches(
        TrainTransform.from_config(config, source),
        batch_size=batch_size,
        seed=config.seed,
        start_step=0,
        num_workers=0,
    )
    on_devices = (
        to_devices({field: batch[field] for field in ("image", "label")}, mesh) for batch in batches
    )
    return step, state, on_devices


def _recipe(name: str):
    """(config, the digits)"""
    image_size, overrides = MODELS[name]
    config = configs.load(name)
    config.model.image_size = image_size
    config.model.dtype = "float32"
    with config.unlocked():
        config.model.overrides = overrides
    config.dataset.name = "digits"
    config.dataset.num_workers = 0
    source = open_source("digits", "", "train")
    return resolve_classes(from_config(config), source), source


@functools.cache
def _first_state(name: str):
    config, _ = _recipe(name)

    @jax.jit
    def begin():
        model = build_model(config, rngs=nnx.Rngs(0))
        weights = bridge.get_weights(model)
        optimizer = make_optimizer(config.optimizer, lambda step: 0.0, model.structure)
        return new_state(weights, optimizer, config.ema_decay)

    return begin()
