"""The images of a run: training batches on the devices from any step on, and validation images."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from hybrid_flax.data.identity import Fingerprint, describe
from hybrid_flax.data.loader import Batches, train_batches
from hybrid_flax.data.order import batches_per_epoch, images_of_batch
from hybrid_flax.data.sources import EncodedSource
from hybrid_flax.data.transforms import EvalTransform, TrainTransform
from hybrid_flax.distributed.batch import local_rows, to_devices
from hybrid_flax.settings import Settings


class Data:
    """The training and validation images of a run, as its config asks for them.

    Raises:
      InputError: there are fewer images than a batch takes, or the label maps cannot be used.
    """

    def __init__(
        self,
        config: Settings,
        train: EncodedSource,
        val: EncodedSource,
        mesh: Mesh,
    ):
        self.train = train
        self.val = val
        self.steps_per_epoch = batches_per_epoch(train, config.batch_size)
        self.train_transform = TrainTransform.from_config(config, train)
        self.val_transform = EvalTransform.from_config(config, val)
        self._mesh = mesh
        self._num_workers = config.dataset.num_workers
        self._order: dict[str, Any] = {  # what decides, beside the number, which images a batch has
            "batch_size": config.batch_size,
            "seed": config.seed,
            "repeats": config.augment.repeats,
            "group": config.augment.mix_group,
        }

    def batches_from(self, number: int) -> "Feed":
        """Starts to read training batches from batch `number` on."""
        batches = train_batches(
            self.train_transform,
            start_step=number,
            num_workers=self._num_workers,
            rows=local_rows(self._order["batch_size"], self._mesh),
            **self._order,
        )
        return Feed(batches, self._mesh)

    def images_of(self, number: int) -> dict[int, str]:
        """{index: name} of the images in training batch `number`."""
        images = images_of_batch(self.train, number, **self._order)
        return {index: self.train.name(index) for index in images}

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """Describes the images of both splits, for checkpoints."""
        return describe(self.train, self.val)


class Feed(Iterator[dict[str, jax.Array]]):
    """Training batches on the devices, copied one batch ahead.

    `unreadable` is how many images the batches so far had others in place of.
    """

    def __init__(self, batches: Batches, mesh: Mesh):
        self._batches = batches
        self._mesh = mesh
        self._ahead: tuple[dict[str, jax.Array], int] | None = None
        self.unreadable = 0

    def __next__(self) -> dict[str, jax.Array]:
        now = self._ahead or self._copied()
        self._ahead = self._copied()
        self.unreadable += now[1]
        return now[0]

    def _copied(self) -> tuple[dict[str, jax.Array], int]:
        batch = next(self._batches)
        used = {name: batch[name] for name in batch if name not in ("index", "unreadable")}
        return to_devices(used, self._mesh), int(batch["unreadable"].sum())

    def close(self) -> None:
        """Ends the processes that read ahead."""
        self._batches.close()
