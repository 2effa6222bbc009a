"""Policies that `augment.auto_augment` and its neighbours name: which operations an image gets.

A policy draws a list of operations for one image from a random generator; applying them is
`augment.apply_operations`. Strings, sets and magnitudes mean what they mean in timm 1.0, and in
torchvision where timm has nothing like it.
"""

import dataclasses
from typing import Protocol

import numpy as np

from hybrid_flax.data.augmentation.auto_augment import SUB_POLICIES, AutoAugment
from hybrid_flax.data.augmentation.operations import Operation, draw_interpolation
from hybrid_flax.data.augmentation.rand_augment import RandAugment
from hybrid_flax.errors import InputError


class Policy(Protocol):
    """Draws what is done to an image. Instances are pickled into data-loading processes."""

    def draw(self, rng: np.random.Generator, interpolation: str) -> list[Operation]:
        """Draws one image's operations; with `interpolation="random"`, bilinear or bicubic each."""
        ...


def _level(highest, step):
    """Step 0 to 30 of 0 to `highest`, in float32 and from the nearer end, as torchvision has it.

    It matters: the middle one of its translations is 15 pixels, not 16.
    """
    size, highest = float(np.float32(highest) / np.float32(30)), float(np.float32(highest))
    return float(np.float32(size * step if step < 15 else highest - size * (30 - step)))


def _signed(highest):
    return lambda step, sign: sign * _level(highest, step)


def _factor(step, sign):
    return 1 + sign * _level(0.99, step)


def _pixels(step, sign):
    return -sign * int(_level(32, step))


_WIDE = {  # {operation: its argument at a step of 0 to 30 and a sign}
    "ShearX": _signed(0.99),
    "ShearY": _signed(0.99),
    "TranslateXPixels": _pixels,
    "TranslateYPixels": _pixels,
    "Rotate": _signed(135),
    "Brightness": _factor,
    "Color": _factor,
    "Contrast": _factor,
    "Sharpness": _factor,
    "Posterize": lambda step, _: 8 - round(step / 5),
    "Solarize": lambda step, _: 255 - 8.5 * step,
}
_WIDE_NAMES = ("Identity", "AutoContrast", "Equalize", *_WIDE)


@dataclasses.dataclass(frozen=True)
class TrivialAugment:
    """TrivialAugment in the wide space (arXiv:2103.10158), as torchvision has it.

    One operation per image, at one of 31 steps. Translations are in pixels whatever the image's
    size, and what comes from outside of it is black.
    """

    def draw(self, rng: np.random.Generator, interpolation: str) -> list[Operation]:
        name = _WIDE_NAMES[rng.integers(len(_WIDE_NAMES))]
        operation = trivial_operation(name, int(rng.integers(31)), 1 - 2 * int(rng.integers(2)))
        if operation is None:
            return []
        return [operation._replace(interpolation=draw_interpolation(interpolation, rng))]


def trivial_operation(name: str, step: int, sign: int) -> Operation | None:
    """Makes an operation of TrivialAugment's wide space at a step of 0 to 30; None: identity."""
    if name == "Identity":
        return None
    args = (_WIDE[name](step, sign),) if name in _WIDE else ()
    return Operation(name, args, fill=(0, 0, 0))


@dataclasses.dataclass(frozen=True)
class ColourJitter:
    """Brightness, contrast, saturation and hue in random order, as torchvision draws them.

    The first three are multiplied by factors uniform in 1 ± strength (never below 0), the hue is
    turned by up to ± strength of a turn.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float

    def draw(self, rng: np.random.Generator, interpolation: str) -> list[Operation]:
        operations = [
            Operation(name, (rng.uniform(max(0.0, 1 - strength), 1 + strength),))
            for name, strength in (
                ("Brightness", self.brightness),
                ("Contrast", self.contrast),
                ("Color", self.saturation),
            )
            if strength
        ]
        if self.hue:
            operations.append(Operation("Hue", (rng.uniform(-self.hue, self.hue),)))
        return [operations[i] for i in rng.permutation(len(operations))]


@dataclasses.dataclass(frozen=True)
class Chain:
    """One policy after another."""

    policies: tuple[Policy, ...]

    def draw(self, rng: np.random.Generator, interpolation: str) -> list[Operation]:
        return [step for policy in self.policies for step in policy.draw(rng, interpolation)]


def parse_policy(
    text: str, colour_jitter: tuple[float, float, float, float] = (0.0,) * 4
) -> Policy | None:
    """Makes the policy that a config asks for; None where nothing is to be done.

    As in timm, colour jitter is dropped where `text` names a policy, except beside 3-Augment, of
    which it is a part.

    Args:
      text: "", "rand-…", "original", "originalr", "v0", "v0r" or "3a" (each with -mstd…),
        "trivial-wide" (or torchvision's name for it, "ta_wide").
      colour_jitter: strengths of brightness, contrast, saturation and hue.

    Raises:
      InputError: `text` is none of these; the message says what is.
    """
    policies: list[Policy] = []
    name = text.partition("-")[0]
    if text in ("trivial-wide", "ta_wide"):
        policies.append(TrivialAugment())
    elif name == "rand":
        policies.append(RandAugment.parse(text))
    elif name in SUB_POLICIES:
        policies.append(AutoAugment.parse(text))
    elif text:
        raise InputError(
            f"augment.auto_augment={text!r} is not understood; choose one of rand-m9-mstd0.5-inc1 "
            f"(and the like), {', '.join(SUB_POLICIES)}, trivial-wide, or '' for none"
        )
    if any(colour_jitter) and (not text or "3a" in text):
        policies.append(ColourJitter(*colour_jitter))
    if len(policies) > 1:
        return Chain(tuple(policies))
    return policies[0] if policies else None
