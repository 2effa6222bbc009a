"""Cutting a map into non-overlapping square windows and putting it together again."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def pad_to_multiple(x: Shaped[Array, "B H W C"], size: int) -> Shaped[Array, "B _H _W C"]:
    """Zeros at the right and at the bottom, up to the next multiples of `size`."""
    bottom, right = -x.shape[1] % size, -x.shape[2] % size
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))


def partition_windows(
    x: Shaped[Array, "B H W C"], window: int
) -> Shaped[Array, "B windows tokens C"]:
    """[B, H, W, C] → [B, (H/w)·(W/w), w², C]: windows and the tokens inside them row-major."""
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x.reshape(batch, rows, window, columns, window, channels)
    return x.swapaxes(2, 3).reshape(batch, rows * columns, window * window, channels)


def merge_windows(
    windows: Shaped[Array, "B windows tokens C"], height: int, width: int
) -> Shaped[Array, "B {height} {width} C"]:
    """[B, (H/w)·(W/w), w², C] → [B, H, W, C]: the inverse of `partition_windows`."""
    batch, _, tokens, channels = windows.shape
    window = round(tokens**0.5)
    rows, columns = height // window, width // window
    x = windows.reshape(batch, rows, columns, window, window, channels)
    return x.swapaxes(2, 3).reshape(batch, height, width, channels)
