"""AutoAugment (Cubuk et al., arXiv:1805.09501): the tables it found on ImageNet, and drawing them.

Each row is two operations: (name, probability, magnitude from 0 to 10), by the names in
`magnitudes.py`. The table `_V0` is the one published with EfficientNet for TPUs.
"""

import dataclasses

import numpy as np

from hybrid_flax.data.augmentation.magnitudes import Spread, draw_operation
from hybrid_flax.data.augmentation.operations import Operation
from hybrid_flax.data.augmentation.policy_text import read_options, spread_of

_ORIGINAL = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 4), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 7)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 2)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 8), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 2)),
    (("Equalize", 0.0, 7), ("Equalize", 0.8, 8)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 8)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 9)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 3)),
    # The paper's table repeats five of its rows.
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
)
_V0 = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)


def _with_posterize(table, name):
    """The table with another reading of what its magnitudes mean for Posterize."""
    return tuple(
        tuple((name if op == "Posterize" else op, *rest) for op, *rest in row) for row in table
    )


SUB_POLICIES = {
    "original": _with_posterize(_ORIGINAL, "PosterizeOriginal"),
    "originalr": _with_posterize(_ORIGINAL, "PosterizeIncreasing"),
    "v0": _V0,
    "v0r": _with_posterize(_V0, "PosterizeIncreasing"),
    # 3-Augment of DeiT III (arXiv:2204.07118): solarise at 128, grey, or blur by 0.1 to 2 pixels.
    "3a": (
        (("Solarize", 1.0, 5),),
        (("Desaturate", 1.0, 10),),
        (("GaussianBlurRand", 1.0, 10),),
    ),
}


@dataclasses.dataclass(frozen=True)
class AutoAugment:
    """One row of a table per image, each of its operations with its own probability."""

    rows: tuple[tuple[tuple[str, float, float], ...], ...]  # (name, probability, magnitude)
    spread: Spread

    @classmethod
    def parse(cls, text: str) -> "AutoAugment":
        """Reads `original`, `v0-mstd0.5` and the like; InputError for anything else."""
        name = text.partition("-")[0]
        form = f"{name} or {name}-mstd0.5, with the deviation of the magnitudes"
        numbers, _ = read_options(text, name, form, numbers=("mstd",))
        return cls(SUB_POLICIES[name], spread_of(numbers))

    def draw(self, rng: np.random.Generator, interpolation: str) -> list[Operation]:
        return [
            draw_operation(name, magnitude, self.spread, rng, interpolation)
            for name, probability, magnitude in self.rows[rng.integers(len(self.rows))]
            if rng.random() < probability
        ]
