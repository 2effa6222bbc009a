"""What the definitions compute on the way, for whoever asks: the weights of attention, of sampling.

Nobody asks in training, and then nothing is kept or computed. While somebody does, `dispatch.run`
takes the definitions in place of the kernels, which never hold what is asked for.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax


class Seen(NamedTuple):
    """What one call of a definition gave."""

    kind: str  # "attention", "linear attention" or "sampling"
    geometry: Any  # of the operation with kernels that it is part of; None: of none
    arrays: dict[str, jax.Array]


class _Watch:
    def __init__(self) -> None:
        self.calls: list[Seen] = []
        self.geometry: Any = None


_watch: contextvars.ContextVar[_Watch | None] = contextvars.ContextVar("watch", default=None)


@contextlib.contextmanager
def watched() -> Iterator[list[Seen]]:
    """Lists what is seen inside, in the order of the calls.

    with watched() as calls:
        model(images)
    """
    watch = _Watch()
    token = _watch.set(watch)
    try:
        yield watch.calls
    finally:
        _watch.reset(token)


def watching() -> bool:
    """Whether somebody asks."""
    return _watch.get() is not None


@contextlib.contextmanager
def part_of(geometry: Any) -> Iterator[None]:
    """What is seen inside is part of an operation on this geometry."""
    watch = _watch.get()
    assert watch is not None
    watch.geometry = geometry
    try:
        yield
    finally:
        watch.geometry = None


def show(kind: str, **arrays: Callable[[], jax.Array]) -> None:
    """Keeps the arrays, which are made only if somebody asks."""
    watch = _watch.get()
    if watch is not None:
        made = {name: make() for name, make in arrays.items()}
        watch.calls.append(Seen(kind, watch.geometry, made))
