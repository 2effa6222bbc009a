"""Checks that every model makes of its input."""

from typing import Any

import jax
import jax.numpy as jnp

from hybrid_flax.errors import InputError


def check_images(images: Any) -> None:
    """Raises InputError unless they are an array of floats [B, H, W, 3]."""
    try:
        shape, dtype = tuple(images.shape), jnp.dtype(images.dtype)
    except (AttributeError, TypeError) as error:  # the latter of another library's array
        kind = type(images)
        raise InputError(
            f"images must be an array [B, H, W, 3] of JAX or NumPy, not {kind.__module__}."
            f"{kind.__name__}"
        ) from error
    if len(shape) != 4 or shape[-1] != 3 or not all(shape):
        raise InputError(
            f"images must be [B, H, W, 3] (RGB, channels last), at least one, got shape {shape}"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"images must be normalised floats, not {dtype}: "
            "hybrid_flax.data.model_input makes them from pictures, normalise from pixels"
        )


def training_key(train: bool, key: jax.Array | None) -> jax.Array | None:
    """The key if training, which needs one; None in evaluation, whatever was given."""
    if train and key is None:
        raise InputError("train=True needs key=, a PRNG key, for drop path")
    return key if train else None
