"""A work directory with the weights of a tiny model of the digits, made without training."""

import pathlib

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.settings import to_plain
from hybrid_flax.weights import bridge
from tests import reference, tiny


def write(workdir: pathlib.Path, steps=(5,)) -> str:
    """Writes checkpoints of a run, each with other weights; returns the folder."""
    run = tiny.settings(model__num_classes=10, dataset__val_split="val[:12]", eval__batch_size=4)
    names = [str(number) for number in range(10)]
    meta = {"model": run.model.name, "config": to_plain(run), "data": {"class_names": names}}
    checkpoints = Checkpoints(workdir / "checkpoints", keep=len(steps))
    for step in steps:
        model = reference.model(
            run.model.name, seed=step, num_classes=10, image_size=32, **run.model.overrides
        )
        checkpoints.save(step, bridge.get_weights(model), meta)
    checkpoints.wait()
    return str(workdir)


def photos(folder: pathlib.Path, count: int = 2) -> str:
    """Writes some digits as PNGs; returns the folder."""
    folder.mkdir()
    for number, pixels in enumerate(load_digits().images[:count]):
        Image.fromarray((pixels * 15).astype(np.uint8)).save(folder / f"digit{number}.png")
    return str(folder)
