"""Recording and drawing what a run measures."""

import contextlib
import json
import os
from typing import Any

import jax

Line = dict[str, Any]  # "step" and numbers
Numbers = dict[str, Any]  # metrics of a step, fetched from the devices


def read_metrics(file: str) -> list[Line]:
    """The records of a `metrics.jsonl` or another file of JSON lines.

    A line that a kill cut short is left out.
    """
    if not os.path.exists(file):
        return []
    records = []
    with open(file) as stream:
        for line in stream:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


class MetricWriter:
    """Appends records to JSON lines and TensorBoard.

    What the file has of steps after `start_step`, from a run that was killed later than it saved,
    is dropped: those steps come again.
    """

    def __init__(self, workdir: str, file: str, start_step: int):
        from tensorboardX import SummaryWriter

        self.records = [record for record in read_metrics(file) if record["step"] <= start_step]
        with open(f"{file}.tmp", "w") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in self.records)
        os.replace(f"{file}.tmp", file)
        self._lines = open(file, "a")
        self._tensorboard = SummaryWriter(workdir, purge_step=start_step + 1)

    def write(self, step: int, **numbers: float) -> Line:
        """Records numbers of a step; names are grouped by a slash: `train/loss`."""
        record = {"step": step} | numbers
        self.records.append(record)
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        for name, number in numbers.items():
            self._tensorboard.add_scalar(name, number, step)
        return record

    def close(self) -> None:
        self._lines.close()
        self._tensorboard.close()


class PendingMetrics:
    """Metrics of steps that the devices may still be computing; the host never waits for them."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, dict[str, jax.Array]]] = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Adds those of the step that was just given to the devices."""
        self._steps.append((step, metrics))

    def in_flight(self) -> bool:
        """Whether the devices are still at work on the newest step."""
        if not self._steps:
            return False
        return not self._steps[-1][1]["loss"].is_ready()  # type: ignore[attr-defined]  # no stub

    def fetch(self, but_newest: bool = False) -> list[tuple[int, Numbers]]:
        """Takes (step, numbers) of all steps out, or of all but the newest, and waits for them."""
        count = len(self._steps) - but_newest
        fetched, self._steps = self._steps[:count], self._steps[count:]
        return [(step, jax.device_get(metrics)) for step, metrics in fetched]


def draw_curves(records: list[Line], file: str, title: str) -> None:
    """Draws loss and accuracy over the steps into a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, name, label, style in (
        (left, "train/loss", "training (augmented, smoothed)", "C0-"),
        (left, "val/loss", "validation", "C1.-"),
        (left, "val_ema/loss", "validation, averaged weights", "C2.-"),
        (right, "val/top1", "validation", "C1.-"),
        (right, "val_ema/top1", "validation, averaged weights", "C2.-"),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
            axes.legend()
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    left.set_ylabel("loss")
    right.set_ylabel("top-1 accuracy (%)")
    figure.suptitle(title)
    figure.savefig(f"{file}.tmp", format="png", dpi=110)
    pyplot.close(figure)
    os.replace(f"{file}.tmp", file)
