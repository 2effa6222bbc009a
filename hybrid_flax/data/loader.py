"""Grain pipelines from a source to batches of uint8 images.

Which images a training step sees, and how they are augmented, is a function of (seed, step) alone:
a resumed run starts at its step and needs no iterator state, and the number of data-loading
processes changes nothing.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import cloudpickle
import grain
import ml_collections
import numpy as np
from absl import flags
from PIL import Image

from hybrid_flax.data.augment import (
    Operation,
    apply_operations,
    draw_interpolation,
    fill_colour,
)
from hybrid_flax.data.images import UnreadableImageError, eval_crop, random_resized_crop, rgb
from hybrid_flax.data.label_maps import LabelMaps, move
from hybrid_flax.data.policies import Policy, parse_policy
from hybrid_flax.data.repeated import Repeated
from hybrid_flax.data.sources import Source
from hybrid_flax.errors import InputError

Batch = dict[str, np.ndarray]

_SUBSTITUTES = 50  # neighbours tried for an unreadable training image


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
    def from_config(cls, config: ml_collections.ConfigDict, source: Source) -> "TrainTransform":
        augment = config.augment
        return cls(
            source,
            config.model.image_size,
            augment.crop_scale,
            augment.crop_ratio,
            augment.interpolation,
            augment.flip,
            parse_policy(augment.auto_augment, augment.colour_jitter),
            fill_colour(config.dataset.mean),
            config.dataset.on_unreadable == "skip",
            augment.vertical_flip,
            fast_decode=config.dataset.decode == "fast",
            label_maps=_open_label_maps(config, source),
        )

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        if self.label_maps is None:
            found, photo, label = self._read(int(index), lambda photo: self._crop(photo, rng)[0])
            photo = apply_operations(photo, self._draw(rng), fill=self.fill)
            labels = {}
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


def _open_label_maps(config: ml_collections.ConfigDict, source: Source) -> LabelMaps | None:
    root = config.dataset.label_maps
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
    def from_config(cls, config: ml_collections.ConfigDict, source: Source) -> "EvalTransform":
        crop = config.eval
        return cls(
            source,
            config.model.image_size,
            crop.crop_fraction,
            crop.crop_mode,
            crop.interpolation,
            config.dataset.on_unreadable == "skip",
        )

    def __call__(self, index: int) -> Batch:
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

    def _nothing(self, index: int) -> Batch:
        image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        zero = {"label": np.int32(0), "index": np.int32(index), "mask": np.float32(0)}
        return {"image": image} | zero


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


def batches_per_epoch(source: Source, batch_size: int) -> int:
    """How many whole batches the source has; InputError if none."""
    if len(source) < batch_size:
        raise InputError(
            f"batch_size={batch_size}, but there are only {len(source)} training images; choose a "
            "batch size up to that number"
        )
    return len(source) // batch_size


def train_batches(
    transform: TrainTransform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    repeats: int = 1,
    group: int = 0,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Endless training batches from step `start_step` on.

    Every epoch is a new permutation of the source; images that do not fill a batch are left out of
    that epoch. With `repeats` an epoch has as many batches, of a part of the source: each image
    comes that often, augmented anew, in different groups of `group` rows (`Repeated`). With `rows`
    only these rows of each batch are read, and are the same as in the whole batch.

    Yields `image` uint8 [B, H, W, 3], `label`, `index` and `unreadable` int32 [B].
    """
    batches_per_epoch(transform.source, batch_size)
    order = _order(transform.source, batch_size, seed, repeats, group)
    rows = np.arange(batch_size) if rows is None else rows
    images = _Rows(order.random_map(transform), batch_size, rows)
    return iter(_read_ahead(images.batch(len(rows)).repeat()[start_step:], num_workers))


def images_of_batch(
    source: Source, number: int, *, batch_size: int, seed: int, repeats: int = 1, group: int = 0
) -> list[int]:
    """Which images batch `number` of `train_batches` has, row by row."""
    order = _order(source, batch_size, seed, repeats, group)
    epoch, batch = divmod(number, len(order) // batch_size)
    start = epoch * len(order) + batch * batch_size
    return [int(order[start + row]) for row in range(batch_size)]


def _order(
    source: Source, batch_size: int, seed: int, repeats: int, group: int
) -> grain.MapDataset:
    """Image numbers: an epoch after the other, each a new permutation."""
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    return Repeated(order, repeats, batch_size, group) if repeats > 1 else order


class _Rows(grain.MapDataset):
    """Of every whole batch of the parent's elements only these rows, one after the other."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        batch, row = divmod(place, len(self._rows))
        place = batch * self._batch_size + int(self._rows[row])
        return self._parent[epoch * len(self._parent) + place]


def eval_batches(
    transform: EvalTransform,
    *,
    batch_size: int,
    num_workers: int = 0,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Every image of the source once, in order, as batches that all have `batch_size` rows.

    The last one is filled up with zero images whose `mask` is 0. With `rows` only these rows of
    each batch are read. Yields `image` uint8 [B, H, W, 3], `label` and `index` int32 [B], `mask`
    float32 [B].
    """
    batches = -(-len(transform.source) // batch_size)
    images = grain.MapDataset.range(batches * batch_size).map(transform)
    rows = np.arange(batch_size) if rows is None else rows
    dataset = _Rows(images, batch_size, rows).batch(len(rows))
    with contextlib.closing(iter(_read_ahead(dataset, num_workers))) as batches:
        yield from batches


def _read_ahead(dataset: grain.MapDataset, num_workers: int) -> grain.IterDataset:
    """Prepares batches in two threads, or in `num_workers` processes of their own."""
    options = grain.ReadOptions(num_threads=1 if num_workers else 2, prefetch_buffer_size=2)
    batches = dataset.to_iter_dataset(options)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags; outside absl programs nobody did
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            worker_init_fn=functools.partial(_belong_to, os.getpid()),
        )
    return batches


def _belong_to(trainer: int, *_):
    # Ctrl-C and SIGTERM reach the whole process group; only the trainer may act on them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A trainer that is killed outright cannot stop its workers, so each watches its parent.
    threading.Thread(target=_exit_with, args=(trainer,), daemon=True).start()


def _exit_with(trainer: int):
    while os.getppid() == trainer:
        time.sleep(1)
    os._exit(1)
