"""Halo attention (HaloNet, arXiv:2103.12731) as the unified models have it.

Shapes: b×b queries a block, w×w keys around it with w = b + 2·halo, n blocks of h heads with d
channels.
"""

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    PointwiseConv,
    halo_attention,
    linear,
    normal_init,
    pad_to_multiple,
)
from hybrid_flax.models.unified.mixer import Mixer, Place

HEAD_DIM = 32
BLOCK = 7
HALO = 3


def refusal(height: int, width: int, image_size: int, detection: bool) -> str | None:
    """Says why a model built for `image_size` cannot take images of this height and width."""
    unit = 8 * BLOCK  # the first map halves three times more
    if detection or not any(-(-side // 4) % unit for side in (height, width)):
        return None
    return (
        "halo attention needs maps of whole 7×7 blocks in all four stages: heights and widths "
        "that are multiples of 224, or up to 3 less. Resize the images"
    )


class HaloAttention(Mixer):
    """Multi-head halo attention: 7×7 queries, 13×13 keys, heads of 32 channels.

    A map that is not made of whole blocks is filled up with zeros on the right and at the bottom.
    As in the official detection code these places are not masked: their keys and values are 0 (the
    projections have no bias), and they take part with the scores of their positions.
    """

    norm_epsilon = 1e-5
    has_kernels = True
    widths = (HEAD_DIM,) * 4

    def __init__(self, dim: int, place: Place, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = dim // HEAD_DIM
        self.implementation = place.implementation
        self.dtype = dtype
        self.q = linear(dim, dim, use_bias=False, dtype=dtype, rngs=rngs)
        # Of each head the key, then the value.
        self.kv = PointwiseConv(dim, 2 * dim, kernel_init=normal_init, dtype=dtype, rngs=rngs)
        table_init = normal(HEAD_DIM**-0.5)
        shape = (2 * (BLOCK + 2 * HALO) - 1, HEAD_DIM)
        self.row_table = nnx.Param(table_init(rngs.params(), shape, jnp.float32))
        self.column_table = nnx.Param(table_init(rngs.params(), shape, jnp.float32))
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        _, height, width, dim = x.shape
        x = pad_to_multiple(x, BLOCK).astype(self.dtype)
        out = halo_attention(
            (x @ self.packed_kernel()).reshape(*x.shape[:3], 3, self.heads, HEAD_DIM),
            self.row_table[...],
            self.column_table[...],
            block=BLOCK,
            halo=HALO,
            implementation=self.implementation,
        )
        return self.proj(out.reshape(*x.shape[:3], dim)[:, :height, :width])

    def packed_kernel(self) -> Float[Array, "C threeC"]:
        """One projection for query, key and value, side by side as attention takes them."""
        query = self.q.kernel[...]
        key_value = self.kv.kernel[0, 0].reshape(len(query), self.heads, 2, HEAD_DIM)
        key, value = (key_value[:, :, part].reshape(query.shape) for part in range(2))
        return jnp.concatenate([query, key, value], axis=1).astype(self.dtype)
