"""What a run leaves and says: kept by the first process, the others have a `SilentRecord`."""

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from clu.parameter_overview import get_parameter_overview

from hybrid_flax.errors import TrainingError, close, closed_after
from hybrid_flax.run import files
from hybrid_flax.run.checkpoint_files import Restored
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.run.compiling import Made
from hybrid_flax.run.goodput import Ledger
from hybrid_flax.run.metrics import MetricWriter, Numbers, draw_curves
from hybrid_flax.run.phases import STARTING, Phases
from hybrid_flax.run.profiling import Profile
from hybrid_flax.run.progress import Progress
from hybrid_flax.run.skipped_steps import NonFiniteStep, SkippedSteps
from hybrid_flax.run.workdir import Workdir, stall_file
from hybrid_flax.settings import Settings, to_plain
from hybrid_flax.versions import numerics
from hybrid_flax.weights.paths import flatten, unflatten

Results = dict[str, dict[str, float]]  # {"val": {"top1": …}}
_MEASURED = {"top1", "top5", "loss", "images"}


class Record:
    """Owns the work directory: metrics, curves, ledger, progress, profile and checkpoints.

        with Record(config, workdir, phases) as record:
            with record.training(step, total_steps): ...

    Args:
      config: with the number of classes; written to the work directory.
      workdir: a local folder, or one on object storage.
      phases: of this process.
      profile: "FIRST:LAST" steps to record; "": none.
      seconds_at_peak: what a step would take at the chips' peak; None where that is not known.

    Raises:
      InputError: no such steps to profile; on entering: the work directory cannot be used.
    """

    def __init__(
        self,
        config: Settings,
        workdir: str,
        phases: Phases,
        *,
        profile: str = "",
        seconds_at_peak: float | None = None,
    ):
        self._config = config
        self._phases = phases
        self._seconds_at_peak = seconds_at_peak
        self._waited: Sequence[float] = ()  # when something was last logged
        self._workdir = Workdir(workdir, config)
        self._profile = Profile(profile, os.path.join(self._workdir.path, "profile"))
        asked = config.checkpoint
        self._checkpoints = Checkpoints(
            self._workdir.checkpoints,
            keep=asked.keep,
            keep_every_steps=asked.keep_every_steps,
            keep_best=asked.keep_best,
        )
        self._step = 0  # the last one that was given to the devices, or is in a checkpoint
        self.stall_file = stall_file(workdir)

    def __enter__(self) -> "Record":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._workdir)
            stack.callback(self._profile.close)
            self._ledger = Ledger(self._workdir.ledger, self._phases)
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        close(self._held.close, after=error)

    def introduce(self, said: str, parameters: Any, memory: str) -> None:
        """Says what is going to be trained, and writes how its arrays lie.

        Args:
          parameters: tree of anything with `shape` and `dtype`.
          memory: how the state is split over devices, as a table.
        """
        print(said)
        overview = get_parameter_overview(parameters, include_stats=False)
        self._workdir.write_text("parameters.txt", f"{overview}\n\n{memory}\n")

    def write_classes(self, names: Sequence[str] | None) -> None:
        """Writes `classes.json`: the classes' names by number, null where the data has none."""
        self._workdir.write_json("classes.json", names if names is None else list(names))

    # ------------------------------------------------------------------------------- checkpoints

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint, intact or not; None if there is none."""
        steps = self._checkpoints.steps()
        return steps[-1] if steps else None

    def restore(self, expected: Any) -> Restored | None:
        """The newest intact checkpoint, see `Checkpoints.restore`."""
        self._checkpoints.wait()  # one may still be on its way when a run rolls back
        restored = self._checkpoints.restore(expected)
        self._step = restored.step if restored else 0
        return restored

    def clear_after(self, step: int) -> None:
        """Makes room for the checkpoints after `step`, which will be written again."""
        self._checkpoints.clear_after(step)

    def check_space(self, state: Any) -> None:
        """Raises InputError if the disk has no room for a checkpoint of this state."""
        self._checkpoints.check_space(state)

    def save(
        self, step: int, state: Any, skipped: SkippedSteps, fingerprint: dict[str, Any]
    ) -> None:
        """Saves the state in the background, and copies what was recorded up to here.

        Args:
          state: with whole arrays, which later steps may reuse.
          fingerprint: describes the images of both splits.
        """
        self._workdir.check_there()
        self._workdir.push()
        model = self._config.model
        meta = {
            "model": model.name,
            "num_classes": model.num_classes,
            "image_size": model.image_size,
            "data": fingerprint,
            "config": to_plain(self._config),
            "numerics": numerics(),
            "mishaps": list(skipped),  # as checkpoints have always called them
        }
        self._checkpoints.save(step, state, meta)
        self._ledger.write(step)

    def finish(self, step: int, finished: bool) -> None:
        """Waits until the last checkpoint is on disk, and ends the account of this start."""
        self._checkpoints.wait()
        self._ledger.write(step, finished=finished)

    # --------------------------------------------------------------------------------- the steps

    @contextlib.contextmanager
    def training(self, step: int, total_steps: int) -> Iterator[None]:
        """Surrounds the steps after `step`; what was recorded of them, they record again."""
        metrics = MetricWriter(self._workdir.path, self._workdir.metrics, start_step=step)
        self._metrics = metrics
        for record in self._evaluations():
            self._checkpoints.rate(record["step"], _score(record))
        if total_steps not in self.evaluated_steps():
            self._ledger.begin(step)
        self._progress = Progress(
            self._phases,
            batch_size=self._config.batch_size,
            step=step,
            total_steps=total_steps,
            seconds_at_peak=self._seconds_at_peak,
        )
        with closed_after(self._progress.close):
            yield

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Surrounds the call of a step, for the profile."""
        return self._profile.step(number)

    def stepped(self, number: int, metrics: Any) -> None:
        """Notes that a step was given to the devices."""
        self._step = number
        self._profile.after(number, metrics)
        self._progress.stepped()

    def started(self, step: int, made: Made) -> None:
        """Says and notes what came before the end of a start's first step, and how long it took.

        Args:
          made: the compiled step.
        """
        self._ledger.write(step, compiled=made._asdict())
        spent = self._phases.seconds()
        parts = ", ".join(f"{kind} {spent[kind]:.1f}" for kind in STARTING)
        total = sum(spent[kind] for kind in STARTING)
        self._progress.say(f"first step done after {total:.1f} s: {parts}")

    def log(
        self,
        steps: Sequence[tuple[int, Numbers]],
        waited: Sequence[float],
        skipped: SkippedSteps,
        unreadable: int,
    ) -> None:
        """Records steps that are done: the last one's metrics, and the mean of their losses.

        Args:
          steps: (step, metrics) of finite ones; none: nothing is recorded.
          waited: seconds that each process has waited for input so far.
          unreadable: images so far that others stand in for.
        """
        if not steps:
            return
        self._workdir.check_there()
        step, numbers = steps[-1]
        del numbers["non_finite"]
        numbers["loss"] = np.mean([metrics["loss"] for _, metrics in steps])
        before = self._waited or [0.0] * len(waited)
        waits = [now - then for now, then in zip(waited, before, strict=True)]
        self._waited = waited
        numbers |= self._progress.report(step, float(numbers["loss"]), waits)
        if unreadable:
            numbers["unreadable_images"] = unreadable
        if skipped != SkippedSteps():
            numbers |= skipped._asdict()
        self._metrics.write(step, **{f"train/{name}": float(x) for name, x in numbers.items()})
        self._ledger.write(step)

    # ------------------------------------------------------------------------------- evaluations

    def evaluated_steps(self) -> list[int]:
        """The steps whose evaluation is recorded."""
        return [record["step"] for record in self._evaluations()]

    def evaluation(self, step: int, results: Results, shown: str) -> None:
        """Records and draws an evaluation.

        Args:
          shown: the results for a person.
        """
        self._ledger.write(step)
        account = self._ledger.account()
        numbers = flatten(results) | {"run/goodput": account.goodput}
        self._metrics.write(step, **numbers)
        title = f"{self._config.model.name}, {self._workdir.name}"
        draw_curves(self._metrics.records, self._workdir.curves, title)
        self._progress.say(f"step {step}:\n{shown}\n  {account}")

    def is_among_best(self, step: int) -> bool:
        """Whether the step, which was evaluated, is one of the best, to be saved."""
        record = self._evaluation(step)
        return self._checkpoints.rate(step, _score(record))

    def results(self, step: int) -> Results:
        """The recorded evaluation of a step."""
        record = self._evaluation(step)
        found = unflatten({name: x for name, x in record.items() if name.startswith("val")})
        return {name: result for name, result in found.items() if _MEASURED <= result.keys()}

    def account(self) -> str:
        """Accounts for the time of the run."""
        return str(self._ledger.account())

    def _evaluation(self, step: int) -> dict[str, Any]:
        return [each for each in self._evaluations() if each["step"] == step][-1]

    def _evaluations(self) -> list[dict[str, Any]]:
        needed = {f"val/{name}" for name in _MEASURED}
        return [record for record in self._metrics.records if needed <= record.keys()]

    # ------------------------------------------------------------------------------------- the end

    def interrupted(self, error: OSError) -> str:
        """What to say of a run that ends because a file cannot be written or read."""
        advice = "Mend the disk or its permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "Make room on the disk"
        elif error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            advice = "If the work directory was moved or removed, put it back"
        elif error.errno == errno.EPIPE:
            advice = "Nobody reads what it says"
        return (
            f"training stopped at step {self._step}: {files.explain(error)}. Last checkpoint: "
            f"{self._last_checkpoint()}. {advice}; the same command continues from there"
        )

    def _last_checkpoint(self) -> str:
        """Its name, when those that are being written are there."""
        try:
            self._checkpoints.wait()
        except TrainingError:
            pass  # the one before it, then
        try:
            steps = self._checkpoints.steps()
        except (OSError, TrainingError):
            return "not known"
        return self._checkpoints.name(steps[-1]) if steps else "none is there"

    def non_finite(self, error: NonFiniteStep, images: dict[int, str]) -> str:
        """Writes `non_finite.json` for the step that ends the run; says what to do about it.

        Args:
          images: of the step's batch, {index: name}.
        """
        last = self._last_checkpoint()
        command = shlex.join(sys.orig_argv)
        self._workdir.write_json("non_finite.json", error.report(last, images, command))
        config = self._config
        return (
            f"{error} (--config.on_non_finite={config.on_non_finite}, "
            f"--config.non_finite_limit={config.non_finite_limit}). It changed no weights, and "
            f"nothing was saved after it. Last checkpoint: {last}. The images of its batch are in "
            f"{self._workdir.name}/non_finite.json; the same command comes to it again: {command}. "
            "To go on, leave such steps out with --config.on_non_finite=skip or roll_back, or "
            "start from the checkpoint with other settings: a new --workdir, --config.init_from= "
            "this one, and for example a lower --config.optimizer.learning_rate"
        )


def _score(record: dict[str, Any]) -> float:
    """Top-1 of an evaluation, of the averaged weights if there are any."""
    return record.get("val_ema/top1", record["val/top1"])
