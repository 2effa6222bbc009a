"""From photos to what a model takes: what is given in its place is named."""

import numpy as np
import pytest
from PIL import Image

import hybrid_flax
from hybrid_flax.data.model_input import model_input, normalise
from hybrid_flax.errors import InputError

TRANSFORM = hybrid_flax.model_info("gcvit_b").eval_transform
PHOTO = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("photos", "size", "transform", "message"),
    [
        (PHOTO, 8, TRANSFORM, "a list of them, not one Image"),
        ([], 8, TRANSFORM, "photos: expected at least one"),
        (["a.jpg"], 8, TRANSFORM, "the photo is a str"),
        ([np.zeros((8, 8, 3))], 8, TRANSFORM, "is a ndarray"),
        ([PHOTO], (8, 16), TRANSFORM, r"image_size=\(8, 16\): expected"),
        ([PHOTO], 0, TRANSFORM, "image_size=0: expected"),
        ([PHOTO], 8, "gcvit_b", r"model_info\(name\).eval_transform, not str"),
    ],
)
def test_an_argument_of_another_kind_is_refused_by_name(photos, size, transform, message):
    with pytest.raises(InputError, match=message):
        model_input(photos, size, transform)


def test_only_pixels_from_0_to_255_are_normalised():
    with pytest.raises(InputError, match="expected an array of uint8, from 0 to 255, not float32"):
        normalise(np.ones((4, 4, 3), np.float32), (0.5,) * 3, (0.5,) * 3)
