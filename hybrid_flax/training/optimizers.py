"""Learning-rate schedules and optimizers, from the config's numbers."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from hybrid_flax import bridge
from hybrid_flax.errors import InputError
from hybrid_flax.training import Config

Schedule = Callable[[jax.Array], jax.Array]  # optimizer step, from 0 → learning rate


def cosine_schedule(config: Config, peak: float, steps_per_epoch: int) -> Schedule:
    """Linear warm-up, then half a cosine, then the minimum.

    Args:
      config: `warmup_epochs`, `warmup_learning_rate` (at step 0), `min_learning_rate`,
        `cosine_epochs` (the epoch at which the cosine reaches the minimum) and
        - `cosine_from_start`: whether the cosine is counted from step 0, the warm-up only covering
          its beginning, or from the end of the warm-up;
        - `warmup_reaches_peak`: whether the last step of the warm-up already has the peak rate, or
          the first step after it;
        - `each_epoch`: whether the rate changes only between epochs;
        - `lag_epochs`: how many epochs late it changes.
      peak: the learning rate the cosine starts from.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    start = 0 if config.cosine_from_start else warmup
    end = round(config.cosine_epochs * steps_per_epoch)
    if end <= max(start, warmup):
        raise InputError(
            f"schedule: cosine_epochs={config.cosine_epochs} ends before the warm-up of "
            f"{config.warmup_epochs} epochs does; choose more cosine epochs"
        )
    low = config.min_learning_rate
    rise = (peak - config.warmup_learning_rate) / max(warmup - config.warmup_reaches_peak, 1)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        if config.each_epoch:
            step = jnp.floor(step / steps_per_epoch) * steps_per_epoch
        step = jnp.maximum(step - config.lag_epochs * steps_per_epoch, 0)
        progress = jnp.clip((step - start) / (end - start), 0, 1)
        cosine = low + (peak - low) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, config.warmup_learning_rate + rise * step, cosine)

    return schedule


def make_optimizer(config: Config, schedule: Schedule) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW or LAMB with decoupled decay of some parameters.

    `config.name` is "adamw" or "lamb" (arXiv:1904.00962). LAMB's layer-wise ratio applies to the
    decayed parameters only, as in timm.
    """

    def mask(params):
        return decayed(params, config)

    steps = [
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.name == "lamb":
        steps.insert(2, optax.masked(optax.scale_by_trust_ratio(), mask))
    if config.clip_norm:
        steps.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*steps)


def decayed(params, config: Config):
    """Tree of booleans: which parameters weight decay applies to.

    Those of rank 2 or more: biases, norms and layer scales have rank 1. The regular expressions in
    `config.decay_also` and `config.decay_never`, on paths like `stages/0/norm/scale`, make
    exceptions; the authors' grouping goes by the rank in PyTorch, which differs in places.

    Raises:
      InputError: an expression that matches no parameter.
    """
    flat = bridge.flatten(params)
    for name in ("decay_also", "decay_never"):
        for pattern in getattr(config, name):
            if not any(re.search(pattern, path) for path in flat):
                raise InputError(
                    f"--config.optimizer.{name}: {pattern!r} matches no parameter of this model; "
                    "parameters.txt in the work directory lists them"
                )

    def decays(path, leaf):
        if any(re.search(pattern, path) for pattern in config.decay_never):
            return False
        return leaf.ndim > 1 or any(re.search(pattern, path) for pattern in config.decay_also)

    return bridge.unflatten_like(params, {path: decays(path, leaf) for path, leaf in flat.items()})
