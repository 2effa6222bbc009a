"""Stochastic depth (Huang et al., 2016, arXiv:1603.09382)."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def drop_path(
    branch: Float[Array, "B ..."], rate: float | Float[Array, ""], key: jax.Array | None
) -> Float[Array, "B ..."]:
    """Zeroes the residual branch of a random subset of images and rescales the others.

    Args:
      branch: [B, ...], what the residual block is about to add.
      rate: probability that an image loses its branch. Kept branches are divided by 1 - rate, so
        that the expectation is the undropped branch.
      key: PRNG key, a different one for every branch; None switches dropping off (evaluation).
    """
    if key is None or (isinstance(rate, float | int) and rate == 0):
        return branch
    kept = 1 - rate
    keep = jax.random.bernoulli(key, kept, (branch.shape[0],) + (1,) * (branch.ndim - 1))
    if isinstance(kept, jax.Array):  # in a scan over blocks
        kept = kept.astype(branch.dtype)
    return jnp.where(keep, branch / kept, jnp.zeros_like(branch))


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """A rate for each block of each stage, rising linearly from 0 to `rate` over all of them."""
    last = max(sum(depths) - 1, 1)
    rates = iter([rate * index / last for index in range(sum(depths))])
    return [list(itertools.islice(rates, depth)) for depth in depths]


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """`count` keys; without a key (evaluation) as many Nones."""
    return [None] * count if key is None else list(jax.random.split(key, count))
