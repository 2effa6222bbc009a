"""Where the time of a run goes, over all its starts: `ledger.jsonl` in the work directory.

One line each time something is logged: the seconds that each phase took since the line before; at
the first step of a start also what making it took, in whatever thread (`compiled`). What the lines
cannot know follows from them: the time between the last line of a process and the next start is
downtime, and the training of steps that had to be done again was lost.

Durations come from the monotonic clock. Wall time only places the starts, so a clock that jumps
can spoil a downtime, and nothing else.
"""

import datetime
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from hybrid_flax.run import files
from hybrid_flax.run.phases import PHASES, Phases

KINDS = (*PHASES, "lost steps", "downtime")
_MOST = 1e12  # of anything in a line that is not damaged
_UNDONE = ("train", "input wait")  # what is lost with a step


class Account(NamedTuple):
    """A run's wall time by what became of it."""

    seconds: dict[str, float]  # by kind, see KINDS
    starts: int
    clock_went_back: bool  # between two starts, whose downtime is then counted as none

    @property
    def wall(self) -> float:
        """Seconds of the run's whole life."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of it in which steps were trained that counted."""
        return self.seconds["train"] / self.wall

    def __str__(self) -> str:
        if not self.wall:
            return "goodput: nothing is known of this run's time"
        shares = ", ".join(
            f"{kind} {100 * self.seconds[kind] / self.wall:.1f} %"
            for kind in KINDS
            if self.seconds[kind]
        )
        life = datetime.timedelta(seconds=round(self.wall))
        text = f"goodput {100 * self.goodput:.1f} % of {life} in {self.starts} start(s): {shares}"
        if self.clock_went_back:
            text += "; the clock went back between two starts, that downtime counts as none"
        return text


def account(lines: list[dict[str, Any]]) -> Account:
    """Adds up the lines of a ledger."""
    seconds = dict.fromkeys(KINDS, 0.0)
    trained: list[tuple[int, int, dict[str, float]]] = []  # after step, up to step, seconds
    before, went_back, starts, step = None, False, 0, 0
    for line in lines:
        if before is None or line["start"] != before["start"]:
            starts += 1
            if before and not before.get("finished"):
                down = line["time"] - line["elapsed"] - before["time"]
                went_back |= down < 0
                seconds["downtime"] += max(down, 0.0)
        trained.append((step, max(step, line["step"]), {}))
        for kind, spent in line["seconds"].items():
            if kind in _UNDONE:
                trained[-1][2][kind] = spent
            else:
                seconds[kind] += spent
        if line["step"] < step:
            trained = [_undo(*entry, line["step"], seconds) for entry in trained]
        before, step = line, line["step"]
    for _, _, spent in trained:
        for kind in spent:
            seconds[kind] += spent[kind]
    return Account(seconds, starts, went_back)


def _undo(
    after: int, upto: int, spent: dict[str, float], restored: int, seconds: dict[str, float]
) -> tuple[int, int, dict[str, float]]:
    """Moves what was spent on the steps beyond `restored` to the lost steps."""
    if upto <= restored:
        return after, upto, spent
    kept = max(0, restored - after) / (upto - after) if upto > after else 0.0
    seconds["lost steps"] += (1 - kept) * sum(spent.values())
    return min(after, restored), restored, {kind: kept * spent[kind] for kind in spent}


def _is_line(found: Any) -> bool:
    """Whether it is a line that `account` can add up."""
    if not isinstance(found, dict) or not isinstance(spent := found.get("seconds"), dict):
        return False
    counts = [found.get(name) for name in ("start", "step")]
    numbers = [*counts, found.get("time"), found.get("elapsed"), *spent.values()]
    return (
        all(type(count) is int for count in counts)
        and all(isinstance(number, int | float) and abs(number) < _MOST for number in numbers)
        and spent.keys() <= set(PHASES)
    )


def read_ledger(file: str) -> list[dict[str, Any]]:
    """The lines of a ledger; what is damaged in it is left out, with a warning."""
    return files.read_json_lines(file, _is_line)[0]


class Ledger:
    """Appends to the ledger of a run.

    Args:
      file: path of `ledger.jsonl`; None keeps the account of this start alone, in memory.
      phases: of this process.
    """

    def __init__(
        self, file: str | None, phases: Phases, wall_clock: Callable[[], float] = time.time
    ):
        self._file = file
        self._phases = phases
        self._wall_clock = wall_clock
        self._lines = read_ledger(file) if file else []
        self._start = 1 + (self._lines[-1]["start"] if self._lines else 0)
        self._written = dict.fromkeys(PHASES, 0.0)
        self._begun = False

    def begin(self, step: int) -> None:
        """The first line of a start, or of its going on after it was rolled back to `step`.

        Without it nothing is written: a start that finds the run finished is not part of its life.
        """
        self._begun = True
        self.write(step)

    def write(self, step: int, **more: Any) -> None:
        """Adds a line: what happened since the last one, in which the run came to `step`.

        A step before that of the last line, where a start or a run that was rolled back begins, is
        what makes the training beyond it lost.
        """
        if not self._begun:
            return
        until_now = self._phases.seconds()
        spent = {kind: round(until_now[kind] - self._written[kind], 4) for kind in PHASES}
        line = {
            "start": self._start,
            "step": step,
            "time": round(self._wall_clock(), 3),
            "elapsed": round(sum(until_now.values()), 3),
            "seconds": {kind: seconds for kind, seconds in spent.items() if seconds},
            **more,
        }
        self._written = until_now
        self._lines.append(line)
        if self._file:
            files.append(self._file, json.dumps(line).encode() + b"\n", on_new_line=True)

    def account(self) -> Account:
        """Accounts for the whole run up to the last line."""
        return account(self._lines)
