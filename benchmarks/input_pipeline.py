"""The loader alone, from JPEG files to batches, beside a PyTorch DataLoader on the same cores.

python -m benchmarks.input_pipeline [--cores=1] [--images=512] [--turns=5] [--save=FILE]

Both read the same files with all that GC ViT's recipe does on the host, random resized crop, flip
and RandAugment, and end with uint8 batches in the process that would train. There are as many
worker processes as cores, to which all are tied. Every subject is started anew in every turn,
one after the other, so that whatever else the machine does hits all alike; medians of the turns
count. What is counted is the processor time of all processes: images per second of a core that does
nothing else. By the clock it is less, by as much as the machine is busy otherwise.

The files are made from scikit-learn's two photographs, with the sizes and the coding of ImageNet's.
They stay in the page cache, so a disk is not part of the figures.
"""

import argparse
import contextlib
import importlib.util
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from configs import gcvit_t
from hybrid_flax.costs import records
from hybrid_flax.data.loader import train_batches
from hybrid_flax.data.sources import source_of
from hybrid_flax.data.transforms import TrainTransform
from hybrid_flax.errors import InputError
from hybrid_flax.run.ending import ending
from hybrid_flax.settings import from_config

# (share, width, height) of the files. Most of ImageNet's photographs come from Flickr, whose longer
# side was 500; the published mean is 469 × 387. Few are larger than 640, but hold many pixels.
SIZES = (
    (0.50, 500, 375),
    (0.12, 375, 500),
    (0.12, 500, 333),
    (0.06, 333, 500),
    (0.12, 320, 240),
    (0.05, 200, 200),
    (0.02, 1024, 768),
    (0.01, 1600, 1200),
)
# Nearly all of them are stored with quality 96 and whole chroma, and hold 110 KB on average.
QUALITY = 96
BATCH_SIZE = 64
SKIPPED = 4  # batches at the start of a turn, some of which are made before anybody asks


def make_photos(folder: pathlib.Path, count: int) -> None:
    """`count` JPEG files in ten classes, `folder`/train/CLASS/NUMBER.JPEG."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    shares = np.array([share for share, *_ in SIZES])
    sizes = rng.choice(len(SIZES), count, p=shares / shares.sum())
    for number, (_, width, height) in enumerate(SIZES[size] for size in sizes):
        photo = photos[number % 2]
        # The widest cut of that shape, somewhat smaller at random.
        scale = min(photo.width / width, photo.height / height) * rng.uniform(0.7, 1)
        wide, tall = int(width * scale), int(height * scale)
        left, top = rng.integers(photo.width - wide + 1), rng.integers(photo.height - tall + 1)
        photo = photo.crop((left, top, left + wide, top + tall))
        photo = photo.resize((width, height), Image.Resampling.BICUBIC)
        file = folder / "train" / f"class{number % 10}" / f"{number:05}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo.save(file, quality=QUALITY, subsampling=0)


def ours(folder: pathlib.Path, workers: int, **dataset) -> Iterator:
    """Batches of our loader with the recipe of GC ViT; `dataset` changes fields of that name."""
    config = gcvit_t.get_config()
    config.dataset.update(name="image_folder", path=str(folder), **dataset)
    settings = from_config(config)
    transform = TrainTransform.from_config(settings, source_of(settings.dataset, "train"))
    return train_batches(transform, batch_size=BATCH_SIZE, seed=0, num_workers=workers)


def pytorch(folder: pathlib.Path, workers: int) -> Iterator:
    """Batches of a DataLoader."""
    from benchmarks import input_pipeline_torch

    files = sorted(folder.rglob("*.JPEG"))
    labels = [int(file.parent.name.removeprefix("class")) for file in files]
    image_size = gcvit_t.get_config().model.image_size
    photos = input_pipeline_torch.Photos([str(file) for file in files], labels, image_size)
    return input_pipeline_torch.batches(photos, BATCH_SIZE, workers)


def images_per_second(start: Callable[[], Iterator], batches: int) -> tuple[float, float]:
    """Measures one turn, without the start: (of processor time, of the clock)."""
    with contextlib.closing(start()) as iterator:
        for _ in range(SKIPPED):
            next(iterator)
        begin, spent = time.perf_counter(), _processor_time()
        for _ in range(batches):
            next(iterator)
        images = batches * BATCH_SIZE
        return images / (_processor_time() - spent), images / (time.perf_counter() - begin)


def _processor_time() -> float:
    """Seconds, of this process and all that were started from it."""
    times, parents = {}, {}
    for file in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            fields = file.read_text().rpartition(")")[2].split()
            process = int(file.parent.name)
            parents[process] = int(fields[1])
            times[process] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    ours = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(times[process] for process in ours)


def compare(
    subjects: dict[str, Callable[[], Iterator]], turns: int, batches: int
) -> dict[str, list[tuple[float, float]]]:
    """Measures `images_per_second` of each in every turn; a line for people after each turn."""
    speeds = {name: [] for name in subjects}
    for _ in range(turns):
        for name, start in subjects.items():
            speeds[name].append(images_per_second(start, batches))
        cells = [f"{name} {each[-1][0]:.0f} ({each[-1][1]:.0f})" for name, each in speeds.items()]
        print("   ".join(cells), flush=True)
    return speeds


def main(arguments: list[str] | None = None) -> int:
    return ending(lambda: _main(arguments), limited=False) or 0


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=records.positive, default=1)
    parser.add_argument("--images", type=records.positive, default=512)
    parser.add_argument("--turns", type=records.positive, default=5)
    parser.add_argument("--batches", type=records.positive, default=24, help="in a turn")
    parser.add_argument("--save", type=pathlib.Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    records.check_file("--save", options.save)
    _tie_to(options.cores)
    if options.images < BATCH_SIZE:
        raise InputError(f"--images={options.images}: a batch alone has {BATCH_SIZE}")

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        make_photos(folder, options.images)
        size = statistics.mean(file.stat().st_size for file in folder.rglob("*.JPEG"))
        subjects = {
            "exact": lambda: ours(folder, options.cores),
            "fast": lambda: ours(folder, options.cores, decode="fast"),
        }
        if importlib.util.find_spec("torch"):
            subjects["pytorch"] = lambda: pytorch(folder, options.cores)
        print(
            f"{options.images} files of {size:,.0f} bytes on average; images per second of "
            f"processor time (of the clock, on {options.cores} cores)"
        )
        compared = compare(subjects, options.turns, options.batches)

    speeds = {name: [processor for processor, _ in each] for name, each in compared.items()}
    clock = {name: [clock for _, clock in each] for name, each in compared.items()}
    median = {name: statistics.median(each) for name, each in speeds.items()}
    ratio = {
        # Of each turn, in which both met the same machine.
        name: statistics.median(a / b for a, b in zip(each, speeds["pytorch"], strict=True))
        for name, each in speeds.items()
        if name != "pytorch" and "pytorch" in speeds
    }
    print("medians: " + "   ".join(f"{name} {speed:.0f}" for name, speed in median.items()))
    print("\n".join(f"{name} beside PyTorch: {times:.2f} times" for name, times in ratio.items()))
    if options.save:
        record = {
            **records.record("torch"),
            "cores_used": options.cores,
            "files": options.images,
            "mean_bytes": round(size),
            "images_per_second_of_processor_time": _rounded(speeds),
            "images_per_second_by_the_clock": _rounded(clock),
            "median": {name: round(speed, 1) for name, speed in median.items()},
            "median_ratio_to_pytorch": {name: round(times, 3) for name, times in ratio.items()},
        }
        records.save(options.save, record)
    return 0


def _rounded(speeds: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(speed, 1) for speed in each] for name, each in speeds.items()}


def _tie_to(cores: int):
    """This process, and all that it starts."""
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("processes cannot be tied to cores on this system; Linux can")
    available = sorted(os.sched_getaffinity(0))
    if cores > len(available):
        raise InputError(f"--cores={cores}: there are {len(available)}")
    os.sched_setaffinity(0, available[-cores:])


if __name__ == "__main__":
    sys.exit(main())
