"""Where deformable convolution reads (DCNv3 of InternImage, arXiv:2211.05778).

Positions are (x, y) in pixels of the layer's map, whose centres are whole numbers, the map being
unpadded. Pixels of the image follow by the stride: (position + 0.5) · stride - 0.5.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from hybrid_flax.analysis.layers import compiled
from hybrid_flax.errors import InputError
from hybrid_flax.models.backbone import Backbone
from hybrid_flax.weights.functions import calls_through
from pallas.watching import watched

Points = tuple[Float[np.ndarray, "B H W groups points 2"], Float[np.ndarray, "B H W groups points"]]


def sampling_points(model: Backbone, images: Array) -> dict[str, Points]:
    """The points that every deformable layer read, {path: (positions, weights)}, float32.

    Positions (x, y) are in pixels of the layer's map; of a layer's nine points x runs slowest. The
    weights of a place's points sum to 1 in each group.

    Raises:
      InputError: the model has no deformable convolution; images that it does not take.
    """
    found = compiled(_points, model, [images])
    return {
        path: (np.asarray(positions, np.float32), np.asarray(weights, np.float32))
        for path, (positions, weights) in found.items()
    }


def _points(model: Backbone, images: Array) -> dict[str, tuple[Array, Array]]:
    owners: dict[int, str] = {}
    with watched() as calls:

        def named(call, path, part, *args, **kwargs):
            before = len(calls)
            output = call(part, *args, **kwargs)
            for number in range(before, len(calls)):
                owners.setdefault(number, path)
            return output

        with calls_through(model, named):
            model.intermediates(images)
    found = {
        owners[i]: (seen.arrays["positions"], seen.arrays["weights"])
        for i, seen in enumerate(calls)
        if seen.kind == "sampling"
    }
    if not found:
        raise InputError(
            f"this {type(model).__name__} has no deformable convolution: take a "
            "unified_internimage_* model"
        )
    return found


class Spread(NamedTuple):
    """How far points lie from the place that they are for."""

    distance: float  # mean, in pixels of the map
    weighted_distance: float  # the same, weighted
    outside: float  # share of the points that lie outside of the map, where nothing is read
    largest: float


def spread(points: Points) -> Spread:
    """Sums up the points of a layer, over all places, groups and images."""
    positions, weights = points
    _, height, width, *_ = positions.shape
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    centres = np.stack([x, y], axis=-1)[None, :, :, None, None]
    distance = np.linalg.norm(positions - centres, axis=-1)
    px, py = positions[..., 0], positions[..., 1]
    outside = (px < 0) | (py < 0) | (px > width - 1) | (py > height - 1)
    return Spread(
        float(distance.mean()),
        float((distance * weights).sum() / weights.sum()),
        float(outside.mean()),
        float(distance.max()),
    )


def to_image(positions: Float[np.ndarray, "... 2"], stride: float) -> Float[np.ndarray, "... 2"]:
    """Positions in pixels of the image."""
    return (positions + 0.5) * stride - 0.5


def composed(
    upper: Points, lower: Points, image: int, row: int, column: int
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n"]]:
    """What a place of the upper layer reads through the layer below it, on a map of equal size.

    Each of its points is read at the nearest place, with the points which that place has in turn:
    9 · groups, then 81 · groups · groups. Weights multiply, and are divided by the number of groups
    of each layer, so that they sum to 1, less what lies outside. (As the figures of deformable
    convolution, arXiv:1703.06211.)

    Returns:
      (positions in pixels of the lower map, weights)
    """
    positions, weights = (each[image, row, column].reshape(-1, *each.shape[5:]) for each in upper)
    groups = upper[1].shape[3]
    height, width = lower[1].shape[1:3]
    nearest = np.rint(positions).astype(int)
    inside = ((nearest >= 0) & (nearest < [width, height])).all(-1)
    nearest, weights = nearest[inside], weights[inside] / groups
    below = lower[0][image, nearest[:, 1], nearest[:, 0]]
    shares = lower[1][image, nearest[:, 1], nearest[:, 0]] / lower[1].shape[3]
    return below.reshape(-1, 2), (weights[:, None, None] * shares).reshape(-1)
