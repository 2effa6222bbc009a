"""The progress bar, or lines, of a run that trains, and how fast it is."""

import datetime
from collections.abc import Callable, Sequence

from tqdm import tqdm

from hybrid_flax.costs import chips
from hybrid_flax.run.phases import Phases


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; says how fast the run trains.

    Speeds are those of the phases "train" and "input wait": without compiling, evaluating, saving.

    Args:
      phases: of this process.
      step: where it begins; its first step, which compiles, has a phase of its own.
      seconds_at_peak: what a step would take at the chips' peak; None where that is not known.
    """

    def __init__(
        self,
        phases: Phases,
        *,
        batch_size: int,
        step: int,
        total_steps: int,
        seconds_at_peak: float | None = None,
    ):
        self._phases = phases
        self._batch_size = batch_size
        self._total = total_steps
        self._seconds_at_peak = seconds_at_peak
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=None)
        if step < total_steps:
            if self._bar.disable:
                print("compiling the first step", flush=True)
            else:
                self._bar.set_postfix_str("compiling the first step")
        self._first = step + 1
        self._reported: tuple[int, dict[str, float]] | None = None

    def stepped(self) -> None:
        """Counts a training step."""
        self._bar.update()
        if self._reported is None:
            self._reported = self._first, self._phases.seconds()

    def report(self, step: int, loss: float, waits: Sequence[float] = ()) -> dict[str, float]:
        """Shows where the run is.

        Args:
          step: the last one that is known to be finished.
          waits: seconds that each process has waited for input since the last report; where there
            are several, the one that waits longest holds up all.

        Returns:
          Speeds since the last report; {} if there was no step since:
          "seconds_per_step"   without evaluating and saving
          "images_per_second"  the same, the other way round
          "input_wait"         the share of it in which the devices had nothing to do
          "checkpoint_seconds" for which saving held training up
          "slowest_process", "slowest_input_wait"  its number and its seconds, of several processes
          "mfu"                model FLOPs utilisation, a share of the chips' peak, if that is known
        """
        assert self._reported is not None  # `stepped` was called
        before, spent = self._reported
        now = self._phases.seconds()
        train, wait, save = (now[k] - spent[k] for k in ("train", "input wait", "save"))
        if step <= before or train + wait <= 0:
            return {}
        self._reported = step, now
        seconds = (train + wait) / (step - before)
        speeds = {
            "seconds_per_step": seconds,
            "images_per_second": self._batch_size / seconds,
            "input_wait": wait / (train + wait),
            "checkpoint_seconds": save,
        }
        text = f"loss {loss:.4f}, {speeds['images_per_second']:.0f} images/s, {seconds:.3g} s/step"
        if wait / (train + wait) >= 0.01:
            text += f", input wait {speeds['input_wait']:.0%}"
        if len(waits) > 1:
            slowest = max(range(len(waits)), key=waits.__getitem__)
            speeds |= {"slowest_process": slowest, "slowest_input_wait": waits[slowest]}
            if waits[slowest] >= 0.05 * (train + wait):
                text += f", process {slowest} waited {waits[slowest]:.1f} s for input"
        if save >= 0.1:
            text += f", saving {save:.1f} s"
        if self._seconds_at_peak:
            speeds["mfu"] = self._seconds_at_peak / seconds
            text += f", MFU {speeds['mfu']:.0%}"
        if self._bar.disable:
            left = datetime.timedelta(seconds=round((self._total - step) * seconds))
            print(f"step {step}/{self._total}: {text}, {left} left", flush=True)
        else:
            self._bar.set_postfix_str(text)
        return speeds

    def say(self, text: str) -> None:
        """Prints lines without tearing the bar."""
        tqdm.write(text)

    def close(self) -> None:
        self._bar.close()


def seconds_at_peak(flops: Callable[[], int], dtype: str, devices: int) -> float | None:
    """How long a training step takes if all devices run at their peak; None if that is not known.

    A peak is of bfloat16 products.

    Args:
      flops: counts those of one step.
      dtype: in which the model computes.
    """
    chip = chips.chip()
    if chip is None or dtype != "bfloat16":
        return None
    return flops() / (devices * chip.flops)
