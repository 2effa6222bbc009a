"""Halo attention in plain jnp: the definition, and what runs where no kernel is better."""

import jax.numpy as jnp
import numpy as np

from pallas.window_attention.reference import attention, merge, partition


def halo_attention(qkv, row_table, column_table, *, block: int, halo: int):
    """See `pallas.halo_attention.halo_attention`."""
    _, height, width, _, heads, dim = qkv.shape
    window = block + 2 * halo
    query, key, value = (qkv[..., part, :, :] for part in range(3))
    query = partition(query, (block, block))  # [B, blocks, N, h, d]
    query = query.reshape(*query.shape[:2], block, block, heads, dim)  # [B, n, i, j, h, d]

    rows = block * np.arange(height // block)[:, None] + np.arange(window)  # of the padded map
    columns = block * np.arange(width // block)[:, None] + np.arange(window)

    def around(x):
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
    return merge(out, (block, block), height, width)
