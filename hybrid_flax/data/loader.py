"""Grain pipelines from a source to batches of uint8 images.

Which images a training step sees, and how they are augmented, is a function of (seed, step) alone:
a resumed run starts at its step and needs no iterator state, and the number of data-loading
processes changes nothing.
"""

import contextlib
from collections.abc import Generator, Iterator
from typing import Protocol

import grain
import numpy as np

from hybrid_flax.data.order import RowsOfBatches, batches_per_epoch, image_order
from hybrid_flax.data.transforms import Batch, EvalTransform, TrainTransform
from hybrid_flax.data.workers import ReadAhead
from hybrid_flax.errors import InputError


class Batches(Protocol):
    """An iterator of batches; closing it ends the threads or processes that prepare them."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...


def train_batches(
    transform: TrainTransform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    repeats: int = 1,
    group: int = 0,
    rows: np.ndarray | None = None,
) -> Batches:
    """Reads training batches without end, from step `start_step` on.

    Every epoch is a new permutation of the source; images that do not fill a batch are left out of
    that epoch. With `repeats` an epoch has as many batches, of a part of the source: each image
    comes that often, augmented anew, in different groups of `group` rows (`Repeated`). With `rows`
    only these rows of each batch are read, and are the same as in the whole batch.

    Yields `image` uint8 [B, H, W, 3], `label`, `index` and `unreadable` int32 [B].
    """
    batches_per_epoch(transform.source, batch_size)
    order = image_order(transform.source, batch_size, seed, repeats, group)
    rows = np.arange(batch_size) if rows is None else rows
    images = RowsOfBatches(order.random_map(transform), batch_size, rows)
    batches = images.batch(len(rows)).repeat()[start_step:]
    return ReadAhead(batches, num_workers, len(rows) * transform.example_bytes)


def eval_batches(
    transform: EvalTransform,
    *,
    batch_size: int,
    num_workers: int = 0,
    rows: np.ndarray | None = None,
    need_some: bool = True,
) -> Generator[Batch, None, None]:
    """Reads every image of the source once, in order, as batches that all have `batch_size` rows.

    The last one is filled up with zero images whose `mask` is 0. With `rows` only these rows of
    each batch are read. Yields `image` uint8 [B, H, W, 3], `label` and `index` int32 [B], `mask`
    float32 [B].

    With `need_some`, raises InputError in the end if there are images and none could be read.
    """
    count = -(-len(transform.source) // batch_size)
    images = grain.MapDataset.range(count * batch_size).map(transform)
    rows = np.arange(batch_size) if rows is None else rows
    dataset = RowsOfBatches(images, batch_size, rows).batch(len(rows))
    readable = 0
    ahead = ReadAhead(dataset, num_workers, len(rows) * transform.example_bytes)
    with contextlib.closing(ahead) as batches:
        for batch in batches:
            readable += int(batch["mask"].sum())
            yield batch
    if (
        need_some and count and not readable and len(rows) == batch_size
    ):  # else other processes may have some
        raise InputError(
            f"none of {len(transform.source)} images can be read, see the warnings: is this the "
            "right folder?"
        )
