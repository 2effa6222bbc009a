"""The threads or processes that prepare batches ahead, and the memory that they need for it."""

import contextlib
import functools
import logging
import os
import re
import signal
import threading
import time
from typing import Any

import grain
from absl import flags

from hybrid_flax.errors import InputError, TrainingError

_SHARED = "/dev/shm"  # where Linux has shared memory
_AHEAD = 2  # batches that wait in each thread or process


class ReadAhead:
    """Batches in order, prepared in two threads, or in `num_workers` processes of their own.

    Processes hand batches over in shared memory, or through pipes, more slowly, where there is too
    little of it.

    Args:
      batch_bytes: memory of a batch.

    Raises:
      InputError: the batches that are prepared at a time do not fit into the machine's memory.
    """

    def __init__(self, dataset: grain.MapDataset, num_workers: int, batch_bytes: int):
        _check_memory(num_workers, batch_bytes)
        threads = grain.ReadOptions(
            num_threads=1 if num_workers else 2, prefetch_buffer_size=_AHEAD
        )
        batches = dataset.to_iter_dataset(threads)
        if num_workers:
            batches = _in_processes(batches, num_workers, batch_bytes)
        self._batches: Any = iter(batches)
        self._num_workers = num_workers
        self._what = f"{num_workers} processes prepare batches of {_show(batch_bytes)}"

    def __iter__(self) -> "ReadAhead":
        return self

    def __next__(self) -> Any:
        """The next batch. Raises TrainingError if a process died, or could not be started."""
        try:
            return next(self._batches)
        except RuntimeError as error:
            if died := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error)):
                raise TrainingError(_why_it_died(int(died[1]), self._what)) from error
            raise
        except OSError as error:
            if not self._num_workers:
                raise
            raise TrainingError(
                f"a process that prepares batches cannot go on: {error}. {self._what}; shared "
                f"memory ({_SHARED}): {_show_shared()}. {_ADVICE}"
            ) from error

    def close(self) -> None:
        """Ends the threads or processes; there are no more batches then."""
        self._batches.close()
        self._batches = iter(())  # not to be closed again while the interpreter is taken apart


_ADVICE = (
    "Take fewer processes (--config.dataset.num_workers; 0: threads of this one), a smaller "
    "--config.batch_size, or more memory (of a container: docker run --shm-size=8g)"
)


def _in_processes(
    batches: grain.IterDataset, num_workers: int, batch_bytes: int
) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags; outside absl programs nobody did
        flags.FLAGS.mark_as_parsed()
    needed, free = _most_batches(num_workers) * batch_bytes, _free_shared()
    if free is not None and needed > free:
        logging.warning(
            "%s has %s free, and %d processes may need %s of it (--config.dataset.num_workers, "
            "--config.batch_size, --config.model.image_size): batches come through pipes, which is "
            "slower. Fewer processes need less; a container has more with docker run --shm-size=8g",
            *(_SHARED, _show(free), num_workers, _show(needed)),
        )
        through_pipes = grain.experimental.DatasetOptions(min_shm_size=1 << 62)
        batches = grain.experimental.WithOptionsIterDataset(batches, through_pipes)
    _free_names_at_once()
    return batches.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=_AHEAD),
        worker_init_fn=functools.partial(_belong_to, os.getpid()),
    )


def _most_batches(num_workers: int) -> int:
    """How many batches there are at a time at most."""
    # Each process has one in work and some in its queue; a thread of ours takes from each queue and
    # has as many again; and of those that were taken last the devices may still read.
    return num_workers * 2 * (_AHEAD + 1) + 3 if num_workers else _AHEAD + 3


def _check_memory(num_workers: int, batch_bytes: int) -> None:
    needed, there = _most_batches(num_workers) * batch_bytes, _memory()
    if there is not None and needed > there:
        raise InputError(
            f"batches of {_show(batch_bytes)}, of which up to {_most_batches(num_workers)} are "
            f"prepared at a time, take {_show(needed)} of memory, and this machine has "
            f"{_show(there)}. Take a smaller --config.batch_size or --config.model.image_size, or "
            f"fewer processes (--config.dataset.num_workers={num_workers})"
        )


def _memory() -> int | None:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _free_shared() -> int | None:
    """Free bytes of shared memory; None where it is not a file system of its own."""
    try:
        status = os.statvfs(_SHARED)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _show_shared() -> str:
    free = _free_shared()
    return "size unknown" if free is None else f"{_show(free)} free"


def _show(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _why_it_died(code: int, what: str) -> str:
    """Says what the exit status of a process that prepares batches means."""
    with_code = f"a process that prepares batches was terminated unexpectedly with exit code {code}"
    shared = f"{what}; shared memory ({_SHARED}): {_show_shared()}"
    if code == -signal.SIGKILL:
        return f"{with_code} (killed, as when memory runs out). {shared}. {_ADVICE}"
    if code == -signal.SIGBUS:
        return f"{with_code} (bus error: no shared memory is left). {shared}. {_ADVICE}"
    return (
        f"{with_code}; see above what it said. --config.dataset.num_workers=0 prepares them in "
        "this process, and shows which image it was"
    )


@functools.cache
def _free_names_at_once() -> None:
    """Takes the names of shared memory away as soon as a batch was opened.

    Grain does so when the array is deleted, in a thread that the end of a program does not wait
    for: then Python warns of leaks. The memory itself lives as long as the array either way.
    """
    with contextlib.suppress(ImportError):  # inner things of Grain; without them it only warns
        from grain._src.python.ipc.shared_memory_array import SharedMemoryArray

        SharedMemoryArray.unlink_on_del = lambda array: array.shm.unlink()


def _belong_to(trainer: int, *_):
    # Ctrl-C and SIGTERM reach the whole process group; only the trainer may act on them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A trainer that is killed outright cannot stop its workers, so each watches its parent.
    threading.Thread(target=_exit_with, args=(trainer,), daemon=True).start()


def _exit_with(trainer: int):
    while os.getppid() == trainer:
        time.sleep(1)
    os._exit(1)
