"""The same operation as PyTorch does it best: `scaled_dot_product_attention` on cut-out windows.

The windows of an image lie beside its heads, so that one bias, or one mask of a shifted map, serves
all images without being copied for each. Cutting, rolling and putting together are part of the
time, as they are part of every PyTorch model.
"""

import functools

import numpy as np

from pallas.halo_attention.geometry import Halo
from pallas.window_attention import reference
from pallas.window_attention.geometry import Windows


def attention(geometry: Windows | Halo, device: str, dtype):
    """A PyTorch function that takes and gives what `pallas.window_attention` does."""
    import torch

    if isinstance(geometry, Halo):
        constants = {name: torch.tensor(x, device=device) for name, x in _places(geometry).items()}
        return functools.partial(_halo, geometry, **constants)
    hidden = None
    if any(geometry.shift):
        mask = reference.shift_mask(
            geometry.height, geometry.width, geometry.window, geometry.shift
        )
        hidden = torch.tensor(mask[:, None], device=device, dtype=dtype)  # [windows, 1, N, N]
    return functools.partial(_windows, geometry, hidden=hidden)


def _windows(geometry: Windows, qkv, bias=None, query=None, local_kernel=None, *, hidden):
    import torch
    from torch.nn import functional

    batch, height, width, parts, heads, dim = qkv.shape
    (a, b), shift = geometry.window, geometry.shift
    rows, columns, tokens = height // a, width // b, a * b
    if any(shift):
        qkv = torch.roll(qkv, (-shift[0], -shift[1]), (1, 2))
    cut = qkv.view(batch, rows, a, columns, b, parts, heads, dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
    *queries, key, value = cut.reshape(parts, batch, -1, tokens, dim)  # [B, windows·h, N, d]
    if query is None:
        (query,) = queries
    else:
        query = query.permute(0, 3, 1, 2, 4).reshape(batch, 1, heads, tokens, dim)
        query = query.expand(-1, rows * columns, -1, -1, -1).reshape(key.shape)

    mask = None if bias is None else bias.to(qkv.dtype).expand(rows * columns, -1, -1, -1)
    if hidden is not None:
        mask = hidden.expand(-1, heads, -1, -1) if mask is None else mask + hidden
    if mask is not None:
        mask = mask.reshape(1, -1, tokens, tokens).expand(batch, -1, -1, -1)
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    if local_kernel is not None:
        images = value.view(-1, heads, a, b, dim).permute(0, 1, 4, 2, 3)
        images = images.reshape(-1, heads * dim, a, b)
        kernel = local_kernel.permute(2, 3, 0, 1).reshape(heads * dim, 1, 3, 3)
        local = functional.conv2d(images, kernel, padding=1, groups=heads * dim)
        out = out + local.view(batch, -1, dim, tokens).transpose(-1, -2)
    out = out.view(batch, rows, columns, heads, a, b, dim).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(batch, height, width, heads, dim)
    return torch.roll(out, shift, (1, 2)) if any(shift) else out


def _places(geometry: Halo) -> dict[str, np.ndarray]:
    """`offset` [b, w], rows of the tables; `outside` [blocks, 1, w²], keys beyond the map."""
    block, halo, window = geometry.block, geometry.halo, geometry.window
    offset = np.arange(window)[None, :] - np.arange(block)[:, None] + window - 1

    def beyond(size):  # [blocks, w]
        place = block * np.arange(size // block)[:, None] + np.arange(window) - halo
        return (place < 0) | (place >= size)

    rows, columns = beyond(geometry.height), beyond(geometry.width)
    outside = rows[:, None, :, None] | columns[None, :, None, :]
    return {"offset": offset, "outside": outside.reshape(-1, 1, window**2)}


def _halo(geometry: Halo, qkv, row_table, column_table, *, offset, outside):
    import torch
    from torch.nn import functional

    batch, height, width, _, heads, dim = qkv.shape
    block, halo, window = geometry.block, geometry.halo, geometry.window
    rows, columns = height // block, width // block
    query, key, value = qkv.unbind(3)
    query = query.reshape(batch, rows, block, columns, block, heads, dim)
    query = query.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, -1, block, block, dim)

    def around(x):  # [B, blocks·h, w², d]
        x = functional.pad(x, (0, 0, 0, 0, halo, halo, halo, halo))
        x = x.unfold(1, window, block).unfold(2, window, block)  # [B, down, across, h, d, w, w]
        return x.permute(0, 1, 2, 3, 5, 6, 4).reshape(batch, -1, window**2, dim)

    row_table, column_table = (table.to(qkv.dtype)[offset] for table in (row_table, column_table))
    by_row = torch.einsum("bnijd,iad->bnija", query, row_table)
    by_column = torch.einsum("bnijd,jcd->bnijc", query, column_table)
    bias = by_row[..., :, None] + by_column[..., None, :]  # [B, blocks·h, i, j, a, c]
    bias = bias.reshape(batch, -1, block**2, window**2).masked_fill(
        outside.repeat_interleave(heads, 0), float("-inf")
    )
    out = functional.scaled_dot_product_attention(
        query.view(batch, -1, block**2, dim), around(key), around(value), attn_mask=bias
    )
    out = out.view(batch, rows, columns, heads, block, block, dim).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(batch, height, width, heads, dim)
