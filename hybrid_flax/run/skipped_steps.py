"""What happens when a step's loss or gradients are not finite.

The step itself has then changed no weight, average or statistic, only its own number. The host
notices when it next looks at the metrics, and does what `config.on_non_finite` says: stop with a
report, count the step as skipped, or go back to the last checkpoint and leave the batch out.
"""

from typing import Any, NamedTuple

import numpy as np


class SkippedSteps(NamedTuple):
    """What became of such steps so far; kept with every checkpoint."""

    skipped: int = 0
    rolled_back: int = 0
    batches_left_out: int = 0  # step number s has taken batch number s + this


class NonFiniteStep(Exception):
    """A step that cannot be passed over."""

    def __init__(self, step: int, metrics: dict[str, Any], parameter: str, mishaps: SkippedSteps):
        self.step = step  # steps done with it; it began at step - 1
        self.batch = step - 1 + mishaps.batches_left_out
        self.loss = float(metrics["loss"])
        self.grad_norm = float(metrics["grad_norm"])
        self.parameter = parameter  # the first whose gradient is not finite; "" if all are
        self.mishaps = mishaps
        super().__init__(
            f"at step {step} the loss is {self.loss} and the gradient norm {self.grad_norm}"
            + (f", first in the gradient of {parameter}" if parameter else "")
        )

    def report(self, checkpoint: str, images: dict[int, str], command: str) -> dict[str, Any]:
        """For `non_finite.json`: what is needed to look at the step, and to come to it again.

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
            "mishaps": self.mishaps._asdict(),
            "checkpoint": checkpoint,
            "command": command,
            "images": images,
        }

    def after_rolling_back(self, step: int, then: SkippedSteps) -> SkippedSteps:
        """For going on from an earlier step, where the counts were these, behind the batch."""
        return SkippedSteps(then.skipped, self.mishaps.rolled_back + 1, self.batch + 1 - step)


def is_finite(metrics: dict[str, Any]) -> bool:
    """Of one step, fetched from the devices."""
    return bool(np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
