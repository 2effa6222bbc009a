"""Shifted-window attention (Swin Transformer, arXiv:2103.14030, section 3.2).

Shapes: w×w window, N = w² tokens, h heads of d channels.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    attention,
    linear,
    merge_windows,
    normal_init,
    pad_to_multiple,
    partition_windows,
    relative_position_index,
)
from hybrid_flax.models.unified.mixer import Mixer, Place

HEAD_DIM = 32
WINDOW = 7
SHIFT = 3  # of every other block


def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """What is added to the scores of a rolled map; float32 [windows, N, N], 0 or -100.

    Rolling brings together, in the last row and column of windows, what lies on opposite borders.
    """
    axes = []
    for size in (height, width):
        labels = np.zeros(size, np.int32)
        labels[size - window : size - shift], labels[size - shift :] = 1, 2
        axes.append(labels.reshape(-1, window))
    rows, columns = axes
    labels = 3 * rows[:, None, :, None] + columns[None, :, None, :]
    labels = labels.reshape(-1, window * window)  # [windows, N]
    return np.where(labels[:, :, None] == labels[:, None, :], np.float32(0), np.float32(-100))


def shifted_window_attention(
    query: Float[Array, "B H W h d"],
    key: Float[Array, "B H W h d"],
    value: Float[Array, "B H W h d"],
    bias_table: Float[Array, "positions h"],
    *,
    window: int,
    shift: int,
) -> Float[Array, "B H W h d"]:
    """Attention inside w×w windows that begin at (shift, shift); [B, H, W, h, d] → the same.

    Args:
      query, key, value: [B, H, W, h, d]; H and W are multiples of w.
      bias_table: [(2w - 1)², h], see `layers.relative_position_index`.
      shift: 0 to w - 1. The windows go on at the opposite border, where tokens see only those that
        were their neighbours on the map.
    """
    _, height, width, heads, dim = query.shape

    def split(x: Array) -> Array:
        if shift:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
        x = partition_windows(x.reshape(*x.shape[:3], -1), window)
        return x.reshape(*x.shape[:3], heads, dim)  # [B, windows, N, h, d]

    bias = bias_table[relative_position_index(window)].transpose(2, 0, 1)[None]  # [1, h, N, N]
    if shift:
        bias = bias + shift_mask(height, width, window, shift)[:, None]
    out = attention(split(query), split(key), split(value), bias)
    out = merge_windows(out.reshape(*out.shape[:3], -1), height, width)
    out = out.reshape(*out.shape[:3], heads, dim)
    return jnp.roll(out, (shift, shift), (1, 2)) if shift else out


def _window(side: int) -> int:
    """Of a stage whose map has this side at the size that the model is built for."""
    return min(WINDOW, side)


class ShiftedWindowAttention(Mixer):
    """Multi-head attention in 7×7 windows, shifted by 3 in every other block; heads of 32 channels.

    Where the map of the size the model is built for is no larger than a window, the window becomes
    the map, and is not shifted (but for detection, where both stay). A model can take any images
    whose maps are made of whole windows; the official classifier masks the borders of other sizes
    than its own wrongly. For detection maps are filled up with zeros on the right and at the
    bottom before the projections, unmasked, as in the official code.
    """

    def __init__(self, dim: int, place: Place, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = dim // HEAD_DIM
        self.window = WINDOW if place.detection else _window(place.side)
        shifts = place.block % 2 == 1 and (place.detection or place.side > WINDOW)
        self.shift = SHIFT if shifts else 0
        self.qkv = linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        shape = ((2 * self.window - 1) ** 2, self.heads)
        self.position_bias = nnx.Param(normal_init(rngs.params(), shape, jnp.float32))
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    @staticmethod
    def refusal(height: int, width: int, image_size: int, detection: bool) -> str | None:
        if detection:
            return None
        for stage in range(4):
            stride = 4 * 2**stage
            rows, columns = -(-height // stride), -(-width // stride)
            window = _window(image_size // stride)
            if window == 0 or rows % window or columns % window:
                return (
                    f"stage {stage + 1} would have a map of {rows}×{columns}, which is not made of "
                    f"whole {window}×{window} windows. Swin takes heights and widths that are "
                    "multiples of 224, or up to 3 less"
                )
        return None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        _, height, width, dim = x.shape
        x = pad_to_multiple(x, self.window)
        qkv = self.qkv(x).reshape(*x.shape[:3], 3, self.heads, HEAD_DIM)
        out = shifted_window_attention(
            *(qkv[..., part, :, :] for part in range(3)),
            self.position_bias[...],
            window=self.window,
            shift=self.shift,
        )
        return self.proj(out.reshape(*x.shape[:3], dim)[:, :height, :width])
