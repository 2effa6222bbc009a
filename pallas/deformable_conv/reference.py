"""Deformable sampling in plain jnp: the definition, and what runs where no kernel is better."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas.deformable_conv.geometry import Sampling
from pallas.watching import show


def positions(geometry: Sampling, offsets):
    """(x, y) of every point on the map, from offsets [..., Ho, Wo, G, P, 2]; float32."""
    centers = geometry.centers().astype(np.float32)[:, :, :, None]  # [Ho, Wo, G, 1, 2]
    moved = offsets.astype(jnp.float32) + geometry.grid().astype(np.float32)[None, None]
    return centers + geometry.offset_scale * moved


def deformable_sampling(geometry: Sampling, value, offsets, mask):
    """See `pallas.deformable_conv.deformable_sampling`."""
    height, width, groups = geometry.height, geometry.width, geometry.groups
    show(
        "sampling",
        positions=lambda: jax.vmap(lambda each: positions(geometry, each))(offsets),
        weights=lambda: mask,
    )

    @jax.checkpoint  # 4P pixels per place are gathered again for the gradient, never stored
    def sample(value, offsets, mask):
        """Samples one image: [H, W, G, C], [Ho, Wo, G, P, 2], [Ho, Wo, G, P] → [Ho, Wo, G, C]."""
        table = value.astype(jnp.float32).reshape(-1, geometry.channels)
        mask = mask.astype(jnp.float32)
        position = positions(geometry, offsets)
        x, y = position[..., 0], position[..., 1]
        left, top = jnp.floor(x), jnp.floor(y)
        reached = (x > -1) & (y > -1)
        group = np.arange(groups, dtype=np.int32)[None, None, :, None]
        # Corner by corner: a quarter of the memory; and the four as axes of one array crashed XLA's
        # CPU backend (jaxlib 0.10.2) in the gradient.
        total = jnp.zeros((geometry.out_height, geometry.out_width, groups, geometry.channels))
        for row, row_weight in ((top, top + 1 - y), (top + 1, y - top)):
            for column, column_weight in ((left, left + 1 - x), (left + 1, x - left)):
                seen = reached & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                weight = jnp.where(seen, row_weight * column_weight, 0.0) * mask
                place = jnp.where(seen, row * width + column, 0.0).astype(jnp.int32)
                pixels = table.at[place * groups + group].get(mode="promise_in_bounds")
                total += (pixels * weight[..., None]).sum(3)
        return total

    return jax.vmap(sample)(value, offsets, mask).astype(value.dtype)
