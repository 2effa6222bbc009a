"""MixToken (Jiang et al., NeurIPS 2021, arXiv:2104.10858): pairs of images swap a box of places."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Box = tuple[int | jax.Array, int | jax.Array, int | jax.Array, int | jax.Array]


def mix_token_box(key: jax.Array, height: int, width: int) -> Box:
    """Draws a box on a height×width grid: row0, row1, column0, column1, int scalars, ends excluded.

    As in cutmix the sides are the grid's times √(1 - λ), λ ~ Beta(1, 1), here rounded down to even
    numbers; the centre is uniform. What lies outside of the grid is cut off; a box may be empty.
    """
    ratio_key, row_key, column_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.uniform(ratio_key))  # Beta(1, 1) is uniform

    def interval(key, size):
        half = jnp.floor(size * side).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (), 0, size)
        return jnp.clip(centre - half, 0, size), jnp.clip(centre + half, 0, size)

    return *interval(row_key, height), *interval(column_key, width)


def swap_box(x: Float[Array, "B H W C"], box: Box, stride: int = 1) -> Float[Array, "B H W C"]:
    """Each image gets the box, times `stride`, of the image at the mirrored batch position."""
    row0, row1, column0, column1 = (edge * stride for edge in box)
    rows, columns = jnp.arange(x.shape[1]), jnp.arange(x.shape[2])
    in_rows, in_columns = (rows >= row0) & (rows < row1), (columns >= column0) & (columns < column1)
    inside = in_rows[None, :, None, None] & in_columns[None, None, :, None]
    return jnp.where(inside, x[::-1], x)
