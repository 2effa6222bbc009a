"""Tar files as WebDataset writes them, read at random by an index of where members lie."""

import collections
import hashlib
import json
import os
import stat
import sys

import numpy as np
import tqdm

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources.base import (
    IMAGE_SUFFIXES,
    Encoded,
    LabelledSource,
    digest,
)
from hybrid_flax.data.sources.descriptors import DESCRIPTORS
from hybrid_flax.data.sources.index_file import Table, load_or_make
from hybrid_flax.data.sources.labels import check_label_range
from hybrid_flax.data.sources.shards import find_split
from hybrid_flax.data.sources.tar_samples import Parts, Scan
from hybrid_flax.data.sources.walk import HIDDEN, name_below
from hybrid_flax.errors import InputError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_INDEX = ".tar_index_"
_FORMAT = 2  # of the index
_COLUMNS = {  # of the index, and their types; all but name_bytes and left_out have a row per image
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "label": np.int64,
    "name_end": np.int64,  # of the image's name in name_bytes
    "name_bytes": np.uint8,
    "left_out": np.uint8,  # JSON
}


class TarShards(LabelledSource):
    """`*train*.tar`, `*val*.tar`: per image `KEY.jpg` and its class number beside it.

    The number is the text of `KEY.cls` (or .label, .class, .target), or stands in `KEY.json`, under
    label, cls or class_id. `label_column` names another ending or another field of `KEY.json`,
    `image_column` the ending of the images where a sample has several. There are as many classes as
    the largest number in the two splits says, counted from 0.

    The first use of a shard reads through it once; the index is kept beside the shards, or in the
    folder `index`, and used until a shard's size or time changes. A member may be a link to another
    of the same shard. Only plain tar files can be read at random, not compressed ones.

    A shard that is damaged is refused; with `skip_damaged`, what is whole before and behind the
    damage is used, and `left_out` counts what is lost.
    """

    def __init__(
        self,
        path: str,
        split: str,
        *,
        train: str = "train",
        index: str = "",
        image_column: str = "",
        label_column: str = "",
        skip_damaged: bool = False,
    ):
        parts = Parts(image_column.lower().lstrip("."), label_column.lstrip("."))
        self._shards, others = _find_shards(path, split)
        table, self._sizes = _load_index(self._shards, path, index, split, parts, skip_damaged)
        self.labels = table["label"]
        where = f"{path}, split {split}"
        self._table, self._path = table, path
        self.found_in = f"{len(self._shards):,} tar files of {path}"
        check_label_range(self.labels, self.name, where)
        largest = self.labels.max()
        if split != train and (shards := _train_shards(path, train)):
            labels = _load_index(shards, path, index, train, parts, skip_damaged)[0]["label"]
            check_label_range(labels, "image number {}".format, f"{path}, split {train}")
            largest = max(largest, labels.max())
        self.num_classes = int(largest) + 1
        members = json.loads(table["left_out"].tobytes())
        self.left_out = dict(collections.Counter(others) + collections.Counter(members))

    def identity(self) -> str:
        """Says by 16 hex digits which files, of which sizes, these are."""
        shards = [name_below(self._path, shard) for shard in self._shards]
        columns = [self._table[name].tobytes() for name in ("name_bytes", "size")]
        return digest([*shards, *map(str, self._sizes), *columns])

    def name(self, index: int) -> str:
        ends = self._table["name_end"]
        begin, end = int(ends[index - 1]) if index else 0, int(ends[index])
        name = self._table["name_bytes"][begin:end].tobytes().decode("utf-8", "replace")
        return f"{self._shards[int(self._table['shard'][index])]}:{name}"

    def read(self, index: int) -> Encoded:
        shard, name = int(self._table["shard"][index]), self.name(index)
        offset, size = int(self._table["offset"][index]), int(self._table["size"][index])
        try:
            data = DESCRIPTORS.read(self._shards[shard], offset, size, self._sizes[shard])
        except OSError as error:
            raise UnreadableImageError(f"cannot read image {name}: {error}") from error
        return Encoded(data, int(self.labels[index]), name)


def _find_shards(path: str, split: str) -> tuple[list[str], dict[str, int]]:
    """(the shards of a split, what else lies there and is left out)"""
    try:
        found = find_split("tar_shards", path, split, (".tar",))
    except InputError:
        try:
            compressed = find_split("tar_shards", path, split, _COMPRESSED).files
        except InputError:
            compressed = []
        if not compressed:
            raise
        raise InputError(
            f"{compressed[0]} is compressed, as are all {len(compressed)} tar files of {split!r}: "
            "compressed tar files have no random access. Unpack them to plain .tar (gunzip, "
            "unxz, unzstd)"
        ) from None
    indexes = sum(name.startswith(_INDEX) for name in os.listdir(path))  # our own
    left_out = found.left_out | {HIDDEN: found.left_out.get(HIDDEN, 0) - indexes}
    return found.files, {reason: count for reason, count in left_out.items() if count > 0}


def _train_shards(path: str, train: str) -> list[str]:
    try:
        return _find_shards(path, train)[0]
    except InputError:  # to evaluate, the one split is enough
        return []


def _load_index(
    shards: list[str], path: str, folder: str, split: str, parts: Parts, skip: bool
) -> tuple[Table, list[int]]:
    """(columns of all images, sizes of the shards): read, or made."""
    stamps = [(os.path.abspath(shard), *_stamp(shard)) for shard in shards]
    sizes = [size for _, size, _ in stamps]
    # Beside the shards one file per split; in a folder for many datasets, one per dataset as well.
    key = hashlib.sha256(
        os.path.abspath(os.path.dirname(shards[0])).encode("utf-8", "surrogateescape")
    ).hexdigest()[:12]
    table = load_or_make(
        f"{_INDEX}{split}_{key}.npz",
        folder,
        beside=path,
        stamp=json.dumps([_FORMAT, parts, skip, stamps]),
        make=lambda: _make_index(shards, split, parts, skip),
        fits=lambda table: _fits(table, np.array(sizes)),
    )
    return table, sizes


def _stamp(shard: str) -> tuple[int, int]:
    try:
        status = os.stat(shard)
    except OSError as error:
        raise InputError(f"cannot read {shard}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"cannot read {shard}: it is no regular file")
    return status.st_size, status.st_mtime_ns


def _fits(table: Table, sizes: np.ndarray) -> bool:
    """Whether an index that was found can be one of shards of these sizes."""
    if {name: column.dtype for name, column in table.items()} != {
        name: np.dtype(kind) for name, kind in _COLUMNS.items()
    } or any(column.ndim != 1 for column in table.values()):
        return False
    rows = [table[name] for name in ("shard", "offset", "size", "label", "name_end")]
    shard, offset, size, label, name_end = rows
    if not len(shard) or {len(column) for column in rows} != {len(shard)}:
        return False
    return bool(
        (shard >= 0).all()
        and (shard < len(sizes)).all()
        and (offset >= 0).all()
        and (size >= 0).all()
        and (offset + size <= sizes[shard]).all()
        and (label >= 0).all()
        and (np.diff(name_end, prepend=0) >= 0).all()
        and name_end[-1] == len(table["name_bytes"])
    )


def _make_index(shards: list[str], split: str, parts: Parts, skip: bool) -> Table:
    rows: list[tuple[int, int, int, int]] = []
    names: list[bytes] = []
    left_out = collections.Counter[str]()
    with tqdm.tqdm(
        shards, desc=f"indexing {split} shards", unit="", file=sys.stderr, leave=False
    ) as bar:
        for number, shard in enumerate(bar):
            scan = Scan(shard, parts, skip)
            for member, label in scan.samples():
                rows.append((number, member.offset, member.size, label))
                names.append(member.name.encode("utf-8", "replace"))
            left_out += scan.left_out
    if not rows:
        seen = ", ".join(f"{count} {what}" for what, count in left_out.items())
        raise InputError(
            f"there are no images in {shards[0]} and the other shards of {split!r}"
            + (f"; left out: {seen}" if seen else "")
            + f". Expected members with endings {', '.join(IMAGE_SUFFIXES)}; another one: "
            "--config.dataset.image_column=ENDING"
        )
    shard, offset, size, label = np.array(rows, np.int64).T
    columns = {
        "shard": shard,
        "offset": offset,
        "size": size,
        "label": label,
        "name_end": np.cumsum([len(name) for name in names]),
        "name_bytes": np.frombuffer(b"".join(names), np.uint8),
        "left_out": np.frombuffer(json.dumps(left_out).encode(), np.uint8),
    }
    return {name: column.astype(_COLUMNS[name]) for name, column in columns.items()}
