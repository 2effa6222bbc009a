"""The weights of a run, or of what `python -m convert` wrote, without the rest of its state."""

import os
from typing import Any, NamedTuple

from hybrid_flax.errors import InputError
from hybrid_flax.run.checkpoint_files import Arrays
from hybrid_flax.run.checkpoints import Checkpoints


class SavedWeights(NamedTuple):
    """The weights in a work directory, or in what `python -m convert` wrote.

    Paths begin with the collection: `params/head/bias`, `batch_stats/norm/mean`.
    """

    step: int
    trained: Arrays
    averaged: Arrays  # empty if the run kept no average
    meta: dict[str, Any]  # "model", "num_classes", "image_size"; of runs also "config", "data", …

    @property
    def best(self) -> Arrays:
        """The averaged ones, if there are any."""
        return self.averaged or self.trained


def load_weights(folder: str, step: int | None = None) -> SavedWeights:
    """The newest intact weights of a work directory or a converted checkpoint, or those of a step.

    Raises:
      InputError: there is no checkpoint, or none is intact.
    """
    checkpoints = Checkpoints(os.path.join(folder, "checkpoints"))
    restored = checkpoints.restore() if step is None else checkpoints.restore_step(step)
    if restored is None:
        raise InputError(
            f"there is no checkpoint in {os.path.join(folder, 'checkpoints')}; give the work "
            "directory of a training run, or a folder that `python -m convert` wrote"
        )
    step, arrays, meta = restored
    averaged = {
        path.removeprefix("ema/"): array
        for path, array in arrays.items()
        if path.startswith("ema/")
    }
    trained = {
        path: array
        for path, array in arrays.items()
        if path.startswith(("params/", "batch_stats/"))
    }
    return SavedWeights(step, trained, averaged, meta)
