"""Stochastic depth (Huang et al., 2016, arXiv:1603.09382)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def drop_path(
    branch: Float[Array, "B ..."], rate: float, key: jax.Array | None
) -> Float[Array, "B ..."]:
    """Zeroes the residual branch of a random subset of images and rescales the others.

    Args:
      branch: [B, ...], what the residual block is about to add.
      rate: probability that an image loses its branch. Kept branches are divided by 1 - rate, so
        that the expectation is the undropped branch.
      key: PRNG key, a different one for every branch; None switches dropping off (evaluation).
    """
    if key is None or rate == 0:
        return branch
    keep = jax.random.bernoulli(key, 1 - rate, (branch.shape[0],) + (1,) * (branch.ndim - 1))
    return jnp.where(keep, branch / (1 - rate), jnp.zeros_like(branch))
