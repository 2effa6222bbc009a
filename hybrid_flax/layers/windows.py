"""Cutting a map into non-overlapping windows and putting it together again."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def pad_to_multiple(x: Shaped[Array, "B H W C"], size: int) -> Shaped[Array, "B _H _W C"]:
    """Zeros at the right and at the bottom, up to the next multiples of `size`."""
    bottom, right = -x.shape[1] % size, -x.shape[2] % size
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))


def partition_windows(
    x: Shaped[Array, "B H W C"], window: int | tuple[int, int]
) -> Shaped[Array, "B windows tokens C"]:
    """[B, H, W, C] → [B, (H/h)·(W/w), h·w, C]: windows and the tokens inside them row-major.

    `window` is (h, w), or the side of a square.
    """
    batch, height, width, channels = x.shape
    high, wide = (window, window) if isinstance(window, int) else window
    rows, columns = height // high, width // wide
    x = x.reshape(batch, rows, high, columns, wide, channels)
    return x.swapaxes(2, 3).reshape(batch, rows * columns, high * wide, channels)


def merge_windows(
    windows: Shaped[Array, "B windows tokens C"],
    height: int,
    width: int,
    window: tuple[int, int] | None = None,
) -> Shaped[Array, "B {height} {width} C"]:
    """[B, (H/h)·(W/w), h·w, C] → [B, H, W, C]: the inverse of `partition_windows`.

    `window` is (h, w); squares need not say it.
    """
    batch, _, tokens, channels = windows.shape
    high, wide = window or (round(tokens**0.5),) * 2
    rows, columns = height // high, width // wide
    x = windows.reshape(batch, rows, columns, high, wide, channels)
    return x.swapaxes(2, 3).reshape(batch, height, width, channels)
