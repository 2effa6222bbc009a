"""Settings that cannot be used together, and those that have no effect beside others."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from hybrid_flax.settings.sections import Settings

LARGEST_RESIZE = 32768  # pixels: side of the image that evaluation cuts its crop from


def impossible(settings: Settings) -> Iterator[str]:
    """A message for each combination of values that cannot be used."""
    augment, model, evaluation = settings.augment, settings.model, settings.eval
    if settings.dataset.label_maps and (augment.mixup_alpha or augment.cutmix_alpha):
        yield (
            "--config.dataset.label_maps: images with label maps are mixed inside the model; set "
            "--config.augment.mixup_alpha=0 and --config.augment.cutmix_alpha=0"
        )
    if settings.init_class_map and not settings.init_from:
        yield (
            "--config.init_class_map: there are no weights whose rows it could choose; name them "
            "with --config.init_from"
        )
    if "drop_path" in model.overrides:
        yield (
            "--config.model.overrides.drop_path: this is a setting of its own, use "
            "--config.model.drop_path"
        )
    if model.image_size / evaluation.crop_fraction > LARGEST_RESIZE:
        yield (
            f"--config.eval.crop_fraction={evaluation.crop_fraction}: for a crop of "
            f"--config.model.image_size={model.image_size} pixels images would be scaled to more "
            f"than {LARGEST_RESIZE}; use a larger fraction"
        )
    micro_batch = settings.batch_size // settings.accumulation_steps
    for name, group, images in (
        ("augment.mix_group", augment.mix_group, settings.batch_size),
        ("model.batch_norm_group", model.batch_norm_group, micro_batch),
    ):
        # Groups must fill the images that they are made of; fewer images than one are one group.
        if group and images > group and images % group:
            fitting = next(size for size in range(group, 0, -1) if images % size == 0)
            yield (
                f"--config.{name}={group}: {images} images "
                f"(--config.batch_size={settings.batch_size}, "
                f"--config.accumulation_steps={settings.accumulation_steps}) are not a multiple of "
                f"it; use 0 for one group of all, or for example {fitting}"
            )


class Need(NamedTuple):
    """What some settings need to have an effect."""

    fields: tuple[str, ...]
    met: Callable[[Settings], object]
    words: str


def _mixes(settings: Settings) -> bool:
    return settings.augment.mixup_alpha > 0 or settings.augment.cutmix_alpha > 0


def _optimizer(*names: str) -> Callable[[Settings], bool]:
    return lambda settings: settings.optimizer.name in names


NEEDS = (
    Need(
        ("augment.cutmix_probability",),
        lambda s: s.augment.mixup_alpha and s.augment.cutmix_alpha,
        "it chooses between mixup and cutmix, and one of their α is 0",
    ),
    Need(
        ("augment.mix_probability", "augment.mix_group", "augment.mix_off_epoch"),
        _mixes,
        "nothing is mixed: augment.mixup_alpha and augment.cutmix_alpha are 0",
    ),
    Need(
        ("augment.mix_off_epoch",),
        lambda s: s.augment.mix_off_epoch < s.epochs,
        "the run has no more epochs than that",
    ),
    Need(
        ("augment.colour_jitter",),
        lambda s: not s.augment.auto_augment or s.augment.auto_augment.startswith("3a"),
        "a policy changes colours itself; leave augment.auto_augment empty, or take 3a",
    ),
    Need(
        ("dataset.path",), lambda s: s.dataset.name != "digits", "the digits come with scikit-learn"
    ),
    Need(
        ("dataset.index",),
        lambda s: s.dataset.name == "tar_shards",
        "only tar_shards have an index",
    ),
    Need(
        ("loss.diversity",),
        lambda s: s.model.name.startswith("ga_"),
        "only models with Gramian heads (ga_*) have this part of the loss",
    ),
    Need(
        ("loss.dense_weight", "loss.transposed_crops"),
        lambda s: s.model.name.endswith("_tklb"),
        "only token-labelled models (glnet_*_tklb) have this part of the loss",
    ),
    Need(("loss.transposed_crops",), lambda s: s.dataset.label_maps, "there are no label maps"),
    Need(
        ("model.drop_path", "model.batch_norm_group"),
        lambda s: not s.model.eval_mode,
        "model.eval_mode trains as in evaluation",
    ),
    Need(
        ("optimizer.b1", "optimizer.b2"),
        _optimizer("adamw", "lamb", "lion"),
        "optimizer.name is another rule",
    ),
    Need(("optimizer.eps",), _optimizer("adamw", "lamb"), "optimizer.name is another rule"),
    Need(
        ("optimizer.momentum", "optimizer.nesterov"),
        _optimizer("sgd"),
        "optimizer.name is another rule",
    ),
    Need(
        ("schedule.step_epochs", "schedule.step_factor"),
        lambda s: s.schedule.name == "step",
        "only the schedule step has it",
    ),
    Need(
        ("schedule.min_learning_rate",),
        lambda s: s.schedule.name not in ("constant", "onecycle"),
        "schedule.name is one without a minimum",
    ),
    Need(
        ("schedule.decay_epochs", "schedule.decay_from_start"),
        lambda s: s.schedule.name != "constant",
        "schedule.name=constant keeps the peak",
    ),
    Need(
        ("schedule.warmup_learning_rate", "schedule.warmup_reaches_peak"),
        lambda s: s.schedule.warmup_epochs,
        "there is no warm-up: schedule.warmup_epochs is 0",
    ),
    Need(("optimizer.nesterov",), lambda s: s.optimizer.momentum, "there is no momentum"),
    Need(
        ("optimizer.decay_also", "optimizer.decay_never"),
        lambda s: s.optimizer.weight_decay or s.optimizer.name == "lamb",
        "nothing decays: optimizer.weight_decay is 0",
    ),
    Need(("ema_warmup",), lambda s: s.ema_decay, "there is no average: ema_decay is 0"),
    Need(
        ("non_finite_limit",),
        lambda s: s.on_non_finite != "stop",
        "on_non_finite=stop ends the run at the first",
    ),
)


def without_effect(settings: Settings, defaults: dict[str, object]) -> Iterator[str]:
    """A sentence for each setting that was chosen and changes nothing beside the others.

    Args:
      defaults: {dotted name: default}; what has it, or is off, was not chosen.
    """
    for need in NEEDS:
        if need.met(settings):
            continue
        for name in need.fields:
            section, _, field = name.rpartition(".")
            value = getattr(getattr(settings, section) if section else settings, field)
            chosen = any(value) if isinstance(value, tuple) else bool(value)
            if chosen and value != defaults[name]:
                yield f"--config.{name}={value!r} has no effect: {need.words}"


def cut_short(settings: Settings) -> Iterator[str]:
    """A sentence for each part of the learning rate's way that the run ends before."""
    schedule, epochs = settings.schedule, settings.epochs
    if epochs <= schedule.warmup_epochs:
        yield (
            f"--config.epochs={epochs}: the run ends within the warm-up of "
            f"--config.schedule.warmup_epochs={schedule.warmup_epochs:g}, before the learning rate "
            "is at its peak"
        )
    elif epochs < schedule.decay_epochs and schedule.name in ("cosine", "linear", "onecycle"):
        yield (
            f"--config.epochs={epochs}: the run ends before the learning rate is at its minimum; "
            f"for that also set --config.schedule.decay_epochs={epochs} "
            f"(it is {schedule.decay_epochs:g})"
        )
