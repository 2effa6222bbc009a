"""Programs that are compiled once, and what that took."""

import time
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from hybrid_flax.run.compilation_cache import hits


class Made(NamedTuple):
    """What making a program took: seconds, and whether it came from the cache."""

    trace: float
    lower: float
    compile: float
    cached: bool

    def __str__(self) -> str:
        seconds = self.trace + self.lower + self.compile
        new = f"new: tracing {self.trace:.1f} s, lowering {self.lower:.1f} s"
        return f"{seconds:.3g} s ({'from the cache' if self.cached else new})"


class CompiledOnce:
    """A step that is compiled once, for arguments of one kind and no others.

    A later call with another shape, dtype or sharding is an error that names it: under `jit` it
    would compile again, minutes that nobody sees.

    Args:
      name: what to call it when it is said how long it took.
    """

    def __init__(self, step: jax.stages.Wrapped, name: str):
        self._step = step
        self._name = name
        self._compiled: jax.stages.Compiled | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Compiles it at the first call."""
        if self._compiled is None:
            self.compile(*arguments)
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
            self._compiled = lowered.compile()
            ended = time.perf_counter()
        made = Made(traced_at - began, lowered_at - traced_at, ended - lowered_at, hits() > found)
        tqdm.write(f"compiled the {self._name} in {made}")
        return made
