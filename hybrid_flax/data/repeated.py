"""Repeated augmentation (Hoffer et al., arXiv:1901.09335) as an order of images."""

import grain


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
