"""Which image comes when: a function of (seed, step) alone."""

import grain
import numpy as np

from hybrid_flax.data.sources import Source
from hybrid_flax.errors import InputError


def batches_per_epoch(source: Source, batch_size: int) -> int:
    """How many whole batches the source has; InputError if none."""
    if len(source) < batch_size:
        raise InputError(
            f"batch_size={batch_size}, but there are only {len(source)} training images; choose a "
            "batch size up to that number"
        )
    return len(source) // batch_size


def images_of_batch(
    source: Source, number: int, *, batch_size: int, seed: int, repeats: int = 1, group: int = 0
) -> list[int]:
    """Which images batch `number` of `train_batches` has, row by row."""
    order = image_order(source, batch_size, seed, repeats, group)
    epoch, batch = divmod(number, len(order) // batch_size)
    start = epoch * len(order) + batch * batch_size
    return [int(order[start + row]) for row in range(batch_size)]


def image_order(
    source: Source, batch_size: int, seed: int, repeats: int, group: int
) -> grain.MapDataset:
    """Image numbers: an epoch after the other, each a new permutation."""
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    return Repeated(order, repeats, batch_size, group) if repeats > 1 else order


class RowsOfBatches(grain.MapDataset):
    """Picks these rows of every whole batch of the parent's elements, one after the other."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        batch, row = divmod(place, len(self._rows))
        place = batch * self._batch_size + int(self._rows[row])
        return self._parent[epoch * len(self._parent) + place]


class Repeated(grain.MapDataset):
    """Every element of a shuffled dataset `repeats` times in a row, dealt out to groups.

    The papers deal an epoch's list, in which every image stands `repeats` times, to their GPUs like
    cards, so that each GPU's images are all different, and end the epoch after as many crops as
    there are images. Here a group of `group` consecutive rows of a batch is what a GPU had: the
    batch's part of the list is dealt to its groups. A later epoch has another order, as far as the
    parent does.

    Their epochs end at a multiple of 256 images; ours, like all of ours, at a whole batch, which is
    the same place for batches of multiples of 256.

    Args:
      batch_size: rows of a batch.
      group: as `augment.mix_group`; 0, or more than a batch: one group, nothing to be dealt.
    """

    def __init__(self, parent: grain.MapDataset, repeats: int, batch_size: int, group: int):
        super().__init__(parent)
        self._repeats = repeats
        self._batch_size = batch_size
        self._group = min(group, batch_size) or batch_size

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        batch, row = divmod(place, self._batch_size)
        group, place_in_group = divmod(row, self._group)
        card = place_in_group * (self._batch_size // self._group) + group
        place = (batch * self._batch_size + card) // self._repeats
        return self._parent[epoch * len(self) + place]
