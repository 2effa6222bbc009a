"""Handwritten digits, to try without any data."""

import io

import numpy as np
from PIL import Image

from hybrid_flax.data.sources.base import Encoded, LabelledSource


class Digits(LabelledSource):
    """1,797 handwritten digits of 8×8 grey pixels (UCI, bundled with scikit-learn).

    A fixed random fifth, 360 images, is the "val" split.
    """

    num_classes = 10

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        data = load_digits()
        order = np.random.RandomState(0).permutation(len(data.target))
        chosen = order[:360] if split == "val" else order[360:]
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
