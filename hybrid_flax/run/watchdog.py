"""Ending a run that no longer moves, with a word on where it stands.

A dead disk, a lost process of a pod or a stuck device rarely raise an error: everybody waits. What
waits for this process, a scheduler or the other processes of a pod, can go on when it ends.
"""

import contextlib
import datetime
import faulthandler
import os
import platform
import sys
import threading
import time

import jax

from hybrid_flax.run import files
from hybrid_flax.run.phases import Phases

STALLED = 124  # exit status, as of timeout(1)
_FIRST_TIME = 4  # times the limit for what is done the first time: compiling, indexing a dataset
_LAST_WORDS = 20.0  # seconds for saying why: what hangs may be the disk or the device


class Watchdog:
    """A thread that ends this process, with status 124, after a while without a sign of progress.

        with Watchdog(phases, seconds=900, file="…/stall-0.txt"): ...

    Signs of progress are those of `phases`: every step, batch of an evaluation, save. It says which
    phase the run is in and what every thread is doing, on stderr and at the end of `file`. While
    the whole process is stopped (SIGSTOP, Ctrl-Z), no time passes.

    Args:
      phases: of this process.
      seconds: without a sign; four times as many for a phase that has not shown one before, such
        as compiling. 0: no watchdog. May be set at any time.
      file: where to write; None: only to stderr. May be set at any time.
    """

    def __init__(self, phases: Phases, seconds: float, file: str | None = None):
        self.seconds = seconds
        self.file = file
        self._phases = phases
        self._left = threading.Event()
        # A daemon: it never keeps the process alive.
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._left.set()
        self._thread.join()

    def _watch(self):
        while True:
            pause = min(self.seconds / 10 or 1.0, 1.0)
            began = time.monotonic()
            if self._left.wait(pause):
                return
            late = time.monotonic() - began - pause
            if late > pause:  # this thread stood still, and so did the others
                self._phases.forgive(late)
            phase, silent, first = self._phases.silence()
            limit = self.seconds * (_FIRST_TIME if first else 1)
            if silent > limit > 0:
                self._end(phase, silent, limit)

    def _end(self, phase: str, silent: float, limit: float):
        last_resort = threading.Timer(_LAST_WORDS, os._exit, [STALLED])
        last_resort.daemon = True
        last_resort.start()
        try:
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            text = (
                f"{now}: stalled. Process {os.getpid()} on {platform.node()} has been in phase "
                f"{phase!r} for {silent:.0f} s without a sign of progress; {limit:g} s are allowed "
                "(--config.watchdog_seconds). It ends with status 124; the same command continues "
                "from the last checkpoint. What every thread is doing:\n"
            )
            self._write(text, with_stacks=True)
            self._write(f"{_device_memory()}\n", with_stacks=False)
            if sys.stdout:
                sys.stdout.flush()
        finally:
            os._exit(STALLED)

    def _write(self, text: str, *, with_stacks: bool):
        with contextlib.suppress(OSError):
            _write(2, text, with_stacks)  # stderr first: the disk may be what hangs
        if self.file:
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                _write(files.open_regular(self.file, flags), text, with_stacks)


def _write(descriptor: int, text: str, with_stacks: bool) -> None:
    os.write(descriptor, text.encode())
    if with_stacks:
        faulthandler.dump_traceback(descriptor, all_threads=True)


def _device_memory() -> str:
    lines = []
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if "bytes_in_use" in stats:
            used, limit = stats["bytes_in_use"] / 2**30, stats.get("bytes_limit", 0) / 2**30
            lines.append(f"{device}: {used:.2f} of {limit:.2f} GiB in use")
    return "\n".join(lines) or "memory in use on the devices: not known"
