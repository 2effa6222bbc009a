"""Pooling of maps to a given size."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def adaptive_average_pool(
    x: Float[Array, "B H W C"], height: int, width: int
) -> Float[Array, "B {height} {width} C"]:
    """Means over a grid of height×width bins, as PyTorch's AdaptiveAvgPool2d, in float32.

    Bin i of n averages the rows ⌊i·H/n⌋ to ⌈(i+1)·H/n⌉ - 1, columns alike: where n does not divide
    H the bins are uneven and overlap.
    """
    rows, columns = _bins(x.shape[1], height), _bins(x.shape[2], width)
    pooled = jnp.einsum("ih,bhwc->biwc", rows, x.astype(jnp.float32))
    return jnp.einsum("jw,biwc->bijc", columns, pooled).astype(x.dtype)


def _bins(size: int, bins: int) -> np.ndarray:
    """[bins, size]: row i averages the places of bin i."""
    weights = np.zeros((bins, size), np.float32)
    for i in range(bins):
        start, stop = i * size // bins, -(-(i + 1) * size // bins)
        weights[i, start:stop] = 1 / (stop - start)
    return weights
