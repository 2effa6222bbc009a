"""All files of a small dataset in memory, once for all data-loading processes."""

import os
import sys
import weakref
from multiprocessing import shared_memory

import numpy as np
import tqdm

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources.base import Encoded, EncodedSource
from hybrid_flax.errors import InputError


class InMemory(EncodedSource):
    """The files of another source, read once. Pickled, it names the memory and does not copy it.

    A file that cannot be read is refused when it is asked for, as it would be without this.

    Raises:
      InputError: there is not enough shared memory.
    """

    def __init__(self, source: EncodedSource):
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.found_in, self.left_out = source.found_in, source.left_out
        self._identity = source.identity()
        files: list[bytes] = []
        labels: list[int] = []
        self._names: list[str] = []
        self._failed: dict[int, str] = {}
        space = _shared_memory_left()
        total = 0
        for index in tqdm.tqdm(
            range(len(source)), desc="reading into memory", file=sys.stderr, leave=False
        ):
            try:
                data, label, name = source.read(index)
            except UnreadableImageError as error:
                data, label, name = b"", -1, _name(source, index)
                self._failed[index] = str(error)
            files.append(data)
            labels.append(label)
            self._names.append(name)
            total += len(data)
            if total > space:
                raise InputError(
                    f"--config.dataset.cache: the first {index + 1} of {len(source)} images have "
                    f"{total / 1e9:.2f} GB, more than the {space / 1e9:.2f} GB of shared memory "
                    "that is free (/dev/shm; in containers --shm-size). Train without the cache"
                )
        self._labels = np.array(labels, np.int64)
        self.labels = source.labels  # of those, too, that cannot be read
        if self.labels is None and not self._failed:
            self.labels = self._labels
        self._ends = np.cumsum([len(data) for data in files])
        self._memory = shared_memory.SharedMemory(create=True, size=max(total, 1))
        for end, data in zip(self._ends, files, strict=True):
            self._bytes[int(end) - len(data) : int(end)] = data
        weakref.finalize(self, _free, self._memory, os.getpid())

    @property
    def _bytes(self) -> memoryview:
        assert self._memory.buf is not None  # it is, until the memory is closed
        return self._memory.buf

    def __len__(self) -> int:
        return len(self._labels)

    def identity(self) -> str:
        return self._identity

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> Encoded:
        if index in self._failed:
            raise UnreadableImageError(self._failed[index])
        start = int(self._ends[index - 1]) if index else 0
        data = bytes(self._bytes[start : int(self._ends[index])])
        return Encoded(data, int(self._labels[index]), self._names[index])


def _name(source: EncodedSource, index: int) -> str:
    try:
        return source.name(index)
    except UnreadableImageError:  # the name stands in the file, too
        return ""


def _shared_memory_left() -> int:
    try:
        status = os.statvfs("/dev/shm")
    except OSError:  # not Linux: no such limit
        return sys.maxsize
    return status.f_bavail * status.f_frsize


def _free(memory: shared_memory.SharedMemory, owner: int) -> None:
    memory.close()
    if os.getpid() == owner:
        memory.unlink()
