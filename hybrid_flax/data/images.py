"""Decoding and cropping with Pillow, whose filters define the published recipes."""

import io
import math
from typing import Protocol

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
    """Finds the Pillow filter of that name; InputError with the choices for an unknown one."""
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
    photo.filename = name  # for messages
    vars(photo)["encoded"] = data  # to decode only a part
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


class Transform(Protocol):
    """What `model_info(name).eval_transform` is."""

    @property
    def crop_fraction(self) -> float: ...

    @property
    def crop_mode(self) -> str: ...

    @property
    def interpolation(self) -> str: ...

    @property
    def mean(self) -> tuple[float, float, float]: ...

    @property
    def std(self) -> tuple[float, float, float]: ...


def eval_crop(
    photo: Image.Image,
    image_size: int = 224,
    crop_fraction: float | Transform = 0.875,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
) -> np.ndarray:
    """Cuts the crop that published accuracies are measured on, as timm and torchvision do.

    Args:
      photo: a Pillow image of any mode; converted to RGB.
      image_size: height and width of the result, in pixels.
      crop_fraction: the side of the crop as a fraction of the resized image's, in (0, 1]; or
        `model_info(name).eval_transform`, which says the next two, too.
      crop_mode: "center" scales the shorter side to ⌊image_size / crop_fraction⌋ and cuts the
        middle; "squash" scales both sides to it, giving up the aspect ratio, and cuts the middle.
      interpolation: "bicubic", "bilinear", "lanczos", "box" or "nearest", antialiased.

    Returns:
      uint8 [image_size, image_size, 3].

    Raises:
      ValueError: unknown mode or filter, or a fraction outside (0, 1].
    """
    if not isinstance(crop_fraction, int | float):
        transform = crop_fraction
        crop_fraction, crop_mode = transform.crop_fraction, transform.crop_mode
        interpolation = transform.interpolation
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


Box = tuple[int, int, int, int]  # left, top, right, bottom


def random_resized_crop(
    photo: Image.Image,
    image_size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str,
    rng: np.random.Generator,
    *,
    fast: bool = False,
) -> tuple[Image.Image, Box]:
    """Takes a random part of the photo, resized to image_size × image_size (Szegedy et al., 2015).

    Ten tries for an area uniform in `scale` (fractions of the photo's area) with an aspect ratio
    log-uniform in `ratio` that fits; failing that, the middle of the photo at the nearest ratio
    allowed. Of a photo that is only opened no more is decoded than that takes.

    With `fast`, a JPEG of whose part both sides are at least twice image_size is decoded at 1/2,
    1/4 or 1/8 of its size, and the filter has less than a factor of two left to do: almost the same
    image, not the same.

    Returns:
      The RGB image, and which part of the photo it shows.
    """
    width, height = photo.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(0, width - crop_width, endpoint=True))
            top = int(rng.integers(0, height - crop_height, endpoint=True))
            break
    else:
        aspect = min(max(width / height, ratio[0]), ratio[1])
        crop_width = min(width, round(height * aspect))
        crop_height = min(height, round(width / aspect))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    box = (left, top, left + crop_width, top + crop_height)
    photo, factor = _decode_part(photo, box, image_size if fast else None)
    size, resample = (image_size, image_size), pillow_filter(interpolation)
    if factor == 1:
        return photo.crop(box).resize(size, resample), box
    x0, y0, x1, y1 = (side / factor for side in box)
    return photo.resize(size, resample, (x0, y0, x1, y1)), box


def _decode_part(photo: Image.Image, box: Box, enough: int | None) -> tuple[Image.Image, int]:
    """Decodes at least a part: (RGB, by which factor it is reduced).

    Args:
      enough: the sides of the part may be reduced to this, in pixels; None: not at all.
    """
    encoded = getattr(photo, "encoded", None)
    if photo.format != "JPEG" or encoded is None:
        return rgb(photo), 1
    width, height = photo.size
    # Rows below the part are not decoded; some more than needed, for the filter of the colours.
    rows = min(-(-box[3] // 16) * 16 + 16, height)
    if rows < height:
        name = getattr(photo, "filename", "")
        photo = open_photo(_with_height(encoded, rows), name)
    factor = 1
    if enough:
        shorter = min(box[2] - box[0], box[3] - box[1])
        factor = next((factor for factor in (8, 4, 2, 1) if shorter >= factor * enough), 1)
        photo.draft(None, (width // factor, photo.height // factor))  # takes that factor, or less
    return rgb(photo), factor


def _with_height(jpeg: bytes, rows: int) -> bytes:
    """Makes a sequential JPEG say that it has only so many rows; others stay as they are.

    The decoder stops after these. So it would not notice that a file is cut off further down: one
    without an end marker is left as it is, too.
    """
    place = 2
    while place + 9 < len(jpeg) and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        if marker in (0xC0, 0xC1):  # start of a sequential frame: length, precision, height
            if jpeg.rfind(b"\xff\xd9") < place:
                break
            return jpeg[: place + 5] + rows.to_bytes(2, "big") + jpeg[place + 7 :]
        if marker in (0xC2, 0xDA):  # progressive: the whole image comes several times
            break
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return jpeg
