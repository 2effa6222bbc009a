"""Programs that are compiled once, beside what else a start does, and what that took."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import jax
from tqdm import tqdm

from hybrid_flax.run.compilation_cache import hits

_NAME = "compiling"  # of threads

# Looks for a saved program in place of a lowered one: (the program, where it came from).
Load = Callable[[jax.stages.Lowered], tuple[jax.stages.Compiled, str] | None]


class Made(NamedTuple):
    """What making a program took: seconds, and where it came from."""

    trace: float
    lower: float
    compile: float
    source: str  # "new", "the cache", or a file

    def __str__(self) -> str:
        seconds = self.trace + self.lower + self.compile
        source = f"from {self.source}"
        if self.source == "new":
            source = f"new: tracing {self.trace:.1f} s, lowering {self.lower:.1f} s"
        return f"{seconds:.3g} s ({source})"


class CompiledOnce:
    """A step that is compiled once, for arguments of one kind and no others.

    A later call with another shape, dtype or sharding is an error that names it: under `jit` it
    would compile again, minutes that nobody sees.

    Args:
      name: what to call it when it is said how long it took.
      load: where to look before it is compiled.
    """

    def __init__(
        self,
        step: jax.stages.Wrapped,
        name: str,
        load: Load | None = None,
    ):
        self._step = step
        self._name = name
        self._load = load
        self._compiled: jax.stages.Compiled | None = None
        self._begun: Future[Made] | None = None
        self.made: Made | None = None

    def begin(self, threads: ThreadPoolExecutor, *arguments: Any) -> None:
        """Compiles it in another thread; whoever needs it first meets what went wrong there."""
        self._begun = threads.submit(self.compile, *arguments)

    def ready(self, *arguments: Any) -> Made:
        """Waits until it is compiled, or compiles it for these arguments."""
        if self._begun:
            self._begun.result()
        return self.made or self.compile(*arguments)

    def __call__(self, *arguments: Any) -> Any:
        self.ready(*arguments)
        assert self._compiled is not None
        return self._compiled(*arguments)

    def compile(self, *arguments: Any) -> Made:
        """Compiles it for arguments, or what has their shapes, dtypes and shardings."""
        with jax.transfer_guard("allow"):  # constants of the program
            began = time.perf_counter()
            traced = self._step.trace(*arguments)
            traced_at = time.perf_counter()
            lowered = traced.lower()
            lowered_at, found = time.perf_counter(), hits()
            loaded = self._load(lowered) if self._load else None
            if loaded:
                self._compiled, source = loaded
            else:
                self._compiled = lowered.compile()
                source = "the cache" if hits() > found else "new"
            ended = time.perf_counter()
        self.made = Made(traced_at - began, lowered_at - traced_at, ended - lowered_at, source)
        tqdm.write(f"compiled the {self._name} in {self.made}")
        return self.made


@contextlib.contextmanager
def compiling() -> Iterator[ThreadPoolExecutor]:
    """A thread for `begin`. It is not waited for: an error elsewhere is to be said at once."""
    threads = ThreadPoolExecutor(1, thread_name_prefix=_NAME)
    try:
        yield threads
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def exit_with(status: int | None) -> NoReturn:
    """Ends the process, also while something compiles: Python would wait for that, minutes."""
    for thread in threading.enumerate():
        if thread.name.startswith(_NAME):
            thread.join(0.2)  # it may be about to end
            if thread.is_alive():
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError, ValueError):
                        stream.flush()
                os._exit(status or 0)
    sys.exit(status)
