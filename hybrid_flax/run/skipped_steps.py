"""Steps whose loss or gradients are not finite.

The step itself has then changed no weight, average or statistic, only its own number. The host
notices when it next looks at the metrics, and does what `config.on_non_finite` says: stop with a
report, count the step as skipped, or go back to the last checkpoint and leave the batch out.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class SkippedSteps(NamedTuple):
    """Counts of such steps so far; kept with every checkpoint."""

    skipped: int = 0
    rolled_back: int = 0
    batches_left_out: int = 0  # step number s has taken batch number s + this


class NonFiniteStep(Exception):
    """A step that cannot be passed over."""

    def __init__(self, step: int, metrics: dict[str, Any], parameter: str, skipped: SkippedSteps):
        self.step = step  # steps done with it; it began at step - 1
        self.batch = step - 1 + skipped.batches_left_out
        self.loss = float(metrics["loss"])
        self.grad_norm = float(metrics["grad_norm"])
        self.parameter = parameter  # the first whose gradient is not finite; "" if all are
        self.skipped = skipped
        super().__init__(
            f"at step {step} the loss is {self.loss} and the gradient norm {self.grad_norm}"
            + (f", first in the gradient of {parameter}" if parameter else "")
        )

    def report(self, checkpoint: str, images: dict[int, str], command: str) -> dict[str, Any]:
        """The content of `non_finite.json`: what it takes to look at the step, and to repeat it.

        Args:
          checkpoint: the last one; a path, or that there is none.
          images: of the step's batch, {index: name}.
          command: of this run.
        """
        return {
            "step": self.step,
            "batch": self.batch,
            "loss": str(self.loss),
            "grad_norm": str(self.grad_norm),
            "parameter": self.parameter,
            "mishaps": self.skipped._asdict(),
            "checkpoint": checkpoint,
            "command": command,
            "images": images,
        }

    def after_rolling_back(self, step: int, then: SkippedSteps) -> SkippedSteps:
        """The counts for going on behind the batch from an earlier step, where they were `then`."""
        return SkippedSteps(then.skipped, self.skipped.rolled_back + 1, self.batch + 1 - step)


def is_finite(metrics: dict[str, Any]) -> bool:
    """Whether a step, whose metrics were fetched from the devices, has changed anything."""
    return bool(np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))


def skip_or_raise(
    step: int,
    metrics: dict[str, Any],
    skipped: SkippedSteps,
    *,
    parameters: Sequence[str],
    limit: int,
) -> SkippedSteps:
    """Counts a step that was not finite as skipped.

    Args:
      metrics: of the step, fetched from the devices.
      skipped: before it.
      parameters: their paths, in the order in which `metrics["non_finite"]` counts them.
      limit: how many may be skipped.

    Raises:
      NonFiniteStep: the limit was reached before.
    """
    number = int(metrics["non_finite"])
    error = NonFiniteStep(step, metrics, parameters[number] if number >= 0 else "", skipped)
    if skipped.skipped >= limit:
        raise error
    logging.warning("%s; skipped, number %d", error, skipped.skipped + 1)
    return skipped._replace(skipped=skipped.skipped + 1)
