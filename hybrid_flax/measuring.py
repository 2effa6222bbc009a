"""What the benchmarks share: chips, side-by-side timing, and the record of where it was done."""

import argparse
import contextlib
import gc
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from hybrid_flax.errors import InputError
from hybrid_flax.versions import versions


class Chip(NamedTuple):
    """Datasheet figures of one device as JAX counts them."""

    flops: float  # per second, dense bfloat16 matrix products
    bandwidth: float  # bytes per second, of its main memory
    l1_bandwidth: float = math.inf  # bytes per second, of all its L1 caches; inf: no limit known


L1_H200 = 132 * 128 * 1.98e9  # multiprocessors, bytes a clock, clocks a second at most

# By `device_kind`; TPU chips go by two names.
CHIPS = {
    "NVIDIA H200": Chip(989.5e12, 4.8e12, L1_H200),
    "TPU v4": Chip(275e12, 1.23e12),
    **dict.fromkeys(("TPU v5e", "TPU v5 lite"), Chip(197e12, 0.82e12)),
    **dict.fromkeys(("TPU v5p", "TPU v5"), Chip(459e12, 2.46e12)),
    **dict.fromkeys(("TPU v6e", "TPU v6 lite"), Chip(920e12, 1.64e12)),
}


def chip() -> Chip | None:
    """Of the first device; None where we have no figures for it."""
    return CHIPS.get(jax.devices()[0].device_kind)


def platform_name() -> str:
    """Of the first device, as `jax.lax.platform_dependent` calls it: "cuda", "tpu", "cpu"."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


OUT_OF_MEMORY = "out of memory"


class Race(NamedTuple):
    """How it ended: of every contestant either the time or the reason why there is none."""

    seconds: dict[str, float]  # the median of one execution
    failed: dict[str, str]


def race(
    builders: Mapping[str, Callable[[], Callable[[], Any]]], *, turns: int, repeats: int = 1
) -> Race:
    """Times contestants side by side.

    Every turn runs each of them once, so that whatever else the machine does hits all alike. One
    that fails, for want of memory or otherwise, leaves the race to the others.

    Args:
      builders: each makes a function that does its work `repeats` times and waits for it. Compiling
        belongs here; it is called once more before the first turn, unmeasured.
      turns: how many, of which the median counts.
    """
    runs, times, failed = {}, {name: [] for name in builders}, {}
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
    return Race({name: float(np.median(times[name])) / repeats for name in runs}, failed)


@contextlib.contextmanager
def _leaving(name: str, runs: dict[str, Any], failed: dict[str, str]) -> Iterator[None]:
    """Notes why a contestant failed, and frees what it held."""
    try:
        yield
    except Exception as error:  # of any kind: kernels and compilers have many
        runs.pop(name, None)
        failed[name] = reason(error)
    if failed.get(name) == OUT_OF_MEMORY:
        gc.collect()  # tracebacks keep arrays alive in cycles


def reason(error: Exception) -> str:
    """In a line; OUT_OF_MEMORY for any of JAX's and PyTorch's ways to say that."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or OUT_OF_MEMORY in text.lower():
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {text.strip().partition(chr(10))[0][:200]}"


def record(*packages: str) -> dict[str, Any]:
    """Machine, device and versions, of these packages too."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": jax.devices()[0].device_kind,
        "versions": versions(*packages),
    }


def check_file(flag: str, path: pathlib.Path | None) -> None:
    """Raises InputError, before anything is measured, if the figures could not be written there."""
    if path and not path.parent.is_dir():
        raise InputError(f"{flag}={path}: there is no folder {path.parent}; make it first")


def save(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes JSON that people can compare."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def positive(text: str) -> int:
    """For argparse: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)
