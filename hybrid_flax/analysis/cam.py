"""Grad-CAM and HiResCAM: which places of a map speak for a class."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybrid_flax.analysis.layers import classified_map, compiled, derivative
from hybrid_flax.errors import InputError
from hybrid_flax.models.backbone import Backbone


def grad_cam(
    model: Backbone,
    images: Array,
    classes: int | Sequence[int] | None = None,
    layer: str | None = None,
    *,
    by_place: bool = False,
) -> Float[np.ndarray, "B h w"]:
    """Channels weighted by the mean derivative of a class's logit, summed: raw, with its sign.

    (Grad-CAM, arXiv:1610.02391, equation 2, before the ReLU.) Where the network ends in a mean over
    the map and a linear layer, and `layer` is that map, it is `model.dense_logits` but for the
    bias, divided by the number of places. Of Gramian models the logit is the sum of the heads'.

    Args:
      images: [B, H, W, 3], normalised.
      classes: whose logits; one for all images or one each. None: the largest of each.
      layer: a named map or the path of a module; None: the map that the classifier sees the mean
        of, or else the last of the trunk.
      by_place: weighs with the derivative of each place instead of their mean (HiResCAM,
        arXiv:2011.08891).

    Raises:
      InputError: a layer or a class that is not there; no classifier; images that the model does
        not take.
    """
    if not model.num_classes:
        raise InputError(
            f"this {type(model).__name__} has no classifier, and so no classes to explain. See "
            "effective_receptive_field"
        )
    layer = layer or classified_map(model)
    given = [] if classes is None else [_classes(classes, len(images), model.num_classes)]
    return np.asarray(compiled(_cam, model, [images, *given], layer, by_place))


def _cam(model: Backbone, images: Array, *given) -> Array:
    *classes, layer, by_place = given

    def outcome(maps):
        logits = maps["logits"]
        wanted = classes[0] if classes else jax.lax.stop_gradient(logits).argmax(-1)
        return jnp.take_along_axis(logits, wanted[:, None], axis=1).sum()

    found, gradient = derivative(model, images, layer, outcome)
    weights = gradient if by_place else gradient.mean((1, 2), keepdims=True)
    return (found * weights).sum(-1)


def _classes(given: int | Sequence[int], images: int, count: int) -> Int[Array, "B"]:
    numbers = np.asarray(given)
    if numbers.ndim == 0:
        numbers = np.repeat(numbers, images)
    if (
        numbers.shape != (images,)
        or not np.issubdtype(numbers.dtype, np.integer)
        or not ((numbers >= 0) & (numbers < count)).all()
    ):
        raise InputError(
            f"classes={given!r}: expected a whole number from 0 to {count - 1}, or one for each of "
            f"{images} images"
        )
    return jnp.asarray(numbers, jnp.int32)


def resized(raw: Float[np.ndarray, "B h w"], height: int, width: int) -> Float[np.ndarray, "B H W"]:
    """Bilinear, with half-pixel centres and without antialiasing, as OpenCV resizes maps."""
    shape = (len(raw), height, width)
    return np.asarray(jax.image.resize(jnp.asarray(raw), shape, "linear", antialias=False))


def shown(raw: Float[np.ndarray, "B h w"], height: int, width: int) -> Float[np.ndarray, "B H W"]:
    """As the usual tools show it: what is negative dropped, scaled to 0 to 1, resized.

    The contrast is always full, however weak the evidence: a picture has to say the largest value.
    """

    def scaled(maps: np.ndarray) -> np.ndarray:
        smallest = maps.min((1, 2), keepdims=True)
        largest = (maps - smallest).max((1, 2), keepdims=True)
        return (maps - smallest) / (np.float32(1e-7) + largest)

    return scaled(resized(scaled(np.maximum(raw, 0)), height, width))
