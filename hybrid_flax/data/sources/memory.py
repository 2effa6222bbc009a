"""All files of a small dataset in memory, once for all data-loading processes."""

import os
import sys
import weakref
from multiprocessing import shared_memory

import numpy as np
import tqdm

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources.base import Encoded, EncodedSource, LabelledSource
from hybrid_flax.errors import InputError


class InMemory(LabelledSource):
    """The files of another source, read once. Pickled, it names the memory and does not copy it.

    A file that cannot be read is refused when it is asked for, as it would be without this.

    Raises:
      InputError: there is not enough shared memory.
      UnreadableImageError: a file cannot be read and the source does not know its label otherwise.
    """

    def __init__(self, source: EncodedSource):
        self.num_classes, self.class_names = source.num_classes, source.class_names
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
                if source.labels is None:
                    raise
                data, label, name = b"", int(source.labels[index]), ""
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
        self.labels = np.array(labels)
        self._ends = np.cumsum([len(data) for data in files])
        self._memory = shared_memory.SharedMemory(create=True, size=max(total, 1))
        self._bytes[:total] = b"".join(files)
        weakref.finalize(self, _free, self._memory, os.getpid())

    @property
    def _bytes(self) -> memoryview:
        assert self._memory.buf is not None  # it is, until the memory is closed
        return self._memory.buf

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> Encoded:
        if index in self._failed:
            raise UnreadableImageError(self._failed[index])
        start = int(self._ends[index - 1]) if index else 0
        data = bytes(self._bytes[start : int(self._ends[index])])
        return Encoded(data, int(self.labels[index]), self._names[index])


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
