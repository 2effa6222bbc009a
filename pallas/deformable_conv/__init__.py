"""Deformable sampling (DCNv3): a convolution whose taps may move, without its projections.

`reference.py` is the definition, `tpu.py` and `gpu.py` have the kernels, `choice.py` says which of
them serves what. `pallas/README.md` explains how they work.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas.deformable_conv import reference
from pallas.deformable_conv.choice import KERNELS
from pallas.deformable_conv.geometry import Sampling
from pallas.dispatch import Argument, run

__all__ = ["deformable_sampling"]


def deformable_sampling(
    value: jax.Array,
    offsets: jax.Array,
    mask: jax.Array,
    *,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    dilations: tuple[int, ...] = (1,),
    offset_scale: float = 1.0,
    remove_center: bool = False,
    center_scale: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Masked sum of bilinear samples around every place, for each group; [B, Ho, Wo, G, C].

    (DCNv3, arXiv:2211.05778, equation 2.) With the kernel's centre at (x0, y0) and c_g = r_g·(K-1)
    // 2, out[b, y, x, g] = Σ_p mask[b, y, x, g, p] · value[b, ·, ·, g] sampled at (X_p, Y_p):
    X_p = x0 + offset_scale·(r_g·(p // K) - c_g + offset_x),
    Y_p = y0 + offset_scale·(r_g·(p % K) - c_g + offset_y): x runs slowest over the points.

    A pixel outside the map counts as 0, so that a sample fades out within one pixel of the border;
    from there on (a coordinate ≤ -1 or ≥ the size) it is 0, and so are its gradients. The
    derivative by a position is that of the cell between four pixels which its floor picks; it jumps
    from cell to cell.

    Args:
      value: [B, H, W, G, C], bfloat16 or float32, G groups of C channels.
      offsets: [B, Ho, Wo, G, P, 2], the displacement of each point in pixels, (x, y). Ho and Wo are
        those of a convolution with this kernel, stride and padding.
      mask: [B, Ho, Wo, G, P], the weight of each point.
      kernel_size: K; there are P = K² points.
      stride: of the result's places on the map.
      padding: x0 = stride·x - padding + c_g, as of a convolution that begins so far outside the
        map. None: x0 = stride·x.
      dilations: group g spreads its points by r_g = dilations[g % len(dilations)].
      offset_scale: multiplies the grid of points and the offsets alike.
      remove_center: leaves out the middle point; P = K² - 1.
      center_scale: [B, H, W, G], how much of each place's own value replaces the result; for
        results of the map's size (InternImage's centre feature scale).
      implementation: "auto", "pallas" or "xla", see `choice.py`.

    Returns:
      [B, Ho, Wo, G, C] in the dtype of `value`. Positions and sums are computed in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, naming the argument and the rule.
    """
    geometry = Sampling.of(
        value,
        offsets,
        mask,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilations=tuple(dilations),
        offset_scale=offset_scale,
        remove_center=remove_center,
    )
    if center_scale is not None and not center_scale.shape == value.shape[:4] == offsets.shape[:4]:
        raise ValueError(
            f"center_scale has shape {center_scale.shape}: expected that of value and of offsets "
            f"without their last axes, which are {value.shape[:4]} and {offsets.shape[:4]}"
        )

    def plain(value, offsets, mask):
        own = dataclasses.replace(geometry, groups=value.shape[3])  # a device's, on a mesh
        return reference.deformable_sampling(own, value, offsets, mask)

    arguments = (
        Argument(value, batch=0, heads=3),
        Argument(offsets, batch=0, heads=3),
        Argument(mask, batch=0, heads=3),
    )
    # Where groups differ in their dilation, a device must know which of them it has.
    groups = "groups" if len(geometry.dilations) == 1 else None
    out = run(implementation, geometry, groups, KERNELS, plain, arguments)
    if center_scale is None:
        return out
    share, sampled, own = (x.astype(jnp.float32) for x in (center_scale[..., None], out, value))
    return (sampled * (1 - share) + own * share).astype(value.dtype)
