"""The threads or processes that prepare batches ahead."""

import functools
import os
import signal
import threading
import time

import grain
from absl import flags


def read_ahead(dataset: grain.MapDataset, num_workers: int) -> grain.IterDataset:
    """Prepares batches in two threads, or in `num_workers` processes of their own."""
    options = grain.ReadOptions(num_threads=1 if num_workers else 2, prefetch_buffer_size=2)
    batches = dataset.to_iter_dataset(options)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags; outside absl programs nobody did
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            worker_init_fn=functools.partial(_belong_to, os.getpid()),
        )
    return batches


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
