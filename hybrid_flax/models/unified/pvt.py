"""Spatial-reduction attention (Pyramid Vision Transformer, arXiv:2102.12122)."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    attention,
    conv,
    layer_norm,
    linear,
    normal_init,
    resize_position_map,
)
from hybrid_flax.models.unified.mixer import Mixer, Place

HEADS = (1, 2, 5, 8)  # by stage, like
REDUCTIONS = (8, 4, 2, 1)


def refusal(height: int, width: int, image_size: int, detection: bool) -> str | None:
    """Says why a model built for `image_size` cannot take images of this height and width."""
    smallest = image_size - 3
    if image_size < 32 or image_size % 32:
        return "PVT must be built for a multiple of 32, by its position maps"
    if detection and min(height, width) < 29:
        return "the first stage of PVT needs 29 pixels, 8 places of its map, to reduce"
    if detection or all(smallest <= side <= image_size for side in (height, width)):
        return None
    return (
        f"this PVT's position maps were built for image_size={image_size} and fit heights and "
        f"widths from {smallest} to {image_size}. Resize the images, or build the model for "
        "their size: create_model(..., image_size=...), a multiple of 32"
    )


class SpatialReductionAttention(Mixer):
    """Every place attends to a reduced map: one key and value for r×r places, r = 8, 4, 2, 1.

    The first block of a stage adds a learned position map to its input. It has the size of the
    stage's map, and so fixes the size of the images; for detection it is resized instead.
    """

    norm_epsilon = 1e-5
    widths = HEADS
    needs_square = True  # its position maps

    def __init__(self, dim: int, place: Place, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = HEADS[place.stage]
        self.has_positions = place.block == 0
        if self.has_positions:
            shape = (place.side, place.side, dim)
            self.position_map = nnx.Param(normal_init(rngs.params(), shape, jnp.float32))
        self.q = linear(dim, dim, dtype=dtype, rngs=rngs)
        ratio = REDUCTIONS[place.stage]
        self.reduces = ratio > 1
        if self.reduces:
            self.reduce = conv(
                dim,
                dim,
                ratio,
                stride=ratio,
                padding=0,
                use_bias=True,
                kernel_init=normal_init,
                dtype=dtype,
                rngs=rngs,
            )
            self.norm = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.kv = linear(dim, 2 * dim, dtype=dtype, rngs=rngs)
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    def add_positions(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        if not self.has_positions:
            return x
        positions = resize_position_map(self.position_map[...], *x.shape[1:3])
        return x + positions[None].astype(x.dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, *_, dim = shape = x.shape
        query = self.q(x).reshape(batch, -1, self.heads, dim // self.heads)
        if self.reduces:
            x = self.norm(self.reduce(x))
        kv = self.kv(x).reshape(batch, -1, 2, *query.shape[2:])
        return self.proj(attention(query, kv[:, :, 0], kv[:, :, 1]).reshape(shape))
