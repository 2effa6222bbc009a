"""Which phase a run is in, and how long each has taken."""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator

STARTING = ("import", "start", "build", "restore", "first batch", "compile", "first step")
PHASES = (*STARTING, "train", "input wait", "save", "evaluate")


class Phases:
    """Which phase the run is in, and the seconds each has taken: every second belongs to one.

    phases = Phases()  # in "start"
    phases.enter("train")
    with phases("input wait"): ...
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._since = clock()
        self._known: set[str] = set()  # phases that have shown a sign of progress
        self._sign = "start", self._since  # one tuple, for another thread reads it

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Around a phase within another, whose clock stands still meanwhile."""
        outer = self._sign[0]
        self.enter(kind)
        try:
            yield
        finally:
            self.enter(outer)

    def enter(self, kind: str) -> None:
        """Ends the phase that the run is in, and begins another."""
        now = self._clock()
        left = self._sign[0]
        self._seconds[left] += now - self._since
        self._since = now
        self._known.add(left)
        self._sign = kind, now

    def count(self, kind: str, seconds: float) -> None:
        """Counts seconds that passed before there were phases."""
        self._seconds[kind] += seconds

    def was(self, kind: str) -> None:
        """Counts the time since the phase was entered as another's."""
        self._sign = kind, self._sign[1]

    def alive(self) -> None:
        """Says that the phase goes on, for the watchdog."""
        self._known.add(self._sign[0])
        self._sign = self._sign[0], self._clock()

    def goes_on(self) -> None:
        """The same from somebody who does not know the phase: what comes next may be its first."""
        self._sign = self._sign[0], self._clock()

    def forgive(self, seconds: float) -> None:
        """Does not count seconds of silence in which the whole process stood still."""
        kind, at = self._sign
        self._sign = kind, at + seconds

    def silence(self) -> tuple[str, float, bool]:
        """(phase, seconds since its last sign of progress, whether that would be its first)."""
        kind, at = self._sign
        return kind, self._clock() - at, kind not in self._known

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase until now; their sum is `elapsed`, at the same moment."""
        now = self._clock()
        kind = self._sign[0]
        return self._seconds | {kind: self._seconds[kind] + now - self._since}


def seconds_of_process() -> float:
    """How long ago this process began; 0 where the system does not say (it is not Linux)."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
