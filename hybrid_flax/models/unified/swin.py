"""Shifted-window attention (Swin Transformer, arXiv:2103.14030, section 3.2).

Shapes: w×w window, N = w² tokens, h heads of d channels.
"""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    linear,
    normal_init,
    pad_to_multiple,
    relative_position_bias,
    window_attention,
)
from hybrid_flax.models.unified.mixer import Mixer, Place

HEAD_DIM = 32
WINDOW = 7
SHIFT = 3  # of every other block


def _window(side: int) -> int:
    """The window of a stage whose map has this side at the size that the model is built for."""
    return min(WINDOW, side)


def refusal(height: int, width: int, image_size: int, detection: bool) -> str | None:
    """Says why a model built for `image_size` cannot take images of this height and width."""
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


class ShiftedWindowAttention(Mixer):
    """Multi-head attention in 7×7 windows, shifted by 3 in every other block; heads of 32 channels.

    Where the map of the size the model is built for is no larger than a window, the window becomes
    the map, and is not shifted (but for detection, where both stay). A model can take any images
    whose maps are made of whole windows; the official classifier masks the borders of other sizes
    than its own wrongly. For detection maps are filled up with zeros on the right and at the
    bottom before the projections, unmasked, as in the official code.
    """

    has_kernels = True
    widths = (HEAD_DIM,) * 4
    needs_square = True  # its windows follow from one side

    def __init__(self, dim: int, place: Place, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = dim // HEAD_DIM
        self.implementation = place.implementation
        self.window = WINDOW if place.detection else _window(place.side)
        shifts = place.block % 2 == 1 and (place.detection or place.side > WINDOW)
        self.shift = SHIFT if shifts else 0
        self.qkv = linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        shape = ((2 * self.window - 1) ** 2, self.heads)
        self.position_bias = nnx.Param(normal_init(rngs.params(), shape, jnp.float32))
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        _, height, width, dim = x.shape
        x = pad_to_multiple(x, self.window)
        out = window_attention(
            self.qkv(x).reshape(*x.shape[:3], 3, self.heads, HEAD_DIM),
            relative_position_bias(self.position_bias[...], self.window),
            window=self.window,
            shift=self.shift,
            implementation=self.implementation,
        )
        return self.proj(out.reshape(*x.shape[:3], dim)[:, :height, :width])
