"""The effective receptive field: which pixels move the middle of a map (arXiv:1701.04128)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybrid_flax.analysis.layers import compiled, last_map, value_of
from hybrid_flax.errors import InputError
from hybrid_flax.models.backbone import Backbone

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


def effective_receptive_field(
    model: Backbone, images: Array, layer: str | None = None
) -> Float[np.ndarray, "H W"]:
    """How much each pixel contributes to the middle of a layer's map: the mean over images.

    As RepLKNet's script (arXiv:2203.06717): the derivative by the image of the sum over channels of
    relu(map[h // 2, w // 2]), of which what is negative is dropped, summed over the colours. The
    middle of an even map is the place below and right of it. Images whose contributions are not
    finite do not count.

    Args:
      images: [B, H, W, 3], normalised. The protocol squashes photos to 1024×1024; models with fixed
        windows take their own size only. Numbers of different sizes cannot be compared.
      layer: a named map or the path of a module; None: the last map of the trunk, before any final
        norm.

    Raises:
      InputError: a layer that is not there; images that the model does not take, or all of which
        have contributions that are not finite.
    """
    layer = layer or last_map(model)
    found = np.asarray(compiled(_gradient, model, [images], layer), np.float32)
    contributions = np.maximum(found, 0).sum(-1)
    finite = np.isfinite(found).all((1, 2, 3))
    if not finite.any():
        raise InputError(
            f"the contributions of all {len(found)} images to {layer} are NaN or infinite: the "
            "weights are not usable as they are"
        )
    return contributions[finite].mean(0)


def _gradient(model: Backbone, images: Array, layer: str) -> Array:
    def middle(images):
        found, _ = value_of(model, images, layer)
        height, width = found.shape[1:3]
        return jax.nn.relu(found[:, height // 2, width // 2].astype(jnp.float32)).sum()

    return jax.grad(middle)(images)


def area_ratios(
    scores: Float[np.ndarray, "H W"], thresholds: Sequence[float] = THRESHOLDS
) -> dict[float, tuple[int, float] | None]:
    """{threshold: (side, share of the image's area) of the smallest square that has more of all}.

    The squares have an odd side and their middle at (H // 2, W // 2). None where no square below
    the height will do. This number does not depend on the scale of the scores; RepLKNet's does,
    which takes `logarithmic(scores)`.
    """
    height, width = scores.shape
    total = scores.sum(dtype=np.float64)
    found: dict[float, tuple[int, float] | None] = {}
    row, column = height // 2, width // 2
    for threshold in thresholds:
        found[threshold] = None
        for reach in range(1, height // 2):
            rows, columns = (
                slice(row - reach, row + reach + 1),
                slice(column - reach, column + reach + 1),
            )
            if scores[rows, columns].sum(dtype=np.float64) / total > threshold:
                side = 2 * reach + 1
                found[threshold] = (side, side**2 / (height * width))
                break
    return found


def logarithmic(scores: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """log10(scores + 1) of its largest: what RepLKNet's script measures and draws.

    Large scores are made nearly equal, small ones are left as they are: the result depends on the
    scale of the derivatives, and models with other norms or widths cannot be compared by it.
    """
    found = np.log10(scores.astype(np.float64) + 1)
    return (found / found.max()).astype(np.float32)
