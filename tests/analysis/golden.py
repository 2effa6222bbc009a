"""What the authors' code and the usual tools gave, and the models and images it was given.

`tests/golden/analysis` is a part of those measurements. Weights are those of `tests/golden`'s other
files, images scikit-learn's photographs; a ^ behind a name exchanges rows and columns, brackets
cut rows and columns out.
"""

import json
import re

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from hybrid_flax.data import model_input, normalise
from hybrid_flax.models.info import EvalTransform
from tests import parity

FOLDER = parity.GOLDEN / "analysis"
META = json.loads((FOLDER / "analysis.json").read_text())
ARRAYS = np.load(FOLDER / "analysis.npz")
TRANSFORM = EvalTransform(0.875, "center", "bicubic")
_FAMILIES = {"unified": "stm", "gcvit": "gcvit", "l2vit": "l2vit", "glnet": "glnet", "ga": "ga"}


def photo(name: str) -> Image.Image:
    base, _, part = name.partition("[")
    pixels = load_sample_image(base.rstrip("^"))
    if base.endswith("^"):
        pixels = pixels.swapaxes(0, 1)
    if part:
        top, bottom, left, right = map(int, re.findall(r"\d+", part))
        pixels = pixels[top:bottom, left:right]
    return Image.fromarray(np.ascontiguousarray(pixels))


def views(*names: str) -> np.ndarray:
    return model_input([photo(name) for name in names], 224, TRANSFORM)


def squashed(size: int, *names: str) -> np.ndarray:
    pixels = [photo(name).resize((size, size), Image.Resampling.BICUBIC) for name in names]
    return normalise(np.stack([np.asarray(x) for x in pixels]), TRANSFORM.mean, TRANSFORM.std)


def model(name: str, *, tame: bool = False):
    folder = parity.GOLDEN / _FAMILIES[name.partition("_")[0]]
    return parity.load((folder / "tame" if tame else folder) / f"{name}.json").model


def block(label: str) -> str:
    """`stages/0/blocks/1` of a label that ends in s1b1."""
    stage, number = re.search(r"s(\d)b(\d+)$", label).groups()
    return f"stages/{int(stage) - 1}/blocks/{number}"
