"""From photos to what a model takes, and from what it gives to names, without a run."""

import functools
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from hybrid_flax.data.images import Transform, eval_crop
from hybrid_flax.errors import InputError


def model_input(photos: Sequence[Image.Image], image_size: int, transform: Transform) -> np.ndarray:
    """Crops photos as published accuracies were measured, and normalises them.

    Args:
      photos: Pillow images of any size and mode.
      image_size: height and width, in pixels.
      transform: `model_info(name).eval_transform`.

    Returns:
      float32 [B, image_size, image_size, 3].

    Raises:
      InputError: what `eval_crop` cannot crop, or no photo.
    """
    if not isinstance(photos, Iterable) or isinstance(photos, str):
        raise InputError(f"photos: expected a list of them, not one {type(photos).__name__}")
    crops = [eval_crop(photo, image_size, transform) for photo in photos]
    if not crops:
        raise InputError("photos: expected at least one")
    return normalise(np.stack(crops), transform.mean, transform.std)


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [..., 3] to float32 with the mean and standard deviation of values from 0 to 1.

    Raises InputError for another dtype: nothing says which of its values is white.
    """
    if getattr(pixels, "dtype", None) != np.uint8:
        kind = getattr(pixels, "dtype", type(pixels).__name__)
        raise InputError(f"pixels: expected an array of uint8, from 0 to 255, not {kind}")
    scaled = pixels.astype(np.float32) / np.float32(255)
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """A name of each of the 1000 classes of ImageNet-1k, in the order of all released models."""
    file = pathlib.Path(__file__).parent / "imagenet_classes.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())
