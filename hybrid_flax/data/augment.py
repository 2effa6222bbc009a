"""Augmentation of single images on the host, with the semantics of timm's recipes.

Operations equal timm's to the bit, because both call Pillow the same way.
"""

import dataclasses
import re

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from hybrid_flax.data.images import pillow_filter
from hybrid_flax.errors import InputError


def _posterize(photo, bits):
    if bits < 1:  # the strongest magnitude keeps nothing, which Pillow refuses
        return photo.point(lambda _: 0)
    return photo if bits >= 8 else ImageOps.posterize(photo, int(bits))


def _solarize_add(photo, amount):
    amount = min(128, int(amount))
    table = [min(255, value + amount) if value < 128 else value for value in range(256)]
    return photo.point(table * len(photo.getbands()))


def _affine(photo, matrix, **geometry):
    return photo.transform(photo.size, Image.Transform.AFFINE, matrix, **geometry)


_WITHOUT_ARGUMENT = {
    "AutoContrast": ImageOps.autocontrast,
    "Equalize": ImageOps.equalize,
    "Invert": ImageOps.invert,
}
_COLOUR = {
    "Posterize": _posterize,
    "Solarize": ImageOps.solarize,
    "SolarizeAdd": _solarize_add,
    "Color": lambda photo, factor: ImageEnhance.Color(photo).enhance(factor),
    "Contrast": lambda photo, factor: ImageEnhance.Contrast(photo).enhance(factor),
    "Brightness": lambda photo, factor: ImageEnhance.Brightness(photo).enhance(factor),
    "Sharpness": lambda photo, factor: ImageEnhance.Sharpness(photo).enhance(factor),
}
_GEOMETRIC = {
    "Rotate": lambda photo, degrees, **geometry: photo.rotate(degrees, **geometry),
    "ShearX": lambda photo, shear, **geometry: _affine(photo, (1, shear, 0, 0, 1, 0), **geometry),
    "ShearY": lambda photo, shear, **geometry: _affine(photo, (1, 0, 0, shear, 1, 0), **geometry),
    "TranslateX": lambda photo, part, **geometry: _affine(
        photo, (1, 0, part * photo.size[0], 0, 1, 0), **geometry
    ),
    "TranslateY": lambda photo, part, **geometry: _affine(
        photo, (1, 0, 0, 0, 1, part * photo.size[1]), **geometry
    ),
}
_OPS = (*_WITHOUT_ARGUMENT, *_COLOUR, *_GEOMETRIC)


def augment_op(
    photo: Image.Image,
    name: str,
    *args: float,
    fill: tuple[int, int, int] = (124, 116, 104),
    interpolation: str = "bicubic",
) -> Image.Image:
    """One RandAugment operation (Cubuk et al., arXiv:1909.13719); Pillow image → Pillow image.

    Args:
      photo: RGB.
      name: AutoContrast, Equalize, Invert (no argument); Rotate (degrees, anticlockwise);
        Posterize (bits kept); Solarize (threshold from which values are inverted); SolarizeAdd
        (added to values below 128); Color, Contrast, Brightness, Sharpness (factor, 1 changes
        nothing); ShearX, ShearY (shift per pixel); TranslateX, TranslateY (fraction of that side).
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
    if name in _GEOMETRIC:
        return _GEOMETRIC[name](photo, *args, resample=resample, fillcolor=fill)
    return (_WITHOUT_ARGUMENT | _COLOUR)[name](photo, *args)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """RandAugment as timm's strings describe it: `rand-m9-mstd0.5-inc1`.

    Per image `layers` operations are drawn with replacement; each is then applied with probability
    one half, with its own magnitude.
    """

    magnitude: float = 10.0  # m: 0 to 10
    magnitude_std: float = 0.0  # mstd: of the normal distribution around m, clipped to 0…10
    layers: int = 2  # n
    increasing: bool = False  # inc1: colour operations, too, get stronger with m

    @classmethod
    def parse(cls, text: str) -> "RandAugment":
        """Reads `rand-m9-mstd0.5-inc1`; ValueError for anything else."""
        match = re.fullmatch(
            r"rand(?:-(?:m(?P<m>\d+(?:\.\d+)?)|n(?P<n>\d+)|mstd(?P<mstd>\d+(?:\.\d+)?)|inc(?P<inc>[01])))*",
            text,
        )
        if not match:
            raise InputError(
                f"RandAugment {text!r} is not understood; expected the form rand-m9-mstd0.5-inc1: "
                "magnitude m, its standard deviation mstd, number of operations n, inc0 or inc1"
            )
        policy = cls(
            magnitude=float(match["m"] or cls.magnitude),
            magnitude_std=float(match["mstd"] or cls.magnitude_std),
            layers=int(match["n"] or cls.layers),
            increasing=match["inc"] == "1",
        )
        if not 0 <= policy.magnitude <= 10 or policy.layers < 1:
            raise InputError(f"RandAugment {text!r}: m must be 0 to 10 and n at least 1")
        return policy

    def __call__(
        self,
        photo: Image.Image,
        rng: np.random.Generator,
        *,
        fill: tuple[int, int, int],
        interpolation: str,
    ) -> Image.Image:
        """Augments one RGB photo. `interpolation="random"` draws bilinear or bicubic per op."""
        for index in rng.integers(0, len(_OPS), self.layers):
            if rng.random() >= 0.5:
                continue
            magnitude = min(max(rng.normal(self.magnitude, self.magnitude_std), 0.0), 10.0)
            name = _OPS[index]
            args = self.arguments(name, magnitude, sign=1 if rng.random() < 0.5 else -1)
            chosen = draw_interpolation(interpolation, rng)
            photo = augment_op(photo, name, *args, fill=fill, interpolation=chosen)
        return photo

    def arguments(self, name: str, magnitude: float, sign: int) -> tuple[float, ...]:
        """What `augment_op` gets for an operation at a magnitude from 0 to 10, sign ±1."""
        level = magnitude / 10
        if name in _WITHOUT_ARGUMENT:
            return ()
        if name == "Rotate":
            return (sign * 30 * level,)
        if name in ("ShearX", "ShearY"):
            return (sign * 0.3 * level,)
        if name in ("TranslateX", "TranslateY"):
            return (sign * 0.45 * level,)
        if name == "SolarizeAdd":
            return (min(128, int(110 * level)),)
        if name == "Posterize":
            bits = int(4 * level)
            return (4 - bits if self.increasing else bits,)
        if name == "Solarize":
            threshold = min(256, int(256 * level))
            return (256 - threshold if self.increasing else threshold,)
        if self.increasing:
            return (max(0.1, 1 + sign * 0.9 * level),)
        return (1.8 * level + 0.1,)


def draw_interpolation(interpolation: str, rng: np.random.Generator) -> str:
    """Resolves "random" to bilinear or bicubic, evenly; returns any other name as it is."""
    if interpolation == "random":
        return "bilinear" if rng.random() < 0.5 else "bicubic"
    return interpolation


def fill_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The dataset's mean colour, 0..1, as timm rounds it for filling: (124, 116, 104)."""
    return tuple(round(255 * value) for value in mean)
