"""Learned positions: relative bias tables (Swin, arXiv:2103.14030, section 3.2) and maps."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def relative_position_index(window: int) -> np.ndarray:
    """Row of the bias table for every pair of tokens of a w×w window; int64 [w², w²].

    Entry (i, j), query i and key j, both numbered row-major, is
    (row_i - row_j + w - 1)·(2w - 1) + (column_i - column_j + w - 1).
    """
    rows, columns = np.divmod(np.arange(window * window), window)
    row_offset = rows[:, None] - rows[None, :] + window - 1
    column_offset = columns[:, None] - columns[None, :] + window - 1
    return row_offset * (2 * window - 1) + column_offset


def relative_position_bias(
    table: Float[Array, "positions heads"], window: int
) -> Float[Array, "heads N N"]:
    """Looks up what is added to scores in a w×w window; [(2w - 1)², heads] → [h, w², w²].

    See `relative_position_index`.
    """
    return table[relative_position_index(window)].transpose(2, 0, 1)


def resize_relative_position_bias(
    table: Float[Array, "positions heads"], window: int
) -> Float[Array, "new_positions heads"]:
    """Fits a bias table to another window size; [(2v - 1)², heads] → [(2w - 1)², heads].

    Bicubic, corners not aligned, as PyTorch's `interpolate` does and as the authors' detection code
    resizes its tables.
    """
    size, heads = round(len(table) ** 0.5), table.shape[-1]
    new_size = 2 * window - 1
    square = jax.image.resize(
        jnp.reshape(table, (size, size, heads)),
        (new_size, new_size, heads),
        method="cubic-pytorch",
        antialias=False,
    )
    return square.reshape(new_size * new_size, heads)


def resize_position_map(
    x: Float[Array, "H W C"], height: int, width: int
) -> Float[Array, "{height} {width} C"]:
    """Bilinear, corner pixels on corner pixels, as the official code fits position maps."""
    if x.shape[:2] == (height, width):
        return x
    rows, columns = _between(x.shape[0], height), _between(x.shape[1], width)
    return jnp.einsum("ih,jw,hwc->ijc", rows, columns, x)


def _between(size: int, new_size: int) -> np.ndarray:
    """[new_size, size]: the two places between which each new place lies, weighted."""
    places = np.linspace(0, size - 1, new_size)[:, None]
    return np.maximum(1 - np.abs(places - np.arange(size)), 0).astype(np.float32)
