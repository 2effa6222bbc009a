"""Decoding and cropping with Pillow, whose filters define the published recipes."""

import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

from hybrid_flax.errors import InputError

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class UnreadableImageError(InputError):
    """A file that is there but cannot be decoded; the message names it and the reason."""


def pillow_filter(interpolation: str) -> Image.Resampling:
    """The Pillow filter of that name; ValueError with the choices for an unknown one."""
    if interpolation not in FILTERS:
        raise InputError(
            f"unknown interpolation {interpolation!r}; choose one of {', '.join(FILTERS)}"
        )
    return FILTERS[interpolation]


def open_photo(data: bytes, name: str) -> Image.Image:
    """Reads the head of an image file of any format Pillow knows; `rgb` decodes the rest.

    An orientation noted in EXIF is not applied: timm and torchvision do not, and published
    accuracies are without. An image of more than twice `PIL.Image.MAX_IMAGE_PIXELS` (179 million
    pixels) counts as unreadable: Pillow takes it for an attack on memory.

    Raises UnreadableImageError, naming the image, for anything else than an image.
    """
    try:
        photo = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"cannot read image {name} ({len(data)} bytes): in no format that Pillow knows"
        ) from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, …
        raise UnreadableImageError(
            f"cannot read image {name} ({len(data)} bytes): {error}"
        ) from error
    photo.filename = name  # for the message of `rgb`
    return photo


def rgb(photo: Image.Image) -> Image.Image:
    """Decodes, and converts any mode as timm does: transparency is dropped, not blended.

    16-bit grey keeps its upper eight bits, where Pillow's own conversion would cut off at 255.

    Raises UnreadableImageError, naming the image, for an incomplete or damaged file.
    """
    try:
        photo.load()
        if photo.mode.startswith("I"):
            photo = Image.fromarray((np.asarray(photo) >> 8).clip(0, 255).astype(np.uint8))
        elif photo.mode == "P":
            photo = photo.convert("RGBA")  # a palette with transparency, too
        return photo if photo.mode == "RGB" else photo.convert("RGB")
    except Exception as error:
        name = getattr(photo, "filename", "") or f"of mode {photo.mode}, {photo.size}"
        raise UnreadableImageError(f"cannot read image {name}: {error}") from error


def eval_crop(
    photo: Image.Image,
    image_size: int = 224,
    crop_fraction: float = 0.875,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
) -> np.ndarray:
    """The crop that published accuracies are measured on, as timm and torchvision cut it.

    Args:
      photo: a Pillow image of any mode; converted to RGB.
      image_size: height and width of the result, in pixels.
      crop_fraction: the side of the crop as a fraction of the resized image's, in (0, 1].
      crop_mode: "center" scales the shorter side to ⌊image_size / crop_fraction⌋ and cuts the
        middle; "squash" scales both sides to it, giving up the aspect ratio, and cuts the middle.
      interpolation: "bicubic", "bilinear", "lanczos", "box" or "nearest", antialiased.

    Returns:
      uint8 [image_size, image_size, 3].

    Raises:
      ValueError: unknown mode or filter, or a fraction outside (0, 1].
    """
    if not 0 < crop_fraction <= 1:
        raise InputError(f"crop_fraction={crop_fraction}: expected a number above 0, up to 1")
    resample = pillow_filter(interpolation)
    resized = math.floor(image_size / crop_fraction)
    width, height = photo.size
    if crop_mode == "squash":
        width = height = resized
    elif crop_mode == "center":
        shorter = min(width, height)
        width, height = int(resized * width / shorter), int(resized * height / shorter)
    else:
        raise InputError(f'unknown crop_mode {crop_mode!r}; choose "center" or "squash"')
    photo = rgb(photo).resize((width, height), resample)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return np.asarray(photo.crop((left, top, left + image_size, top + image_size)))


def random_resized_crop(
    photo: Image.Image,
    image_size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str,
    rng: np.random.Generator,
) -> Image.Image:
    """A random part of the photo, resized to image_size × image_size (Szegedy et al., 2015).

    Ten tries for an area uniform in `scale` (fractions of the photo's area) with an aspect ratio
    log-uniform in `ratio` that fits; failing that, the middle of the photo at the nearest ratio
    allowed.
    """
    width, height = photo.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = rng.integers(0, width - crop_width, endpoint=True)
            top = rng.integers(0, height - crop_height, endpoint=True)
            break
    else:
        aspect = min(max(width / height, ratio[0]), ratio[1])
        crop_width = min(width, round(height * aspect))
        crop_height = min(height, round(width / aspect))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    crop = rgb(photo).crop((left, top, left + crop_width, top + crop_height))
    return crop.resize((image_size, image_size), pillow_filter(interpolation))
