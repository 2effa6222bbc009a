"""Checks that every model makes of its input."""

import jax

from hybrid_flax.errors import InputError


def check_images(shape: tuple[int, ...]) -> None:
    """Raises InputError unless the shape is [B, H, W, 3]."""
    if len(shape) != 4 or shape[-1] != 3:
        raise InputError(f"images must be [B, H, W, 3] (RGB, channels last), got shape {shape}")


def training_key(train: bool, key: jax.Array | None) -> jax.Array | None:
    """The key if training, which needs one; None in evaluation, whatever was given."""
    if train and key is None:
        raise InputError("train=True needs key=, a PRNG key, for drop path")
    return key if train else None
