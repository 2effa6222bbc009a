"""Learning-rate schedules, from the config's numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybrid_flax.errors import InputError
from hybrid_flax.settings import Optimizer
from hybrid_flax.settings import Schedule as ScheduleSettings

Schedule = Callable[[jax.Array], jax.Array]  # optimizer step, from 0 → learning rate


def peak_learning_rate(config: Optimizer, batch_size: int) -> float:
    """Scales `learning_rate` linearly if `learning_rate_for_batch` says for which batch it is.

    The scaling rule of arXiv:1706.02677. The rates that a schedule starts and ends with are not
    scaled.
    """
    if not config.learning_rate_for_batch:
        return config.learning_rate
    return config.learning_rate * batch_size / config.learning_rate_for_batch


def make_schedule(config: ScheduleSettings, peak: float, steps_per_epoch: int) -> Schedule:
    """Makes a linear warm-up, then a way from the peak down to the minimum, then the minimum.

    Args:
      config: `warmup_epochs`, `warmup_learning_rate` (at step 0), `min_learning_rate`,
        `decay_epochs` (the epoch at which the minimum is reached), `name`:
        - `cosine`: half a cosine;
        - `linear`: a straight line;
        - `constant`: the peak, to the end;
        - `step`: `step_factor` times less every `step_epochs`, never less than the minimum;
        - `onecycle`: straight lines from 0 to the peak at 40 % of `decay_epochs`, to a twentieth of
          it at 80 %, to 0; it has no other warm-up and no minimum;
        and what the papers do differently:
        - `decay_from_start`: whether that way is counted from step 0, the warm-up only covering its
          beginning, or from the end of the warm-up;
        - `warmup_reaches_peak`: whether the last step of the warm-up already has the peak rate, or
          the first step after it;
        - `each_epoch`: whether the rate changes only between epochs;
        - `lag_epochs`: how many epochs late it changes.
      peak: the learning rate at the end of the warm-up.

    Raises:
      InputError: the warm-up lasts longer than the whole, or is asked of `onecycle`.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    start = 0 if config.decay_from_start else warmup
    end = round(config.decay_epochs * steps_per_epoch)
    if end <= max(start, warmup):
        raise InputError(
            f"schedule: decay_epochs={config.decay_epochs} ends before the warm-up of "
            f"{config.warmup_epochs} epochs does; choose more decay epochs"
        )
    if config.name == "onecycle" and warmup:
        raise InputError(
            f"schedule: onecycle rises for 40 % of its epochs by itself; set warmup_epochs=0 in "
            f"place of {config.warmup_epochs}"
        )
    low = config.min_learning_rate
    rise = (peak - config.warmup_learning_rate) / max(warmup - config.warmup_reaches_peak, 1)

    def after_warmup(step):
        progress = jnp.clip((step - start) / (end - start), 0, 1)
        if config.name == "cosine":
            return low + (peak - low) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        if config.name == "linear":
            return peak + (low - peak) * progress
        if config.name == "constant":
            return jnp.full_like(step, peak)
        if config.name == "step":
            drops = jnp.floor((step - start) / (config.step_epochs * steps_per_epoch))
            return jnp.maximum(low, peak * config.step_factor**drops)
        if config.name == "onecycle":
            corners = jnp.asarray([0.0, 0.4, 0.8, 1.0]), jnp.asarray([0, peak, peak / 20, 0.0])
            return jnp.interp(progress, *corners)
        raise InputError(f"schedule.name={config.name!r} has no shape in make_schedule: add it")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        if config.each_epoch:
            step = jnp.floor(step / steps_per_epoch) * steps_per_epoch
        step = jnp.maximum(step - config.lag_epochs * steps_per_epoch, 0)
        warming = config.warmup_learning_rate + rise * step
        return jnp.where(step < warmup, warming, after_warmup(step))

    return schedule
