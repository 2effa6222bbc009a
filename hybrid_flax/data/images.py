"""Decoding and cropping with Pillow, whose filters define the published recipes."""

import io
import math
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from hybrid_flax.errors import InputError
from hybrid_flax.settings.together import LARGEST_RESIZE

# What is opened at all: the formats of image datasets, by Pillow's names. Everything else that
# Pillow knows (PostScript, which it hands to Ghostscript, HDF5, GRIB, WMF, …) is only a risk.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF")

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
    """Reads the head of an image file of one of `FORMATS`; `rgb` decodes the rest.

    An orientation noted in EXIF is not applied: timm and torchvision do not, and published
    accuracies are without. Of an animation, or of several pages, it is the first. An image of more
    than twice `PIL.Image.MAX_IMAGE_PIXELS` (179 million pixels) counts as unreadable: Pillow takes
    it for an attack on memory.

    Raises UnreadableImageError, naming the image, for anything else than an image.
    """
    try:
        photo = Image.open(io.BytesIO(data), formats=FORMATS)
        if not all(photo.size):
            raise ValueError(f"it has {photo.width} × {photo.height} pixels")
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"cannot read image {name} ({len(data)} bytes): in none of the formats "
            + ", ".join(FORMATS)
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
    Of 32-bit integers and floats nothing says which value is white: they count as unreadable.

    Raises UnreadableImageError, naming the image, for an incomplete or damaged file.
    """
    try:
        photo.load()
        if not all(photo.size):
            raise ValueError("it has no pixels")
        bits = _grey_bits(photo)
        if bits:
            photo = Image.fromarray((np.asarray(photo) >> (bits - 8)).clip(0, 255).astype(np.uint8))
        elif photo.mode[0] in "IF":
            raise ValueError(
                "its pixels are signed or 32-bit integers, or floats, and nothing says which "
                "value is white; save it with 8 or 16 bits"
            )
        elif photo.mode == "P":
            photo = photo.convert("RGBA")  # a palette with transparency, too
        return photo if photo.mode == "RGB" else photo.convert("RGB")
    except Exception as error:
        name = getattr(photo, "filename", "") or f"of mode {photo.mode}, {photo.size}"
        raise UnreadableImageError(f"cannot read image {name}: {error}") from error


def _grey_bits(photo: Image.Image) -> int:
    """How many bits the values of a decoded grey image have, if more than 8 are known; else 0."""
    if photo.format in ("PNG", "PPM") and photo.mode == "I":  # of 16 bits, as Pillow reads them
        return 16
    if not photo.mode.startswith("I;16"):
        return 0
    tags = getattr(photo, "tag_v2", {})  # of TIFF
    if tags.get(_PHOTOMETRIC) == 0:
        raise ValueError("16-bit grey whose 0 is white; save it with 0 for black")
    return 12 if tags.get(_BITS_PER_SAMPLE) in (12, (12,)) else 16


_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262


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
      InputError: unknown mode or filter, a fraction below 0.01 or above 1, a size that is no whole
        number or needs more than 32,768 pixels before the crop, no Pillow image, or an unreadable
        one.
    """
    if not isinstance(photo, Image.Image):
        raise InputError(
            f"the photo is a {type(photo).__name__}; expected a Pillow image: PIL.Image.open(FILE) "
            "or PIL.Image.fromarray(ARRAY), uint8 [H, W, 3]"
        )
    if not isinstance(crop_fraction, int | float):
        transform = crop_fraction
        if not hasattr(transform, "crop_fraction"):
            raise InputError(
                f"crop_fraction={transform!r}: expected a number above 0, up to 1, or "
                f"model_info(name).eval_transform, not {type(transform).__name__}"
            )
        crop_fraction, crop_mode = transform.crop_fraction, transform.crop_mode
        interpolation = transform.interpolation
    check_eval_crop(crop_fraction, crop_mode)
    whole = isinstance(image_size, int | np.integer) and not isinstance(image_size, bool)
    if not whole or not 1 <= image_size <= LARGEST_RESIZE * crop_fraction:
        raise InputError(
            f"image_size={image_size!r}: expected a whole number of pixels, at least 1, for images "
            f"of at most {LARGEST_RESIZE} pixels before the crop"
        )
    resample = pillow_filter(interpolation)
    resized = math.floor(image_size / crop_fraction)
    photo = rgb(photo)
    width = height = resized
    if crop_mode == "center":
        shorter = min(photo.size)
        width, height = (resized * side // shorter for side in photo.size)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    box = (left, top, left + image_size, top + image_size)
    if width * height <= _WHOLE * image_size**2:
        return np.asarray(photo.resize((width, height), resample).crop(box))
    return np.asarray(_part_of_resized(photo, (width, height), box, resample))


# A photo is resized as a whole, as published accuracies are measured, if it then has no more than
# so many times the crop's pixels: with the usual fractions, up to an aspect ratio of 1 to 24.
_WHOLE = 32
_LEAST_FRACTION = 0.01


def check_eval_crop(crop_fraction: float, crop_mode: str) -> None:
    """Raises InputError for a fraction or a mode that `eval_crop` does not take."""
    if not _LEAST_FRACTION <= crop_fraction <= 1:
        raise InputError(
            f"crop_fraction={crop_fraction}: expected a number above 0, up to 1, and no less than "
            f"{_LEAST_FRACTION}"
        )
    if crop_mode not in ("center", "squash"):
        raise InputError(f'unknown crop_mode {crop_mode!r}; choose "center" or "squash"')


def _part_of_resized(
    photo: Image.Image, size: tuple[int, int], box: "Box", resample: Image.Resampling
) -> Image.Image:
    """What `photo.resize(size).crop(box)` shows up to rounding, at the cost of the box alone."""
    scales = photo.width / size[0], photo.height / size[1]
    part = [side * scales[i % 2] for i, side in enumerate(box)]  # in pixels of the photo
    reach = [math.ceil(3 * max(scale, 1)) + 1 for scale in scales]  # of lanczos, the widest filter
    # Pillow takes the part in float32, which is exact enough near 0 only.
    x, y = (max(math.floor(part[i]) - reach[i], 0) for i in (0, 1))
    right, bottom = (min(math.ceil(part[2 + i]) + reach[i], photo.size[i]) for i in (0, 1))
    near = photo.crop((x, y, right, bottom))
    x0, y0, x1, y1 = part[0] - x, part[1] - y, part[2] - x, part[3] - y
    wanted = (max(x0, 0.0), max(y0, 0.0), min(x1, near.width), min(y1, near.height))
    return near.resize((box[2] - box[0], box[3] - box[1]), resample, wanted)


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
        crop_width = max(min(width, round(height * aspect)), 1)
        crop_height = max(min(height, round(width / aspect)), 1)
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
