"""What a person sees while a run trains, and how fast it is."""

import contextlib
import datetime
import time

from tqdm import tqdm


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; measures speed without the pauses.

    The first step, which compiles, is not part of the measured time.
    """

    def __init__(self, batch_size: int, step: int, total_steps: int):
        self._batch_size = batch_size
        self._total = total_steps
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=None)
        if step < total_steps:
            if self._bar.disable:
                print("compiling the first step", flush=True)
            else:
                self._bar.set_postfix_str("compiling the first step")
        self._started: float | None = None
        self._steps = 0  # since the last report
        self._waited = 0.0  # seconds for input, since then

    @contextlib.contextmanager
    def waiting(self):
        """Around waiting for the next batch."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self):
        """Around what is not training: evaluating, copying a checkpoint."""
        begin = time.perf_counter()
        yield
        if self._started is not None:
            self._started += time.perf_counter() - begin

    def stepped(self) -> None:
        """After every training step."""
        self._bar.update()
        if self._started is None:
            self._started, self._waited = time.perf_counter(), 0.0
        else:
            self._steps += 1

    def report(self, step: int, loss: float) -> dict[str, float]:
        """Shows where the run is; returns the speed since the last report."""
        now = time.perf_counter()
        seconds = now - self._started
        if not self._steps or seconds <= 0:
            return {}
        images_per_second = self._steps * self._batch_size / seconds
        left = (self._total - step) * self._batch_size / images_per_second
        waited = min(1.0, self._waited / seconds)
        self._started, self._steps, self._waited = now, 0, 0.0
        text = f"loss {loss:.4f}, {images_per_second:.0f} images/s"
        if self._bar.disable:
            time_left = datetime.timedelta(seconds=round(left))
            print(f"step {step}/{self._total}: {text}, {time_left} left", flush=True)
        else:
            self._bar.set_postfix_str(text)
        return {"images_per_second": images_per_second, "input_wait": waited}

    def say(self, text: str) -> None:
        """Prints lines without tearing the bar."""
        tqdm.write(text)

    def close(self) -> None:
        self._bar.close()
