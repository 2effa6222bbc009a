"""Handwritten digits, to try without any data."""

import io

import numpy as np
from PIL import Image

from hybrid_flax.data.sources.base import Encoded, LabelledSource
from hybrid_flax.data.sources.splits import other_names
from hybrid_flax.errors import InputError


class Digits(LabelledSource):
    """1,797 handwritten digits of 8×8 grey pixels (UCI, bundled with scikit-learn).

    A fixed random fifth, 360 images, is the "val" split.

    Raises:
      InputError: another split than "train" or "val", or what these may be called besides.
    """

    num_classes = 10

    def __init__(self, split: str):
        if not any(split in names for one in ("train", "val") for names in other_names(one)):
            raise InputError(f"dataset digits has no split {split!r}; it has train and val")
        from sklearn.datasets import load_digits

        data = load_digits()
        order = np.random.RandomState(0).permutation(len(data.target))
        chosen = order[360:] if split in other_names("train")[0] else order[:360]
        self.class_names = [str(digit) for digit in range(10)]
        self.labels = data.target[chosen]
        pixels = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
        self._files = [_png(image) for image in pixels]

    def read(self, index: int) -> Encoded:
        return Encoded(self._files[index], int(self.labels[index]), f"digit {index}")


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
