"""Deformable sampling (DCNv3, arXiv:2211.05778, equation 2): a convolution whose taps may move."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybrid_flax.errors import InputError


def deformable_sampling(
    value: Float[Array, "B H W G C"],
    offsets: Float[Array, "B Ho Wo G P 2"],
    mask: Float[Array, "B Ho Wo G P"],
    *,
    kernel_size: int,
    stride: int = 1,
    dilations: tuple[int, ...] = (1,),
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Float[Array, "B Ho Wo G C"]:
    """Masked sum of bilinear samples around every place, for each group of channels.

    out[b, y, x, g] = Σ_p mask[b, y, x, g, p] · value[b, ·, ·, g] sampled at (X_p, Y_p), where
    X_p = stride·x + offset_scale·(r_g·(p // K - K // 2) + offset_x) and
    Y_p = stride·y + offset_scale·(r_g·(p % K - K // 2) + offset_y): x runs slowest over the points.

    A pixel outside the map counts as 0, so that a sample fades out within one pixel of the border;
    from there on (a coordinate ≤ -1 or ≥ the size) it is 0, and so are its gradients. The
    derivative by a position is that of the cell between four pixels which its floor picks; it jumps
    from cell to cell.

    Args:
      value: [B, H, W, G, C], G groups of C channels.
      offsets: [B, Ho, Wo, G, P, 2], the displacement of each point in pixels, (x, y).
      mask: [B, Ho, Wo, G, P], the weight of each point.
      kernel_size: K; there are P = K² points.
      stride: of the output's places on the map, the first at (0, 0).
      dilations: group g spreads its points by r_g = dilations[g % len(dilations)].
      offset_scale: multiplies the grid of points and the offsets alike.
      remove_center: leaves out the middle point; P = K² - 1.

    Returns:
      [B, Ho, Wo, G, C] in the dtype of `value`; computed in float32.

    Raises:
      InputError: P does not fit the kernel size.
    """
    _, height, width, groups, channels = value.shape
    _, out_height, out_width, _, points, _ = offsets.shape
    steps = np.arange(kernel_size) - kernel_size // 2
    grid = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    if remove_center:
        grid = np.delete(grid, len(grid) // 2, axis=0)
    if points != len(grid):
        raise InputError(
            f"kernel_size={kernel_size} with remove_center={remove_center} has {len(grid)} points, "
            f"but the offsets, {offsets.shape}, are for {points}"
        )
    grid = np.resize(dilations, groups)[:, None, None] * grid  # [G, P, 2]; resize repeats
    centers = np.meshgrid(stride * np.arange(out_width), stride * np.arange(out_height))
    centers = np.stack(centers, axis=-1)[:, :, None, None]  # [Ho, Wo, 1, 1, 2], (x, y)

    @jax.checkpoint  # 4P pixels per place are gathered again for the gradient, never stored
    def sample(value, offsets, mask):
        """Of one image: [H, W, G, C], [Ho, Wo, G, P, 2], [Ho, Wo, G, P] → [Ho, Wo, G, C]."""
        table = value.astype(jnp.float32).reshape(-1, channels)
        mask = mask.astype(jnp.float32)
        offsets = offsets.astype(jnp.float32) + grid.astype(np.float32)[None, None]
        position = centers.astype(np.float32) + offset_scale * offsets
        x, y = position[..., 0], position[..., 1]
        left, top = jnp.floor(x), jnp.floor(y)
        reached = (x > -1) & (y > -1)
        group = np.arange(groups, dtype=np.int32)[None, None, :, None]
        # Corner by corner: a quarter of the memory; and the four as axes of one array crashed XLA's
        # CPU backend (jaxlib 0.10.2) in the gradient.
        total = jnp.zeros((out_height, out_width, groups, channels))
        for row, row_weight in ((top, top + 1 - y), (top + 1, y - top)):
            for column, column_weight in ((left, left + 1 - x), (left + 1, x - left)):
                seen = reached & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                weight = jnp.where(seen, row_weight * column_weight, 0.0) * mask
                place = jnp.where(seen, row * width + column, 0.0).astype(jnp.int32)
                pixels = table.at[place * groups + group].get(mode="promise_in_bounds")
                total += (pixels * weight[..., None]).sum(3)
        return total

    return jax.vmap(sample)(value, offsets, mask).astype(value.dtype)
