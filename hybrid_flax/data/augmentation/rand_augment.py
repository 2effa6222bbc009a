"""RandAugment (Cubuk et al., arXiv:1909.13719) as timm writes and reads it."""

import dataclasses

import numpy as np

from hybrid_flax.data.augmentation.magnitudes import ARGUMENTS, Spread, draw_operation
from hybrid_flax.data.augmentation.operations import Operation
from hybrid_flax.data.augmentation.policy_text import read_options, spread_of
from hybrid_flax.errors import InputError

_PLAIN = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
_INCREASING = tuple(
    f"{name}Increasing" if f"{name}Increasing" in ARGUMENTS else name for name in _PLAIN
)
# {t: {name: weight}, or names that are all as likely}
_SETS: dict[str, tuple[str, ...] | dict[str, float]] = {
    "weights": {
        "Rotate": 3, "ShearX": 2, "ShearY": 2, "TranslateX": 1, "TranslateY": 1,
        "ColorIncreasing": 0.25, "SharpnessIncreasing": 0.25, "AutoContrast": 0.25,
        "SolarizeIncreasing": 0.05, "SolarizeAdd": 0.05, "ContrastIncreasing": 0.05,
        "BrightnessIncreasing": 0.05, "Equalize": 0.05, "PosterizeIncreasing": 0.05,
        "Invert": 0.05,
    },
    "3a": ("SolarizeIncreasing", "Desaturate", "GaussianBlur"),
    "3aw": {
        "SolarizeIncreasing": 6, "Desaturate": 6, "GaussianBlur": 6, "Rotate": 3, "ShearX": 2,
        "ShearY": 2, "PosterizeIncreasing": 1, "AutoContrast": 1, "ColorIncreasing": 1,
        "SharpnessIncreasing": 1, "ContrastIncreasing": 1, "BrightnessIncreasing": 1,
        "Equalize": 1, "Invert": 1,
    },
}  # fmt: skip

_FORM = (
    "rand-m9-mstd0.5-inc1: magnitude m, its deviation mstd (inf: uniform from 0 to m) and bound "
    "mmax, number of operations n, the probability p of each, inc0 or inc1, and t with one of "
    f"{', '.join(_SETS)}"
)
_MOST_LAYERS = 32  # each is some milliseconds for every image
_HIGHEST = 100  # of mmax: ten times what the operations are made for


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Per image `layers` operations are drawn, with replacement unless they are weighted.

    Each is then applied with `probability`, with a magnitude and a sign of its own.
    """

    magnitude: float  # m: from 0 to mmax
    spread: Spread  # mstd, mmax
    layers: int  # n
    probability: float  # p
    names: tuple[str, ...]  # inc, t
    weights: tuple[float, ...] | None  # of the names; they sum to 1

    @classmethod
    def parse(cls, text: str) -> "RandAugment":
        """Reads `rand-m9-mstd0.5-inc1`; InputError for anything else."""
        options, sets = read_options(
            text, "rand", _FORM, numbers=("m", "mstd", "mmax", "n", "p", "inc"), names={"t": _SETS}
        )
        spread = spread_of(options)
        magnitude = options.get("m", 10.0)
        layers = options.get("n", 2)
        probability = options.get("p", 0.5)
        increasing = options.get("inc", 0)
        names: tuple[str, ...] = _PLAIN if not increasing else _INCREASING
        weights: tuple[float, ...] | None = None
        if "t" in sets:  # then, as in timm, inc changes nothing
            chosen = _SETS[sets["t"]]
            names = tuple(chosen)
            if isinstance(chosen, dict):
                total = sum(chosen.values())
                weights = tuple(weight / total for weight in chosen.values())
        for is_fine, expected in (
            (magnitude <= spread.highest, f"m must be 0 to {spread.highest:g}; mmax raises that"),
            (spread.highest <= _HIGHEST, f"mmax must be up to {_HIGHEST}"),
            (
                1 <= layers <= _MOST_LAYERS and layers == int(layers),
                f"n must be a whole number from 1 to {_MOST_LAYERS}",
            ),
            (
                weights is None or layers <= len(names),
                f"n must be up to {len(names)}, as weighted operations are never drawn twice",
            ),
            (probability <= 1, "p must be 0 to 1"),
            (increasing in (0, 1), "inc must be 0 or 1"),
        ):
            if not is_fine:
                raise InputError(f"RandAugment {text!r}: {expected}")
        return cls(magnitude, spread, int(layers), probability, names, weights)

    def draw(self, rng: np.random.Generator, interpolation: str) -> list[Operation]:
        if self.weights:
            picks = rng.choice(len(self.names), self.layers, replace=False, p=self.weights)
        else:
            picks = rng.integers(0, len(self.names), self.layers)
        return [
            draw_operation(self.names[pick], self.magnitude, self.spread, rng, interpolation)
            for pick in picks
            if rng.random() < self.probability
        ]
