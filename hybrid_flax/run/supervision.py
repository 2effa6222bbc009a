"""What watches over a program from its first line to its last: phases, watchdog, stop signals."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from hybrid_flax.run.phases import Phases
from hybrid_flax.run.stop_signal import StopSignal
from hybrid_flax.run.watchdog import Watchdog
from hybrid_flax.settings import FIELDS
from hybrid_flax.sign_of_life import heard_by


class Supervision(NamedTuple):
    """Of this process."""

    phases: Phases
    stop: StopSignal
    watchdog: Watchdog


_current: Supervision | None = None


@contextlib.contextmanager
def supervised() -> Iterator[Supervision]:
    """Around a program, or a run that no program is around: within another it is that one.

    The watchdog allows what `--config.watchdog_seconds` is by default, until it is told otherwise.
    """
    global _current
    if _current is not None:
        yield _current
        return
    phases = Phases()
    seconds = FIELDS["watchdog_seconds"].default
    with (
        StopSignal() as stop,
        Watchdog(phases, seconds) as watchdog,
        heard_by(phases.goes_on),
    ):
        _current = Supervision(phases, stop, watchdog)
        try:
            yield _current
        finally:
            _current = None
