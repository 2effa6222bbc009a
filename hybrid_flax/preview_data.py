"""What a run would be trained on: a picture of augmented images, counts, sizes, and the speed.

python -m hybrid_flax.preview_data --config=configs/gcvit_b.py [--workdir=DIR]

Writes DIR/inspect.png (here, without --workdir): the first images of the first epoch as they leave
the loader, with their classes. Mixing and erasing come later, on the device, and are not in it.
"""

import contextlib
import cProfile
import itertools
import os
import pstats
import time
from collections.abc import Callable

import ml_collections
import numpy as np
from PIL import Image, ImageDraw

from hybrid_flax import cli
from hybrid_flax.build import open_split
from hybrid_flax.data.images import UnreadableImageError, open_photo, random_resized_crop, rgb
from hybrid_flax.data.loader import train_batches
from hybrid_flax.data.sources import EncodedSource
from hybrid_flax.data.sources.base import check_labels
from hybrid_flax.data.transforms import TrainTransform
from hybrid_flax.errors import InputError
from hybrid_flax.settings import Settings
from hybrid_flax.text_files import check_local

_COLUMNS, _ROWS, _TILE, _CAPTION = 8, 5, 160, 14  # of the picture; the last two in pixels
_SAMPLE = 500  # images whose sizes are looked at
_PROFILED = 200  # images of which the time is taken apart
_BATCH_SIZE = 64  # at most, to measure the loader


def inspect(config: ml_collections.ConfigDict, folder: str, *, seconds: float = 10) -> list[str]:
    """Writes the picture; returns what there is to say, a line each.

    Args:
      config: as for training.
      folder: where `inspect.png` goes.
      seconds: how long the loader runs to measure it.

    Raises:
      InputError: the config or the data cannot be used.
    """
    check_local(folder, "--workdir")
    settings, source = open_split(config, "train")
    transform = TrainTransform.from_config(settings, source)
    file = os.path.join(folder, "inspect.png")
    try:
        os.makedirs(folder, exist_ok=True)
        picture = _picture(transform, settings.seed)
        # Neither through a link, nor into a pipe.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(file, flags, 0o666), "wb") as stream:
            picture.save(stream, "PNG")
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from error
    sample = np.random.default_rng(0).permutation(len(source))
    return [
        f"{settings.dataset.name}: {len(source):,} training images, {source.num_classes} classes; "
        f"augmented images are in {file}",
        _class_counts(source, sample),
        *_sizes(source, sample[:_SAMPLE], settings.model.image_size),
        *_speed(transform, sample, settings, seconds),
    ]


def _picture(transform: TrainTransform, seed: int) -> Image.Image:
    count = min(_COLUMNS * _ROWS, len(transform.source))
    with contextlib.closing(train_batches(transform, batch_size=count, seed=seed)) as batches:
        batch = next(batches)
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    picture = Image.new("RGB", (columns * _TILE, rows * (_TILE + _CAPTION)), "white")
    draw = ImageDraw.Draw(picture)
    for place, (pixels, label) in enumerate(zip(batch["image"], batch["label"], strict=True)):
        row, column = divmod(place, columns)
        left, top = column * _TILE, row * (_TILE + _CAPTION)
        picture.paste(Image.fromarray(pixels).resize((_TILE - 2, _TILE - 2)), (left, top))
        names = transform.source.class_names
        caption = str(label)
        if names and names[label] != caption:
            caption += f" {names[label]}"
        caption = caption.encode("latin-1", "replace").decode("latin-1")  # the font has no more
        draw.text((left + 1, top + _TILE - 2), caption[:26], fill="black")
    return picture


def _class_counts(source: EncodedSource, sample: np.ndarray) -> str:
    """From the labels where they are known; else from those of a sample, and says so."""
    labels, whole = source.labels, ""
    if labels is None:
        sample = sample[: 20 * _SAMPLE]
        known = [label for index in sample for label in _labels(source, int(index))]
        labels = np.array(known, np.int64)
        whole = f" in a sample of {len(sample):,}" if len(sample) < len(source) else ""
    check_labels(labels, source.num_classes, "the training images")
    counts = np.bincount(labels, minlength=source.num_classes)
    empty = np.flatnonzero(counts == 0)
    names = source.class_names or list(map(str, range(source.num_classes)))
    line = (
        f"images per class{whole}: {counts.min()} to {counts.max()}, median "
        f"{np.median(counts):g}; fewest in {names[int(counts.argmin())]}, "
        f"most in {names[int(counts.argmax())]}"
    )
    if len(empty):
        shown = ", ".join(names[label] for label in empty[:5])
        line += f"; {len(empty)} classes have none: {shown}{', …' if empty[5:].size else ''}"
    return line


def _labels(source: EncodedSource, index: int) -> list[int]:
    """The label of an image; none if it cannot be read, which `_sizes` says."""
    try:
        return [source.read(index).label]
    except UnreadableImageError:
        return []


def _sizes(source: EncodedSource, sample: np.ndarray, image_size: int) -> list[str]:
    """Describes the sizes of a sample, from the heads of the files."""
    sizes, volume, lines = [], 0, []
    for index in sample:
        try:
            data, _, name = source.read(int(index))
            sizes.append(open_photo(data, name).size)
            volume += len(data)
        except UnreadableImageError as error:
            lines.append(str(error))
    if not sizes:
        raise InputError(f"none of {len(sample)} images can be read: {lines[0]}")
    widths, heights = np.transpose(sizes)
    small = np.mean(np.minimum(widths, heights) < image_size)
    return [
        f"sizes of {len(sizes)} images: width {widths.min()} to {widths.max()}, median "
        f"{np.median(widths):g}; height {heights.min()} to {heights.max()}, median "
        f"{np.median(heights):g}; {volume / len(sizes) / 1000:.1f} KB each; {small:.0%} have a "
        f"side below the model's {image_size} pixels",
        *lines[:3],
        *([f"… {len(lines)} of {len(sample)} cannot be read"] if lines[3:] else []),
    ]


def _speed(
    transform: TrainTransform, sample: np.ndarray, config: Settings, seconds: float
) -> list[str]:
    """The loader's images per second, and what one image costs in one process, stage by stage."""
    workers = config.dataset.num_workers
    batch_size = min(_BATCH_SIZE, config.batch_size, len(transform.source))
    batches = train_batches(transform, batch_size=batch_size, seed=config.seed, num_workers=workers)
    with contextlib.closing(batches):
        for _ in range(2 * workers + 3):  # the first have been waiting, or processes are starting
            next(batches)
        begin, images = time.perf_counter(), 0
        while time.perf_counter() < begin + seconds or not images:
            next(batches)
            images += batch_size
        speed = images / (time.perf_counter() - begin)

    stages = _stages(transform, sample[:_PROFILED])
    alone = sum(stages.values())
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    side_by_side = max(1, min(workers, cores))
    stages["batch and transfer"] = max(0.0, side_by_side / speed - alone)
    limit = max(stages, key=stages.__getitem__)
    return [
        f"the loader: {speed:,.0f} images/s with {workers} processes on {cores} cores",
        "one image in one process: "
        + ", ".join(f"{name} {1e3 * spent:.2f} ms" for name, spent in stages.items()),
        f"{limit} takes longest. {_ADVICE[limit]}",
    ]


_ADVICE = {
    "read": "Faster storage, fewer and larger files, or --config.dataset.cache=True for small sets",
    "decode": "Smaller images on disk, --config.dataset.decode=fast if they are much larger than "
    "the model's, or more cores and processes",
    "crop and resize": "More cores and processes; --config.dataset.decode=fast for large images",
    "augment": "More cores and processes",
    "batch and transfer": "The processes wait for each other or for a core: fewer processes, or "
    "more cores",
}


def _stages(transform: TrainTransform, sample: np.ndarray) -> dict[str, float]:
    """Seconds per image of each stage, in this process."""
    profile = cProfile.Profile()
    indices = itertools.islice(itertools.cycle(sample), _PROFILED)
    for index in indices:
        profile.runcall(transform, int(index), np.random.default_rng(int(index)))
    stats: dict = vars(pstats.Stats(profile))["stats"]

    def spent(function: Callable) -> float:
        code = function.__code__
        *_, cumulative, _ = stats.get(
            (code.co_filename, code.co_firstlineno, code.co_name), (0.0, None)
        )
        return cumulative / _PROFILED

    read = spent(type(transform.source).read)  # type: ignore[attr-defined]  # of encoded ones
    decode = spent(rgb)
    crop = spent(random_resized_crop) - decode
    rest = spent(type(transform).__call__) - read - decode - crop
    return {"read": read, "decode": decode, "crop and resize": crop, "augment": rest}


def main(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Prints what `inspect` says."""
    print("\n".join(inspect(config, workdir or ".")))
    return 0


if __name__ == "__main__":
    cli.run(main, needs_workdir=False)
