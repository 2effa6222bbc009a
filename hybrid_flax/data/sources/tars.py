"""Tar files as WebDataset writes them, read at random by an index of where members lie."""

import contextlib
import hashlib
import json
import os
import sys
import tarfile
import tempfile

import numpy as np
import tqdm

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources.base import IMAGE_SUFFIXES, Encoded, LabelledSource, check_labels
from hybrid_flax.data.sources.shards import find_shards
from hybrid_flax.errors import InputError

_LABEL_SUFFIXES = (".cls", ".label", ".json")
_LABEL_KEYS = ("label", "cls", "class_id")  # in .json


class TarShards(LabelledSource):
    """`*train*.tar`, `*val*.tar`: per image `KEY.jpg` and its class number beside it.

    The number is the text of `KEY.cls` (or `.label`), or stands in `KEY.json` under label, cls or
    class_id. Members of one sample follow each other, as the format demands. There are as many
    classes as the largest number in the two splits says, counted from 0.

    The first use of a shard reads through it once; the index is kept beside the shards, or in the
    folder `index`, and used until a shard's size or time changes. Only plain tar files can be read
    at random, not compressed ones.
    """

    def __init__(self, path: str, split: str, *, train: str = "train", index: str = ""):
        self._shards = find_shards("tar_shards", path, split, (".tar",))
        table = _load_index(self._shards, index or path, split)
        self.labels = table["label"]
        largest = self.labels.max()
        if split != train:
            with contextlib.suppress(InputError):  # to evaluate, the one split is enough
                shards = find_shards("tar_shards", path, train, (".tar",))
                largest = max(largest, _load_index(shards, index or path, train)["label"].max())
        self.num_classes = int(largest) + 1
        check_labels(self.labels, self.num_classes, f"{path}, split {split}")
        self._shard, self._offset, self._size = table["shard"], table["offset"], table["size"]
        self._names = table["name"]
        self._open: dict[int, int] = {}  # shard number → file descriptor

    def __getstate__(self):
        return self.__dict__ | {"_open": {}}

    def __del__(self):
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def name(self, index: int) -> str:
        return f"{self._shards[int(self._shard[index])]}:{self._names[index].decode()}"

    def read(self, index: int) -> Encoded:
        shard, name = int(self._shard[index]), self.name(index)
        try:
            if shard not in self._open:
                self._open.setdefault(shard, os.open(self._shards[shard], os.O_RDONLY))
            data = os.pread(self._open[shard], int(self._size[index]), int(self._offset[index]))
        except OSError as error:
            raise UnreadableImageError(f"cannot read image {name}: {error}") from error
        return Encoded(data, int(self.labels[index]), name)


def _load_index(shards: list[str], folder: str, split: str) -> dict[str, np.ndarray]:
    """Reads, or makes, columns of all images: the shard's number, offset, size, label, name."""
    stamp = json.dumps([(os.path.abspath(s), *_stamp(s)) for s in shards])
    # Beside the shards one file per split; in a folder for many datasets, one per dataset as well.
    key = hashlib.sha256(os.path.abspath(os.path.dirname(shards[0])).encode()).hexdigest()[:12]
    file = os.path.join(folder, f".tar_index_{split}_{key}.npz")
    if os.path.exists(file):
        with np.load(file) as saved:
            if str(saved["stamp"]) == stamp:
                return {name: saved[name] for name in ("shard", "offset", "size", "label", "name")}
    _check_writable(folder)
    parts = []
    for number, shard in enumerate(
        tqdm.tqdm(shards, desc=f"indexing {split} shards", unit="", file=sys.stderr, leave=False)
    ):
        parts += [(number, *row) for row in _scan(shard)]
    if not parts:
        raise InputError(f"there are no images in {shards[0]} and the other shards of {split!r}")
    columns = list(zip(*parts, strict=True))
    table: dict[str, np.ndarray] = {
        "shard": np.array(columns[0], np.int32),
        "offset": np.array(columns[1], np.int64),
        "size": np.array(columns[2], np.int64),
        "label": np.array(columns[3], np.int64),
        "name": np.array([name.encode() for name in columns[4]]),
    }
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz", delete=False) as stream:
        np.savez(stream, allow_pickle=False, stamp=np.array(stamp), **table)
    os.replace(stream.name, file)
    return table


def _stamp(file: str) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _check_writable(folder: str):
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot keep the index of the tar files in {folder}: {error.strerror}. Give it "
            "another place: --config.dataset.index=DIR"
        ) from error


def _scan(shard: str) -> list[tuple[int, int, int, str]]:
    """(offset, size, label, name) of every image in one tar file."""
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, base = os.path.split(member.name)
                key, _, suffix = base.partition(".")
                key, suffix = os.path.join(folder, key), f".{suffix.lower()}"
                if not member.isfile():
                    continue
                if suffix.endswith(IMAGE_SUFFIXES):
                    if key in images:
                        raise InputError(
                            f"{shard}: {images[key][2]} and {member.name} belong to one sample, "
                            "which must have one image"
                        )
                    images[key] = member.offset_data, member.size, member.name
                elif suffix in _LABEL_SUFFIXES:
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    label = _label(content.read(), suffix)
                    if label is not None:
                        labels[key] = label
    except tarfile.TarError as error:
        raise InputError(
            f"cannot read {shard} as a tar file: {error}. Compressed tar files have no random "
            "access: unpack them to plain .tar"
        ) from error
    for key, (_, _, name) in images.items():
        if key not in labels:
            raise InputError(
                f"{shard}: image {name} has no class number; expected {key}.cls, or {key}.json "
                f"with {', '.join(_LABEL_KEYS)}"
            )
    return [(offset, size, labels[key], name) for key, (offset, size, name) in images.items()]


def _label(data: bytes, suffix: str) -> int | None:
    try:
        content = json.loads(data)  # a number's text is JSON, too
    except ValueError:
        return None
    if suffix == ".json":
        content = next((content[key] for key in _LABEL_KEYS if key in content), None)
    return content if type(content) is int else None
