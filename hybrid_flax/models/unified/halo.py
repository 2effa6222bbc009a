"""Halo attention (HaloNet, arXiv:2103.12731) as the unified models have it.

Shapes: b×b queries a block, w×w keys around it with w = b + 2·halo, n blocks of h heads with d
channels.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    PointwiseConv,
    attention,
    linear,
    merge_windows,
    normal_init,
    pad_to_multiple,
    partition_windows,
)
from hybrid_flax.models.unified.mixer import Mixer, Place

HEAD_DIM = 32
BLOCK = 7
HALO = 3


def halo_attention(
    query: Float[Array, "B H W h d"],
    key: Float[Array, "B H W h d"],
    value: Float[Array, "B H W h d"],
    row_table: Float[Array, "positions d"],
    column_table: Float[Array, "positions d"],
    *,
    block: int,
    halo: int,
) -> Float[Array, "B H W h d"]:
    """Each block of b×b queries attends to the w×w places around it; [B, H, W, h, d] → the same.

    The score of query (i, j) of a block and key (a, c) of its window is
    d^-0.5·q·k + q·row_table[a - i + w - 1] + q·column_table[c - j + w - 1]. As i does not count the
    halo, the first w - b rows of the tables [2w - 1, d], which all heads share, are never read.
    Keys outside the map do not take part.

    Args:
      query, key, value: [B, H, W, h, d]; H and W are multiples of b.
    """
    _, height, width, heads, dim = query.shape
    window = block + 2 * halo
    query = partition_windows(query.reshape(*query.shape[:3], -1), block)
    query = query.reshape(*query.shape[:2], block, block, heads, dim)  # [B, n, i, j, h, d]

    rows = block * np.arange(height // block)[:, None] + np.arange(window)  # of the padded map
    columns = block * np.arange(width // block)[:, None] + np.arange(window)

    def around(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (halo, halo), (halo, halo), (0, 0), (0, 0)))
        x = x[:, rows][:, :, :, columns].swapaxes(2, 3)  # [B, blocks down, blocks across, a, c, …]
        return x.reshape(x.shape[0], -1, window * window, heads, dim)

    offset = np.arange(window)[None, :] - np.arange(block)[:, None] + window - 1  # [b, w]
    row_table, column_table = (
        table[offset].astype(query.dtype) for table in (row_table, column_table)
    )
    by_row = jnp.einsum("bnijhd,iad->bnhija", query, row_table, preferred_element_type=jnp.float32)
    by_column = jnp.einsum(
        "bnijhd,jcd->bnhijc", query, column_table, preferred_element_type=jnp.float32
    )
    bias = by_row[..., :, None] + by_column[..., None, :]  # [B, n, h, i, j, a, c]

    def on_map(places: np.ndarray, size: int) -> np.ndarray:
        return (places >= halo) & (places < size + halo)

    inside = on_map(rows, height)[:, None, :, None] & on_map(columns, width)[None, :, None, :]
    inside = inside.reshape(1, -1, 1, 1, 1, window, window)
    bias = jnp.where(inside, bias, -1e30)
    bias = bias.reshape(*bias.shape[:3], block * block, window * window)
    query = query.reshape(*query.shape[:2], block * block, heads, dim)
    out = attention(query, around(key), around(value), bias)
    out = merge_windows(out.reshape(*out.shape[:3], -1), height, width)
    return out.reshape(*out.shape[:3], heads, dim)


class HaloAttention(Mixer):
    """Multi-head halo attention: 7×7 queries, 13×13 keys, heads of 32 channels.

    A map that is not made of whole blocks is filled up with zeros on the right and at the bottom.
    As in the official detection code these places are not masked: their keys and values are 0 (the
    projections have no bias), and they take part with the scores of their positions.
    """

    norm_epsilon = 1e-5

    def __init__(self, dim: int, place: Place, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = dim // HEAD_DIM
        self.q = linear(dim, dim, use_bias=False, dtype=dtype, rngs=rngs)
        # Of each head the key, then the value.
        self.kv = PointwiseConv(dim, 2 * dim, kernel_init=normal_init, dtype=dtype, rngs=rngs)
        table_init = normal(HEAD_DIM**-0.5)
        shape = (2 * (BLOCK + 2 * HALO) - 1, HEAD_DIM)
        self.row_table = nnx.Param(table_init(rngs.params(), shape, jnp.float32))
        self.column_table = nnx.Param(table_init(rngs.params(), shape, jnp.float32))
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    @staticmethod
    def refusal(height: int, width: int, image_size: int, detection: bool) -> str | None:
        unit = 8 * BLOCK  # the first map halves three times more
        if detection or not any(-(-side // 4) % unit for side in (height, width)):
            return None
        return (
            "halo attention needs maps of whole 7×7 blocks in all four stages: heights and widths "
            "that are multiples of 224, or up to 3 less. Resize the images"
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        _, height, width, dim = x.shape
        x = pad_to_multiple(x, BLOCK)
        query = self.q(x).reshape(*x.shape[:3], self.heads, HEAD_DIM)
        kv = self.kv(x).reshape(*x.shape[:3], self.heads, 2, HEAD_DIM)
        out = halo_attention(
            query,
            kv[..., 0, :],
            kv[..., 1, :],
            self.row_table[...],
            self.column_table[...],
            block=BLOCK,
            halo=HALO,
        )
        return self.proj(out.reshape(*x.shape[:3], dim)[:, :height, :width])
