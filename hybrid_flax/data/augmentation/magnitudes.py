"""How strong an operation is: from the magnitudes of timm's policies to an operation's argument."""

import dataclasses
import math

import numpy as np

from hybrid_flax.data.augmentation.operations import Operation, draw_interpolation


def _sign(chance):
    return 1 if chance < 0.5 else -1


def _solarize(level):
    return min(256, int(256 * level))


def _factor(level, _):
    return 1.8 * level + 0.1


def _increasing_factor(level, chance):
    return max(0.1, 1 + _sign(chance) * 0.9 * level)


# {name: (operation, its argument at a level of 0 to 1, or more with mmax, and a chance in [0, 1))}
ARGUMENTS = {
    "Rotate": ("Rotate", lambda level, chance: _sign(chance) * 30 * level),
    "ShearX": ("ShearX", lambda level, chance: _sign(chance) * 0.3 * level),
    "ShearY": ("ShearY", lambda level, chance: _sign(chance) * 0.3 * level),
    "TranslateX": ("TranslateX", lambda level, chance: _sign(chance) * 0.45 * level),
    "TranslateY": ("TranslateY", lambda level, chance: _sign(chance) * 0.45 * level),
    "Posterize": ("Posterize", lambda level, _: int(4 * level)),
    "PosterizeIncreasing": ("Posterize", lambda level, _: 4 - int(4 * level)),
    "PosterizeOriginal": ("Posterize", lambda level, _: 4 + int(4 * level)),
    "Solarize": ("Solarize", lambda level, _: _solarize(level)),
    "SolarizeIncreasing": ("Solarize", lambda level, _: 256 - _solarize(level)),
    "SolarizeAdd": ("SolarizeAdd", lambda level, _: min(128, int(110 * level))),
    "Color": ("Color", _factor),
    "Contrast": ("Contrast", _factor),
    "Brightness": ("Brightness", _factor),
    "Sharpness": ("Sharpness", _factor),
    "ColorIncreasing": ("Color", _increasing_factor),
    "ContrastIncreasing": ("Contrast", _increasing_factor),
    "BrightnessIncreasing": ("Brightness", _increasing_factor),
    "SharpnessIncreasing": ("Sharpness", _increasing_factor),
    "Desaturate": ("Color", lambda level, _: 1 - min(1.0, 0.5 + 0.5 * level)),
    "GaussianBlur": ("GaussianBlur", lambda level, _: min(2.0, 0.1 + 1.9 * level)),
    "GaussianBlurRand": (
        "GaussianBlur",
        lambda level, chance: 0.1 + chance * (2.0 * min(1.0, level) - 0.1),
    ),
}


def operation_at(name: str, magnitude: float, chance: float) -> tuple[str, tuple[float, ...]]:
    """(operation, arguments) of a name in a policy at a magnitude from 0 to 10, or to mmax.

    `chance`, uniform in [0, 1), decides the sign (negative from 0.5 on) and what else is random.
    """
    if name not in ARGUMENTS:
        return name, ()
    operation, argument = ARGUMENTS[name]
    return operation, (argument(magnitude / 10, chance),)


@dataclasses.dataclass(frozen=True)
class Spread:
    """How far the magnitude of one application may stray from what is asked for."""

    std: float  # of a normal distribution; infinite: uniform from 0 to what is asked for
    highest: float

    def draw(self, rng: np.random.Generator, magnitude: float) -> float:
        if self.std == math.inf:
            magnitude = rng.uniform(0, magnitude)
        elif self.std:
            magnitude = rng.normal(magnitude, self.std)
        return min(max(magnitude, 0.0), self.highest)


def draw_operation(
    name: str, magnitude: float, spread: Spread, rng: np.random.Generator, interpolation: str
) -> Operation:
    """The operation of a name in a policy, with a magnitude, a sign and a filter of its own."""
    operation, args = operation_at(name, spread.draw(rng, magnitude), rng.random())
    return Operation(operation, args, draw_interpolation(interpolation, rng))
