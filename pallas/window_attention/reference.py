"""Attention in windows in plain jnp: the definition, and what runs where no kernel is better.

Shapes: B images of H×W places, h heads of d channels; windows of a×b places hold N = a·b tokens,
numbered row-major.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas.watching import show


def attention(query, key, value, bias=None, *, scale: float | None = None):
    """softmax(scale · query keyᵀ + bias) value, for each head; scores and softmax in float32.

    Args:
      query: [..., N, h, d], N queries of h heads with d channels.
      key: [..., M, h, d].
      value: [..., M, h, e].
      bias: added to the scores; broadcastable to [..., h, N, M].
      scale: d^-0.5 by default.

    Returns:
      [..., N, h, e], in the dtype of `value`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * scale
    if bias is not None:
        scores = scores + bias.reshape((1,) * (scores.ndim - bias.ndim) + bias.shape)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("...hqk,...khe->...qhe", weights.astype(value.dtype), value)
    show(
        "attention",
        weights=lambda: weights,
        total=lambda: jax.nn.logsumexp(scores, axis=-1),
        value=lambda: value,
        out=lambda: out,
    )
    return out


def partition(x, window: tuple[int, int]):
    """[B, H, W, ...] → [B, (H/a)·(W/b), a·b, ...]: windows and the tokens in them row-major."""
    batch, height, width, *rest = x.shape
    (a, b), rows, columns = window, height // window[0], width // window[1]
    x = x.reshape(batch, rows, a, columns, b, *rest).swapaxes(2, 3)
    return x.reshape(batch, rows * columns, a * b, *rest)


def merge(windows, window: tuple[int, int], height: int, width: int):
    """[B, (H/a)·(W/b), a·b, ...] → [B, H, W, ...]: the inverse of `partition`."""
    batch, _, _, *rest = windows.shape
    (a, b), rows, columns = window, height // window[0], width // window[1]
    x = windows.reshape(batch, rows, columns, a, b, *rest).swapaxes(2, 3)
    return x.reshape(batch, height, width, *rest)


def shift_mask(height: int, width: int, window: tuple[int, int], shift: tuple[int, int]):
    """The mask added to the scores of a rolled map; float32 [windows, N, N], 0 or -100.

    Rolling brings together, in the last row and column of windows, what lies on opposite borders.
    """
    axes = []
    for size, span, offset in zip((height, width), window, shift, strict=True):
        labels = np.zeros(size, np.int32)
        if offset:
            labels[size - span : size - offset], labels[size - offset :] = 1, 2
        axes.append(labels.reshape(-1, span))
    rows, columns = axes
    labels = 3 * rows[:, None, :, None] + columns[None, :, None, :]
    labels = labels.reshape(-1, window[0] * window[1])  # [windows, N]
    return np.where(labels[:, :, None] == labels[:, None, :], np.float32(0), np.float32(-100))


def depthwise_in_windows(value, kernel):
    """3×3 depthwise convolution that sees zeros beyond its window; accumulates in float32.

    Args:
      value: [B, windows, a, b, h, d].
      kernel: [3, 3, h, d].

    Returns:
      float32 [B, windows, a, b, h, d].
    """
    a, b = value.shape[2:4]
    kernel = kernel.astype(jnp.float32)
    padded = jnp.pad(value, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0), (0, 0))).astype(jnp.float32)
    taps = [
        padded[:, :, i : i + a, j : j + b] * kernel[i, j][None, None, None, None]
        for i in range(3)
        for j in range(3)
    ]
    return sum(taps[1:], taps[0])


def window_attention(
    qkv,
    bias=None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    query=None,
    local_kernel=None,
):
    """See `pallas.window_attention.window_attention`."""
    batch, height, width, _, heads, dim = qkv.shape
    if any(shift):
        qkv = jnp.roll(qkv, (-shift[0], -shift[1]), (1, 2))
        mask = shift_mask(height, width, window, shift)[:, None]  # [windows, 1, N, N]
        bias = mask if bias is None else bias[None] + mask
    windows = partition(qkv, window)  # [B, windows, N, parts, h, d]
    key, value = windows[..., -2, :, :], windows[..., -1, :, :]
    if query is None:
        query = windows[..., 0, :, :]
    else:
        query = query.reshape(batch, 1, -1, heads, dim)
        query = jnp.broadcast_to(query, key.shape)
    out = attention(query, key, value, bias)
    if local_kernel is not None:
        local = depthwise_in_windows(
            value.reshape(*value.shape[:2], *window, heads, dim), local_kernel
        )
        out = out + local.reshape(out.shape).astype(out.dtype)
    out = merge(out, window, height, width)
    return jnp.roll(out, shift, (1, 2)) if any(shift) else out
