"""Operations on single images on the host, with the semantics of timm's and torchvision's.

They equal theirs to the bit, because both call Pillow the same way. `policies.py` draws them: a
list of `Operation`s, complete with everything random, so that whatever belongs to the image (a
label map) can be moved by the same list.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from hybrid_flax.data.images import pillow_filter
from hybrid_flax.errors import InputError


def _posterize(photo, bits):
    if bits < 1:  # the strongest magnitude keeps nothing, which Pillow refuses
        return photo.point(lambda _: 0)
    return photo if bits >= 8 else ImageOps.posterize(photo, int(bits))


def _solarize_add(photo, amount):
    table = [min(255, value + int(amount)) if value < 128 else value for value in range(256)]
    return photo.point(table * len(photo.getbands()))


def _hue(photo, turn):
    hue, saturation, value = photo.convert("HSV").split()
    offset = int(turn * 255)  # 255 steps to a turn, yet the sum is taken modulo 256: torchvision's
    hue = hue.point([(step + offset) % 256 for step in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


_WITHOUT_ARGUMENT: dict[str, Callable[[Image.Image], Image.Image]] = {
    "AutoContrast": ImageOps.autocontrast,
    "Equalize": ImageOps.equalize,
    "Invert": ImageOps.invert,
    "FlipLeftRight": ImageOps.mirror,
    "FlipTopBottom": ImageOps.flip,
}
_COLOUR: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Posterize": _posterize,
    "Solarize": lambda photo, threshold: ImageOps.solarize(photo, math.ceil(threshold)),
    "SolarizeAdd": _solarize_add,
    "Color": lambda photo, factor: ImageEnhance.Color(photo).enhance(factor),
    "Contrast": lambda photo, factor: ImageEnhance.Contrast(photo).enhance(factor),
    "Brightness": lambda photo, factor: ImageEnhance.Brightness(photo).enhance(factor),
    "Sharpness": lambda photo, factor: ImageEnhance.Sharpness(photo).enhance(factor),
    "Hue": _hue,
    "GaussianBlur": lambda photo, radius: photo.filter(ImageFilter.GaussianBlur(radius)),
}
Matrix = tuple[float, float, float, float, float, float]
_AFFINE: dict[
    str, Callable[[float, tuple[int, int]], Matrix]
] = {  # Pillow's six numbers, from a place in the result to one in the photo
    "ShearX": lambda shear, size: (1, shear, 0, 0, 1, 0),
    "ShearY": lambda shear, size: (1, 0, 0, shear, 1, 0),
    "TranslateX": lambda part, size: (1, 0, part * size[0], 0, 1, 0),
    "TranslateY": lambda part, size: (1, 0, 0, 0, 1, part * size[1]),
    "TranslateXPixels": lambda pixels, size: (1, 0, pixels, 0, 1, 0),
    "TranslateYPixels": lambda pixels, size: (1, 0, 0, 0, 1, pixels),
}
_GEOMETRIC = ("FlipLeftRight", "FlipTopBottom", "Rotate", *_AFFINE)
_OPS = tuple(dict.fromkeys((*_WITHOUT_ARGUMENT, *_COLOUR, *_GEOMETRIC)))


def augment_op(
    photo: Image.Image,
    name: str,
    *args: float,
    fill: tuple[int, int, int] = (124, 116, 104),
    interpolation: str = "bicubic",
) -> Image.Image:
    """Applies one operation of RandAugment (arXiv:1909.13719) or its relatives to a Pillow image.

    Args:
      photo: RGB.
      name: AutoContrast, Equalize, Invert, FlipLeftRight, FlipTopBottom (no argument); Rotate
        (degrees, anticlockwise); Posterize (bits kept, black for none); Solarize (threshold from
        which values are inverted); SolarizeAdd (added to values below 128); Color, Contrast,
        Brightness, Sharpness (factor, 1 changes nothing; Color 0 is grey); Hue (turns, -0.5 to
        0.5); GaussianBlur (radius in pixels); ShearX, ShearY (shift per pixel); TranslateX,
        TranslateY (fraction of that side, positive to the left or up) and the same with Pixels at
        the end.
      *args: that argument.
      fill: RGB of places that come from outside of the photo; the default is ImageNet's mean.
      interpolation: filter of the geometric operations, "nearest", "bilinear" or "bicubic".

    Raises:
      ValueError: unknown name, missing or superfluous argument, unknown filter.
    """
    if name not in _OPS:
        raise InputError(f"unknown operation {name!r}; choose one of {', '.join(_OPS)}")
    expected = 0 if name in _WITHOUT_ARGUMENT else 1
    if len(args) != expected:
        raise InputError(f"{name} takes {expected} argument(s), got {len(args)}: {args}")
    resample = pillow_filter(interpolation)
    if name in _WITHOUT_ARGUMENT:
        return _WITHOUT_ARGUMENT[name](photo)
    (argument,) = args
    if name == "Rotate":
        return photo.rotate(argument, resample=resample, fillcolor=tuple(fill))
    if name in _AFFINE:
        matrix = _AFFINE[name](argument, photo.size)
        return photo.transform(
            photo.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=tuple(fill)
        )
    return _COLOUR[name](photo, argument)


class Operation(NamedTuple):
    """An operation as it was drawn, with all that it depends on."""

    name: str
    args: tuple[float, ...] = ()
    interpolation: str = "bicubic"
    fill: tuple[int, int, int] | None = None  # None: what the caller fills with

    @property
    def is_geometric(self) -> bool:
        """Whether it moves pixels; all others only change their colours."""
        return self.name in _GEOMETRIC

    def source_of_pixels(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(matrix [2, 2], offset [2]): a geometric operation shows at (x, y) what was at
        matrix·(x, y) + offset, in a photo of this width and height."""
        if self.name == "FlipLeftRight":
            return np.diag([-1.0, 1.0]), np.array([size[0], 0.0])
        if self.name == "FlipTopBottom":
            return np.diag([1.0, -1.0]), np.array([0.0, size[1]])
        if self.name == "Rotate":
            angle = math.radians(self.args[0])
            cos, sin = math.cos(angle), math.sin(angle)
            matrix, centre = np.array([[cos, -sin], [sin, cos]]), np.array(size) / 2
            return matrix, centre - matrix @ centre
        a, b, c, d, e, f = _AFFINE[self.name](self.args[0], size)
        return np.array([[a, b], [d, e]]), np.array([c, f])


def apply_operations(
    photo: Image.Image, operations: Iterable[Operation], *, fill: tuple[int, int, int]
) -> Image.Image:
    """Applies the operations in turn to one RGB photo."""
    for name, args, interpolation, own_fill in operations:
        photo = augment_op(photo, name, *args, fill=own_fill or fill, interpolation=interpolation)
    return photo


def draw_interpolation(interpolation: str, rng: np.random.Generator) -> str:
    """Resolves "random" to bilinear or bicubic, evenly; returns any other name as it is."""
    if interpolation == "random":
        return "bilinear" if rng.random() < 0.5 else "bicubic"
    return interpolation


def fill_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """Rounds the dataset's mean colour, 0..1, as timm does for filling: (124, 116, 104)."""
    red, green, blue = (min(255, round(255 * value)) for value in mean)
    return red, green, blue
