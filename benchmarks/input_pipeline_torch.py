"""The same training images from a PyTorch DataLoader, put together as timm does it.

Crop, filters and operations are Pillow's on both sides, and operations are drawn alike.
"""

import dataclasses
import io
import math
import random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from hybrid_flax.data import augment_op

FILL = (124, 116, 104)


@dataclasses.dataclass(frozen=True)
class Photos(torch.utils.data.Dataset):
    """Files with labels → (uint8 array [3, S, S], label), with GC ViT's augmentation."""

    files: list[str]
    labels: list[int]
    image_size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        with open(self.files[index], "rb") as stream:
            photo = Image.open(io.BytesIO(stream.read())).convert("RGB")
        left, top, width, height = _box(*photo.size)
        resample = random.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
        photo = photo.crop((left, top, left + width, top + height))
        photo = photo.resize((self.image_size, self.image_size), resample)
        if random.random() < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for name in random.choices(OPERATIONS, k=2):
            if random.random() < 0.5:
                photo = _augment(photo, name)
        return np.array(photo, dtype=np.uint8).transpose(2, 0, 1), self.labels[index]


def _box(width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if wide <= width and tall <= height:
            return random.randint(0, width - wide), random.randint(0, height - tall), wide, tall
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


# rand-m9-mstd0.5-inc1: what an operation gets at a level from 0 to 1, with a random sign.
_ARGUMENTS = {
    **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), lambda level, sign: ()),
    "Rotate": lambda level, sign: (sign * 30 * level,),
    "Posterize": lambda level, sign: (4 - int(4 * level),),
    "Solarize": lambda level, sign: (256 - int(256 * level),),
    "SolarizeAdd": lambda level, sign: (int(110 * level),),
    **dict.fromkeys(
        ("Color", "Contrast", "Brightness", "Sharpness"),
        lambda level, sign: (max(0.1, 1 + sign * 0.9 * level),),
    ),
    **dict.fromkeys(("ShearX", "ShearY"), lambda level, sign: (sign * 0.3 * level,)),
    **dict.fromkeys(("TranslateX", "TranslateY"), lambda level, sign: (sign * 0.45 * level,)),
}
OPERATIONS = tuple(_ARGUMENTS)


def _augment(photo: Image.Image, name: str) -> Image.Image:
    level = min(max(random.gauss(9, 0.5), 0), 10) / 10
    arguments = _ARGUMENTS[name](level, random.choice((-1, 1)))
    interpolation = random.choice(("bilinear", "bicubic"))
    return augment_op(photo, name, *arguments, fill=FILL, interpolation=interpolation)


def _collate(examples: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.zeros((len(examples), *examples[0][0].shape), dtype=torch.uint8)
    for row, (image, _) in zip(images, examples, strict=True):
        row += torch.from_numpy(image)
    return images, torch.tensor([label for _, label in examples], dtype=torch.int64)


def batches(photos: Photos, batch_size: int, workers: int) -> Iterator[torch.Tensor]:
    """Endless; uint8 [B, 3, S, S]."""
    loader = torch.utils.data.DataLoader(
        photos,
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        collate_fn=_collate,
        drop_last=True,
        persistent_workers=True,
    )
    while True:
        for images, _ in loader:
            yield images
