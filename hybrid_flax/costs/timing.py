"""Times implementations side by side."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

OUT_OF_MEMORY = "out of memory"


class Comparison(NamedTuple):
    """Times of those that ran, and the reasons of those that failed."""

    seconds: dict[str, float]  # the median of one execution
    failed: dict[str, str]


def compare(
    builders: Mapping[str, Callable[[], Callable[[], Any]]], *, turns: int, repeats: int = 1
) -> Comparison:
    """Times subjects side by side.

    Every turn runs each of them once, so that whatever else the machine does hits all alike. One
    that fails, for want of memory or otherwise, is left out of later turns.

    Args:
      builders: each makes a function that does its work `repeats` times and waits for it. Compiling
        belongs here; it is called once more before the first turn, unmeasured.
      turns: how many, of which the median counts.
    """
    runs: dict[str, Callable[[], Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in builders}
    failed: dict[str, str] = {}
    for name, build in builders.items():
        with _leaving(name, runs, failed):
            runs[name] = build()
            runs[name]()
    for _ in range(turns):
        for name in list(runs):
            with _leaving(name, runs, failed):
                start = time.perf_counter()
                runs[name]()
                times[name].append(time.perf_counter() - start)
    return Comparison({name: float(np.median(times[name])) / repeats for name in runs}, failed)


@contextlib.contextmanager
def _leaving(name: str, runs: dict[str, Any], failed: dict[str, str]) -> Iterator[None]:
    """Notes why a subject failed, and frees what it held."""
    try:
        yield
    except Exception as error:  # of any kind: kernels and compilers have many
        runs.pop(name, None)
        failed[name] = reason(error)
    if failed.get(name) == OUT_OF_MEMORY:
        gc.collect()  # tracebacks keep arrays alive in cycles


def reason(error: Exception) -> str:
    """Says an error in a line; OUT_OF_MEMORY for any of JAX's and PyTorch's ways to say that."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or OUT_OF_MEMORY in text.lower():
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {text.strip().partition(chr(10))[0][:200]}"
