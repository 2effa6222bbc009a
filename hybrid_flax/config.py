"""From a config to the things it names, with every value checked first.

The fields are made, and explained, in `configs/recipes.py`.
"""

import re

import jax.numpy as jnp
import ml_collections
from flax import nnx

from hybrid_flax.data.augmentation.policies import parse_policy
from hybrid_flax.data.images import FILTERS
from hybrid_flax.data.sources import Source
from hybrid_flax.errors import InputError
from hybrid_flax.layers import group_batch_norms
from hybrid_flax.models import registry
from hybrid_flax.training.optimizers import OPTIMIZERS
from hybrid_flax.training.schedules import SHAPES
from hybrid_flax.weights.functions import REMAT
from pallas.dispatch import IMPLEMENTATIONS


def _above(low):
    return lambda value: value > low, f"a number above {low}"


def _between(low, high):
    return lambda value: low <= value <= high, f"a number from {low} to {high}"


def _one_of(*choices):
    return lambda value: value in choices, f"one of {', '.join(map(repr, choices))}"


_not_negative = (lambda value: value >= 0, "a number from 0")
_below_one = (lambda value: 0 <= value < 1, "a number from 0 to below 1")


def _range_above_zero(value):
    return len(value) == 2 and 0 < value[0] <= value[1]


def _are_expressions(values):
    try:
        for value in values:
            re.compile(value)
    except (re.error, TypeError):
        return False
    return True


_CHECKS = {
    "batch_size": _above(0),
    "accumulation_steps": _above(0),
    "epochs": _above(0),
    "ema_decay": _below_one,
    "ema_warmup": _one_of(False, True),
    "log_every_steps": _above(0),
    "model.name": _one_of(*registry.list_models()),
    "model.dtype": _one_of("bfloat16", "float32"),
    "model.attention": _one_of(*IMPLEMENTATIONS),
    "model.remat": _one_of(*REMAT),
    "model.drop_path": _below_one,
    "model.num_classes": _above(-1),
    "model.batch_norm_group": _above(-1),
    "model.eval_mode": _one_of(False, True),
    "dataset.num_workers": _above(-1),
    "dataset.on_unreadable": _one_of("error", "skip"),
    "dataset.decode": _one_of("exact", "fast"),
    "augment.crop_scale": (
        lambda value: _range_above_zero(value) and value[1] <= 1,
        "(low, high) with 0 < low ≤ high ≤ 1",
    ),
    "augment.crop_ratio": (_range_above_zero, "(low, high) with 0 < low ≤ high"),
    "augment.interpolation": _one_of("random", *FILTERS),
    "augment.flip": _between(0, 1),
    "augment.vertical_flip": _between(0, 1),
    "augment.colour_jitter": (
        lambda value: len(value) == 4 and min(value) >= 0 and value[3] <= 0.5,
        "strengths (brightness, contrast, saturation, hue) from 0, the last up to 0.5",
    ),
    "augment.mixup_alpha": _above(-1e-9),
    "augment.cutmix_alpha": _above(-1e-9),
    "augment.cutmix_probability": _between(0, 1),
    "augment.mix_probability": _between(0, 1),
    "augment.mix_group": _above(-1),
    "augment.mix_off_epoch": _above(-1),
    "augment.erasing_probability": _between(0, 1),
    "augment.repeats": _above(0),
    "loss.name": _one_of("softmax", "gramian", "token_labelling"),
    "loss.label_smoothing": _below_one,
    "optimizer.name": _one_of(*OPTIMIZERS),
    "optimizer.learning_rate": _above(0),
    "optimizer.learning_rate_for_batch": _not_negative,
    "optimizer.b1": _below_one,
    "optimizer.b2": _below_one,
    "optimizer.eps": _above(0),
    "optimizer.momentum": _below_one,
    "optimizer.nesterov": _one_of(False, True),
    "optimizer.weight_decay": _not_negative,
    "optimizer.layer_decay": (lambda value: 0 < value <= 1, "a number above 0, up to 1 (off)"),
    "optimizer.freeze": (_are_expressions, "regular expressions"),
    "optimizer.decay_also": (_are_expressions, "regular expressions"),
    "optimizer.decay_never": (_are_expressions, "regular expressions"),
    "optimizer.clip_norm": _not_negative,
    "optimizer.clip_value": _not_negative,
    "optimizer.clip_adaptive": _not_negative,
    "schedule.name": _one_of(*SHAPES),
    "schedule.warmup_epochs": _not_negative,
    "schedule.warmup_learning_rate": _not_negative,
    "schedule.min_learning_rate": _not_negative,
    "schedule.step_epochs": _above(0),
    "schedule.step_factor": (lambda value: 0 < value < 1, "a number above 0 and below 1"),
    "schedule.decay_epochs": _above(0),
    "schedule.lag_epochs": _above(-1),
    "eval.batch_size": _above(0),
    "eval.every_epochs": _above(0),
    "eval.crop_fraction": (lambda value: 0 < value <= 1, "a number above 0, up to 1"),
    "eval.crop_mode": _one_of("center", "squash"),
    "eval.interpolation": _one_of(*FILTERS),
    "on_non_finite": _one_of("stop", "skip", "roll_back"),
    "non_finite_limit": _above(-1),
    "mesh.num_slices": _above(-1),
    "sharding.optimizer_over_data": _one_of(False, True),
    "checkpoint.every_steps": _above(0),
    "checkpoint.keep": _above(0),
    "checkpoint.keep_every_steps": _above(-1),
    "checkpoint.keep_best": _above(-1),
    "watchdog_seconds": _not_negative,
}


def check(config: ml_collections.ConfigDict) -> None:
    """Raises InputError naming every field whose value cannot be used."""
    problems = []
    for name, (is_fine, expected) in _CHECKS.items():
        value = config
        for part in name.split("."):
            value = value[part]
        if not is_fine(value):
            problems.append(f"--config.{name}={value!r}: expected {expected}")
    if problems:
        raise InputError("\n".join(problems))
    _check_label_maps(config)
    parse_policy(config.augment.auto_augment)
    _check_group(config, "augment.mix_group", config.batch_size)
    micro_batch = config.batch_size // config.accumulation_steps
    _check_group(config, "model.batch_norm_group", micro_batch)


def _check_label_maps(config) -> None:
    if not config.dataset.label_maps:
        return
    if config.loss.name != "token_labelling":
        raise InputError(
            f"--config.dataset.label_maps={config.dataset.label_maps}: loss "
            f"{config.loss.name!r} does not use them; take configs/glnet_4g_tklb.py or 9g"
        )
    if config.augment.mixup_alpha or config.augment.cutmix_alpha:
        raise InputError(
            "--config.dataset.label_maps: images with label maps are mixed inside the model; set "
            "--config.augment.mixup_alpha=0 and --config.augment.cutmix_alpha=0"
        )


def _check_group(config, name: str, images: int) -> None:
    """Groups must fill the images that they are made of; fewer images than one are one group."""
    section, field = name.split(".")
    group = config[section][field]
    if group and images > group and images % group:
        fitting = next(size for size in range(group, 0, -1) if images % size == 0)
        raise InputError(
            f"--config.{name}={group}: {images} images (--config.batch_size={config.batch_size}, "
            f"--config.accumulation_steps={config.accumulation_steps}) are not a multiple of it; "
            f"use 0 for one group of all, or for example {fitting}"
        )


def resolve_classes(config: ml_collections.ConfigDict, source: Source) -> ml_collections.ConfigDict:
    """A copy of the config whose `model.num_classes` is the dataset's where it was 0.

    Raises:
      InputError: the number is too small for the dataset.
    """
    config = ml_collections.ConfigDict(config)
    config.model.num_classes = config.model.num_classes or source.num_classes
    if config.model.num_classes < source.num_classes:
        raise InputError(
            f"--config.model.num_classes={config.model.num_classes}, but dataset "
            f"{config.dataset.name} has {source.num_classes} classes; leave it 0 for that number"
        )
    return config


def build_model(config: ml_collections.ConfigDict, *, rngs: nnx.Rngs) -> nnx.Module:
    """The model of a resolved config."""
    model = config.model
    built = registry.create_model(
        model.name,
        num_classes=model.num_classes,
        image_size=model.image_size,
        dtype=jnp.dtype(model.dtype),
        implementation=model.attention,
        rngs=rngs,
        **{"drop_path": model.drop_path, **model.overrides},
    )
    if model.batch_norm_group and not group_batch_norms(built, model.batch_norm_group):
        raise InputError(
            f"--config.model.batch_norm_group={model.batch_norm_group}, but {model.name} has no "
            "batch norms; use 0"
        )
    return built
