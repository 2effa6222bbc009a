"""Token labelling (arXiv:2104.10858): from label maps and crops to the targets of tokens.

A label map has, for each cell of an image, the highest logits of an annotating network and their
classes. It is read with the image and moved as the image is (`data/label_maps.py`); what is left to
do for a whole batch, on the device, is to cut out the crop.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16


def token_targets(
    label_maps: Float16[Array, "B 2 K H W"],
    crops: Float[Array, "B 4"],
    *,
    num_classes: int,
    grid: tuple[int, int],
    smoothing: float,
    transposed: bool = False,
) -> tuple[Float[Array, "B classes"], Float[Array, "B tokens classes"]]:
    """Targets of images, and of the places of their last maps in row-major order.

    The crop is cut from the map of all classes, absent ones 0, by RoI align (arXiv:1703.06870), to
    one cell and to the grid; then softmax; then smoothing as the authors do it: times 1 - s + s/C,
    plus s/C, so that a target sums to 1 + s/C.

    Args:
      label_maps: [:, 0] logits, [:, 1] classes.
      crops: left, top, width and height, as fractions of the image.
      grid: height and width of the last map.
      transposed: cuts out what the authors' code does, which confuses left with top and width with
        height (and so takes the part on the other side of the diagonal).
    """
    logits, classes = label_maps[:, 0].astype(jnp.float32), label_maps[:, 1].astype(jnp.int32)
    dense = (jax.nn.one_hot(classes, num_classes) * logits[..., None]).sum(1)  # [B, H, W, classes]
    left, top, width, height = jnp.split(crops.astype(jnp.float32), 4, axis=1)
    if transposed:
        left, top, width, height = top, left, height, width

    def cut(rows: int, columns: int):
        across = roi_align_weights(left, width, dense.shape[2], columns)
        down = roi_align_weights(top, height, dense.shape[1], rows)
        cells = jnp.einsum(
            "brh,bcw,bhwk->brck", down, across, dense, precision=jax.lax.Precision.HIGHEST
        )
        targets = jax.nn.softmax(cells.reshape(len(cells), rows * columns, -1))
        return targets * (1 - smoothing + smoothing / num_classes) + smoothing / num_classes

    return cut(1, 1)[:, 0], cut(*grid)


def roi_align_weights(
    start: Float[Array, "B 1"], extent: Float[Array, "B 1"], size: int, bins: int
) -> Float[Array, "B bins size"]:
    """Computes RoI align's weights of the `size` cells of an axis, for each bin of a box.

    As torchvision's, unaligned and with as many samples in a bin as it has cells, which are
    averaged. The box begins half a cell early and is one cell wide at least.

    Args:
      start, extent: of the box, as fractions of the axis.
    """
    begin = start * size - 0.5
    bin_size = jnp.maximum(extent * size, 1) / bins  # [B, 1]
    samples = jnp.ceil(bin_size)
    most = -(-size // bins)
    number = np.arange(most, dtype=np.float32)[None]
    inside = (number + 0.5) / samples * bin_size  # [B, most], from where the bin begins
    bin_start = begin + np.arange(bins, dtype=np.float32)[None] * bin_size  # [B, bins]
    at = bin_start[:, :, None] + inside[:, None]
    counts = (number < samples)[:, None] & (at >= -1) & (at <= size)
    at = jnp.clip(at, 0, size - 1)[..., None]  # beyond the border, the border's value
    tents = jnp.maximum(1 - jnp.abs(at - np.arange(size, dtype=np.float32)[None, None, None]), 0)
    return jnp.sum(jnp.where(counts[..., None], tents, 0), axis=2) / samples[:, :, None]
