"""Signs of life of this process: anything may give one, and the watchdog hears it."""

import contextlib
from collections.abc import Callable, Iterator

_heard: list[Callable[[], None]] = []


def alive() -> None:
    """Says that the program goes on: a batch was read, a step compiled, a folder looked through."""
    for hear in tuple(_heard):
        hear()


@contextlib.contextmanager
def heard_by(hear: Callable[[], None]) -> Iterator[None]:
    """Calls `hear()` at every sign."""
    _heard.append(hear)
    try:
        yield
    finally:
        _heard.remove(hear)
