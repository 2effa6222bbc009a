"""From an image of a source to one example: what training and evaluation do to it."""

import dataclasses
import functools
import logging
import math
import pathlib
import tempfile
import weakref
from collections.abc import Callable

import cloudpickle
import numpy as np
from PIL import Image

from hybrid_flax.data.augmentation.operations import (
    Operation,
    apply_operations,
    draw_interpolation,
    fill_colour,
)
from hybrid_flax.data.augmentation.policies import Policy, parse_policy
from hybrid_flax.data.images import (
    UnreadableImageError,
    check_eval_crop,
    eval_crop,
    random_resized_crop,
    rgb,
)
from hybrid_flax.data.label_maps import LabelMaps, move
from hybrid_flax.data.sources import Source
from hybrid_flax.errors import InputError
from hybrid_flax.settings import Dataset, Settings

Example = dict[str, np.ndarray | np.generic]
Batch = dict[str, np.ndarray]

_LABELS = 32  # bytes, of an example's labels and indices, rounded up
_SUBSTITUTES = 50  # neighbours tried for an unreadable training image


@dataclasses.dataclass(frozen=True)
class _SentAsFile:
    """A dataclass whose pickle is the name of a file that holds it, as worker processes get it.

    What a process needs to start goes through a pipe. If it dies before it has read it, the other
    end waits for ever to write more than a pipe holds, 64 KiB (multiprocessing's method spawn).
    """

    @functools.cached_property
    def _file(self) -> str:
        number, file = tempfile.mkstemp(prefix="hybrid_flax-")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        with open(number, "wb") as stream:
            cloudpickle.dump((type(self), fields), stream)
        weakref.finalize(self, pathlib.Path(file).unlink, missing_ok=True)
        return file

    def __reduce__(self):
        return _received, (self._file,)


def _received(file: str):
    with open(file, "rb") as stream:
        kind, fields = cloudpickle.load(stream)
    return kind(**fields)


@dataclasses.dataclass(frozen=True)
class TrainTransform(_SentAsFile):
    """Random resized crop, flips, the policy, in timm's order; index → one training example.

    With label maps the crop comes last and the example has `label_map` float16 [2, K, H, W], moved
    as the image was, and `crop` float32 [4]: left, top, width and height, as fractions of it.
    """

    source: Source
    image_size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    interpolation: str  # or "random": bilinear or bicubic, drawn anew each time
    flip: float  # probability
    policy: Policy | None
    fill: tuple[int, int, int]
    skip_unreadable: bool
    vertical_flip: float = 0.0  # probability
    fast_decode: bool = False
    label_maps: LabelMaps | None = None

    @classmethod
    def from_config(cls, config: Settings, source: Source) -> "TrainTransform":
        """Makes the transform that the settings ask for.

        Raises InputError for a policy that is not understood, or label maps that cannot be read.
        """
        augment, dataset = config.augment, config.dataset
        return cls(
            source=source,
            image_size=config.model.image_size,
            crop_scale=augment.crop_scale,
            crop_ratio=augment.crop_ratio,
            interpolation=augment.interpolation,
            flip=augment.flip,
            vertical_flip=augment.vertical_flip,
            policy=parse_policy(augment.auto_augment, augment.colour_jitter),
            fill=fill_colour(dataset.mean),
            skip_unreadable=dataset.on_unreadable == "skip",
            fast_decode=dataset.decode == "fast",
            label_maps=_open_label_maps(dataset, source),
        )

    @property
    def example_bytes(self) -> int:
        """Memory of an example."""
        maps = self.label_maps
        return 3 * self.image_size**2 + (2 * math.prod(maps.shape) if maps else 0) + _LABELS

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        if self.label_maps is None:
            found, photo, label = self._read(int(index), lambda photo: self._crop(photo, rng)[0])
            photo = apply_operations(photo, self._draw(rng), fill=self.fill)
            labels: dict[str, np.ndarray] = {}
        else:
            found, photo, label = self._read(int(index))
            label_map, operations = self.label_maps.read(self.source.name(found)), self._draw(rng)
            for operation in operations:
                label_map = move(label_map, operation, photo.size)
            photo = apply_operations(photo, operations, fill=self.fill)
            photo, crop = self._crop(photo, rng)
            labels = {"label_map": label_map, "crop": crop}
        return {
            "image": np.asarray(photo),
            "label": np.int32(label),
            "index": np.int32(index),
            "unreadable": np.int32((found - index) % len(self.source)),
            **labels,
        }

    def _draw(self, rng: np.random.Generator) -> list[Operation]:
        """Flips, then what the policy does."""
        flips = (("FlipLeftRight", self.flip), ("FlipTopBottom", self.vertical_flip))
        drawn = [Operation(name) for name, probability in flips if rng.random() < probability]
        return drawn + (self.policy.draw(rng, self.interpolation) if self.policy else [])

    def _crop(self, photo: Image.Image, rng: np.random.Generator):
        """(a random part of the photo, which part of it that is)"""
        width, height = photo.size
        cropped, (left, top, right, bottom) = random_resized_crop(
            photo,
            self.image_size,
            self.crop_scale,
            self.crop_ratio,
            draw_interpolation(self.interpolation, rng),
            rng,
            fast=self.fast_decode,
        )
        part = left / width, top / height, (right - left) / width, (bottom - top) / height
        return cropped, np.array(part, np.float32)

    def _read(self, index: int, decode: Callable[[Image.Image], Image.Image] = rgb):
        """(index, decoded photo, label) of the first image from `index` on that can be read.

        Args:
          decode: makes an RGB image of a photo that is only opened; `rgb`, or something that needs
            no more than a part of it.
        """
        for attempt in range(_SUBSTITUTES):
            place = (index + attempt) % len(self.source)
            try:
                photo, label = self.source[place]
                _check_label(label, self.source, place)
                return place, decode(photo), label
            except UnreadableImageError as error:
                if not self.skip_unreadable:
                    raise
                _warn_once(f"{error}; the next image takes its place")
        raise InputError(
            f"{_SUBSTITUTES} unreadable training images in a row, from index {index} on: is "
            "this the right folder?"
        )


def _open_label_maps(dataset: Dataset, source: Source) -> LabelMaps | None:
    root = dataset.label_maps
    return LabelMaps.open(root, source.num_classes, source.name(0)) if root else None


@dataclasses.dataclass(frozen=True)
class EvalTransform(_SentAsFile):
    """The evaluation crop; index → one example.

    `mask` is 0 for an unreadable image, and for an index behind the last one, whose pixels are 0.
    """

    source: Source
    image_size: int
    crop_fraction: float
    crop_mode: str
    interpolation: str
    skip_unreadable: bool

    @classmethod
    def from_config(cls, config: Settings, source: Source) -> "EvalTransform":
        """Makes the transform that the settings ask for; InputError for a crop that is none."""
        check_eval_crop(config.eval.crop_fraction, config.eval.crop_mode)
        return cls(
            source=source,
            image_size=config.model.image_size,
            crop_fraction=config.eval.crop_fraction,
            crop_mode=config.eval.crop_mode,
            interpolation=config.eval.interpolation,
            skip_unreadable=config.dataset.on_unreadable == "skip",
        )

    @property
    def example_bytes(self) -> int:
        """Memory of an example."""
        return 3 * self.image_size**2 + _LABELS

    def __call__(self, index: int) -> Example:
        if index >= len(self.source):
            return self._nothing(0)
        try:
            photo, label = self.source[int(index)]
            _check_label(label, self.source, index)
            image = eval_crop(
                photo, self.image_size, self.crop_fraction, self.crop_mode, self.interpolation
            )
        except UnreadableImageError as error:
            if not self.skip_unreadable:
                raise
            _warn_once(f"{error}; left out of the evaluation")
            return self._nothing(index)
        return {
            "image": image,
            "label": np.int32(label),
            "index": np.int32(index),
            "mask": np.float32(1),
        }

    def _nothing(self, index: int) -> Example:
        return {
            "image": np.zeros((self.image_size, self.image_size, 3), np.uint8),
            "label": np.int32(0),
            "index": np.int32(index),
            "mask": np.float32(0),
        }


def _check_label(label: int, source: Source, index: int):
    # A label that is too large would train silently: its one-hot row is all zeros.
    if not 0 <= label < source.num_classes:
        raise InputError(
            f"image number {index} has the label {label}, but there are {source.num_classes} "
            "classes, counted from 0; splits without labels cannot be used"
        )


@functools.cache
def _warn_once(message: str):
    logging.warning(message)
