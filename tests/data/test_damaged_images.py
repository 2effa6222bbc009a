"""Images of every kind with changed bytes or cut off: used, or unreadable by name; nothing else."""

import io

import numpy as np
import pytest
from PIL import Image

from hybrid_flax.data.images import FORMATS, UnreadableImageError, eval_crop, open_photo
from hybrid_flax.data.images import random_resized_crop as crop_at_random


def files() -> list[bytes]:
    """One or more of every format that is opened."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)
    photo, grey = Image.fromarray(noise), Image.fromarray(noise[..., 0].astype(np.uint16) * 256)
    several = {"save_all": True, "append_images": [photo.rotate(90)]}
    kinds = [
        *((photo, kind, {}) for kind in FORMATS),
        *((photo.quantize(8), "PNG", {}), (photo.convert("LA"), "PNG", {}), (grey, "PNG", {})),
        *((photo.convert("CMYK"), kind, {}) for kind in ("JPEG", "TIFF")),
        *((photo.convert(mode), "TIFF", {}) for mode in ("LAB", "YCbCr", "F", "I")),
        *((photo, "TIFF", {"compression": f"tiff_{name}"}) for name in ("lzw", "jpeg", "deflate")),
        *((grey, "TIFF", {}), (photo, "JPEG", {"progressive": True}), (photo, "MPO", several)),
        *((photo, kind, several) for kind in ("GIF", "PNG", "WEBP")),
    ]
    stored = []
    for image, kind, options in kinds:
        file = io.BytesIO()
        image.save(file, kind, **options)
        stored.append(file.getvalue())
    return stored


def trial(data: bytes, rng: np.random.Generator) -> bool:
    """Whether an image is used, in evaluation and in training; False: it is unreadable."""
    try:
        crop = eval_crop(open_photo(data, "a.jpg"), 16)
        part, _ = crop_at_random(
            open_photo(data, "a.jpg"), 16, (0.08, 1), (0.75, 1.33), "bicubic", rng, fast=True
        )
    except UnreadableImageError as error:
        assert "a.jpg" in str(error)  # noqa: PT017
        return False
    assert (crop.shape, part.size) == ((16, 16, 3), (16, 16))
    return True


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it finds
@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_images_are_used_or_unreadable(count):
    rng, whole, used = np.random.default_rng(count), files(), 0
    for _ in range(count):
        data = bytearray(whole[rng.integers(len(whole))])
        for _ in range(rng.integers(1, 4)):
            place = rng.integers(min(len(data), 80) if rng.random() < 0.7 else len(data))
            data[place] = rng.integers(256)
        if rng.random() < 0.2:
            data = data[: rng.integers(len(data))]
        used += trial(bytes(data), rng)
    print(f"images: {count} tried, {used} used, {count - used} refused")
    assert 0.1 * count < used < 0.9 * count
