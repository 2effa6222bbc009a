"""Learning-rate schedules and optimizers, from the config's numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import optax

from hybrid_flax.errors import InputError

Schedule = Callable[[jax.Array], jax.Array]  # optimizer step, from 0 → learning rate


def cosine_schedule(
    config: ml_collections.ConfigDict, peak: float, steps_per_epoch: int
) -> Schedule:
    """Linear warm-up, then half a cosine, then the minimum, changing every step.

    Args:
      config: `warmup_epochs`, `warmup_learning_rate` (at step 0), `min_learning_rate`,
        `cosine_epochs` (the epoch at which the cosine reaches the minimum) and
        `cosine_from_start`: whether the cosine is counted from step 0, the warm-up only covering
        its beginning (GC ViT), or from the end of the warm-up.
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

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rise = (peak - config.warmup_learning_rate) / max(warmup, 1)
        progress = jnp.clip((step - start) / (end - start), 0, 1)
        low = config.min_learning_rate
        cosine = low + (peak - low) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, config.warmup_learning_rate + rise * step, cosine)

    return schedule


def adamw(config: ml_collections.ConfigDict, schedule: Schedule) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW with decoupled decay of every parameter of rank 2 or more.

    Biases, norms and layer scales have rank 1 and are not decayed; relative position bias tables
    have rank 2 and are, as in the authors' training (timm's grouping).
    """
    steps = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    steps.append(
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
    )
    return optax.chain(*steps)


def decayed(params):
    """Tree of booleans: which parameters weight decay applies to."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
