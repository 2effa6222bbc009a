"""Recording and drawing what a run measures."""

import io
import json
import logging
from typing import Any

import jax

from hybrid_flax.run import files
from hybrid_flax.run.tensorboard import TensorBoard

Line = dict[str, Any]  # "step" and numbers
Numbers = dict[str, Any]  # metrics of a step, fetched from the devices


def read_metrics(file: str) -> list[Line]:
    """The records of a `metrics.jsonl`; what is damaged in it is left out, with a warning."""
    return files.read_json_lines(file, _is_record)[0]


def _is_record(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and all(isinstance(x, int | float) for x in found.values())
        and type(found.get("step")) is int
    )


class MetricWriter:
    """Appends records to JSON lines and TensorBoard, both at once.

    What the file has of steps after `start_step`, from a run that was killed later than it saved,
    is dropped: those steps come again. A file that is damaged is kept beside it, as `….damaged`.

    Raises:
      OSError, here and when a record cannot be written.
    """

    def __init__(self, workdir: str, file: str, start_step: int):
        self._file = file
        found, damaged = files.read_json_lines(file, _is_record)
        self.records = [record for record in found if record["step"] <= start_step]
        if damaged is not None:
            files.replace(f"{file}.damaged", damaged)
        if damaged is not None or len(self.records) < len(found):
            files.replace(file, b"".join(map(_as_line, self.records)))
        self._tensorboard = TensorBoard(workdir, start_step)

    def write(self, step: int, **numbers: float) -> Line:
        """Records numbers of a step; names are grouped by a slash: `train/loss`."""
        record = {"step": step} | numbers
        files.append(self._file, _as_line(record), on_new_line=True)
        self._tensorboard.write(step, numbers)
        self.records.append(record)
        return record


def _as_line(record: Line) -> bytes:
    return json.dumps(record).encode() + b"\n"


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
    """Draws loss and accuracy over the steps into a PNG; raises OSError if it cannot be written.

    A picture that cannot be drawn is a warning.
    """
    try:
        picture = _picture(records, title)
    except Exception as error:  # no home to keep fonts in, or a record that is not what it seems
        logging.warning("cannot draw %s: %s: %s", file, type(error).__name__, error)
    else:
        files.replace(file, picture)


def _picture(records: list[Line], title: str) -> bytes:
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
    figure.suptitle(title, parse_math=False)  # it names a folder
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    pyplot.close(figure)
    return drawn.getvalue()
