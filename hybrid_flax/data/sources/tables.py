"""Parquet and Arrow files as Hugging Face datasets are stored in."""

import base64
import collections
import contextlib
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import tqdm

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources.base import Encoded, LabelledSource, check_labels, digest
from hybrid_flax.data.sources.descriptors import DESCRIPTORS, FILES_AT_ONCE
from hybrid_flax.data.sources.labels import check_label_range, class_number
from hybrid_flax.data.sources.saved_sets import class_names, table_files
from hybrid_flax.data.sources.walk import name_below
from hybrid_flax.errors import InputError

_KEPT_ROW_GROUPS = 8  # of Parquet files, decoded, in each process


class HuggingFace(LabelledSource):
    """`data/train-00000-of-00005.parquet`, or the `.arrow` files of `Dataset.save_to_disk`.

    One column is an image, {bytes, path} or bytes, one, named label, labels or the like, its class
    number; `image_column` and `label_column` name others. Names and number of the classes come from
    the ClassLabel feature where there is one. Files that number the same names in another order are
    renumbered as the first; files that differ otherwise are refused.

    Arrow files are read at random: every image alone. Of a Parquet file a whole row group has to be
    read for one image, typically a hundred: fine for small sets, which `dataset.cache` then keeps,
    and slow for large ones in random order.
    """

    def __init__(self, path: str, split: str, *, image_column: str = "", label_column: str = ""):
        self._path = path
        self._files, self.left_out = table_files(path, split)
        if len({os.path.splitext(file)[1].lower() for file in self._files}) > 1:
            raise InputError(f"{path} has both .parquet and .arrow files for {split!r}; keep one")
        self.found_in = f"{len(self._files):,} tables of {path}"
        tables = _scan(self._files, image_column, label_column)
        self._image = tables[0].image
        self.class_names = _common_names(tables)
        self.labels = np.concatenate([_numbers(table, self.class_names) for table in tables])
        if not len(self.labels):
            raise InputError(f"the split {split!r} of {path} has no rows")
        _check_images(tables)
        # (file, group in it, first row of the group in the file), and where each starts in all.
        self._groups = [
            (number, group, sum(table.groups[:group]))
            for number, table in enumerate(tables)
            for group in range(len(table.groups))
        ]
        self._starts = np.cumsum([0, *(rows for table in tables for rows in table.groups)])
        self._firsts = np.cumsum([0, *(sum(table.groups) for table in tables)])  # of each file
        self._places = [table.places for table in tables]  # where images lie, in Arrow files
        self._sizes = [table.bytes for table in tables]
        where = f"{path}, split {split!r}"
        if self.class_names is None:
            check_labels(self.labels, int(self.labels.max()) + 1, where)
            check_label_range(self.labels, self.name, where)
        self.num_classes = len(self.class_names or ()) or int(self.labels.max()) + 1
        check_labels(self.labels, self.num_classes, where)
        self._reset()

    def _reset(self):
        self._opened = collections.OrderedDict()  # files whose groups are read
        self._kept = collections.OrderedDict()  # row groups of Parquet files
        self._lock = threading.Lock()  # Grain may read in threads

    def __getstate__(self):
        opened = ("_opened", "_kept", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset()

    def identity(self) -> str:
        """Says by 16 hex digits which files, of which sizes, these are."""
        names = [name_below(self._path, file) for file in self._files]
        return digest([*names, *map(str, self._sizes), self._starts.tobytes()])

    def _locate(self, index: int) -> tuple[int, int, int, str]:
        """(file, group in it, row of the group, name)"""
        position = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, group, first = self._groups[position]
        row = index - int(self._starts[position])
        return file, group, row, f"{self._files[file]}, row {first + row}"

    def name(self, index: int) -> str:
        return self._locate(index)[-1]

    def read(self, index: int) -> Encoded:
        file, group, row, name = self._locate(index)
        try:
            if self._places[file] is not None:
                data = self._at_its_place(file, index)
            else:
                with self._lock:
                    data = self._in_its_group(file, group, row)
        except InputError:
            raise
        except Exception as error:  # pyarrow raises OSError, ValueError, IndexError, MemoryError, …
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise InputError(f"cannot open a file of {self._path}: {error}") from error
            raise UnreadableImageError(f"cannot read image {name}: {error}") from error
        if data is None:
            raise UnreadableImageError(f"cannot read image {name}: its bytes are not in the file")
        return Encoded(data, int(self.labels[index]), name)

    def _at_its_place(self, file: int, index: int) -> bytes | None:
        begins, sizes = self._places[file]
        row = index - int(self._firsts[file])
        begin, size = int(begins[row]), int(sizes[row])
        if size < 0:
            return None
        return DESCRIPTORS.read(self._files[file], begin, size, self._sizes[file])

    def _in_its_group(self, file: int, group: int, row: int) -> bytes | None:
        from hybrid_flax.data.sources.table_scan import image_bytes

        if (file, group) not in self._kept:
            self._kept[file, group] = self._open(file).column(group, self._image)
            if len(self._kept) > _KEPT_ROW_GROUPS:
                self._kept.popitem(last=False)
        self._kept.move_to_end((file, group))
        return image_bytes(self._kept[file, group][row].as_py())

    def _open(self, file: int) -> "_Parquet | _Arrow":
        if file not in self._opened:
            if len(self._opened) >= FILES_AT_ONCE:
                self._opened.popitem(last=False)[1].close()
            path = self._files[file]
            kind = _Parquet if path.lower().endswith(".parquet") else _Arrow
            self._opened[file] = kind(path)
        self._opened.move_to_end(file)
        return self._opened[file]


class _Parquet:
    """Reads one column of one row group."""

    def __init__(self, path: str):
        from hybrid_flax.data.sources.table_scan import open_parquet

        self._file = open_parquet(path)

    def column(self, group: int, name: str):
        table = self._file.read_row_group(group, columns=[name])
        table.validate(full=True)
        return table.column(0).combine_chunks()

    def close(self):
        self._file.close()


class _Arrow:
    """Reads, as `_Parquet`, the record batches of an Arrow file whose images are compressed."""

    def __init__(self, path: str):
        import pyarrow as pa

        from hybrid_flax.data.sources.table_scan import open_arrow

        with pa.OSFile(path) as file:  # read, not mapped: it may be cut while it is used
            _, self._batches = open_arrow(file)

    def column(self, group: int, name: str):
        return self._batches[group].column(name)

    def close(self):
        self._batches = []


class _Table(NamedTuple):
    """What is known of one file."""

    path: str
    bytes: int
    image: str  # column
    label: str  # column
    groups: list[int]  # rows of each
    labels: np.ndarray  # as stored; -1 where there is none
    names: list[str] | None  # of the classes
    places: tuple[np.ndarray, np.ndarray] | None  # of the images in the file, and sizes, -1: none
    looked_at: int  # rows whose images were looked at
    missing: int  # of these, without an image


def _scan(files: list[str], image: str, label: str) -> list[_Table]:
    bar = tqdm.tqdm(files, desc="looking through", file=sys.stderr, leave=False)
    with bar, contextlib.closing(_look_through(files, image, label)) as found:
        return [_table(file, next(found)) for file in bar]


def _look_through(
    files: list[str], image: str, label: str
) -> Generator[dict[str, Any], None, None]:
    """What `table_scan.scan` says of each file, in another process, which a damaged one may end."""
    program = [sys.executable, "-P", str(pathlib.Path(__file__).with_name("table_scan.py"))]
    request = {"files": files, "image": image, "label": label}
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # then it says why, below
                child.stdin.write(json.dumps(request).encode())
                child.stdin.close()
            for file in files:
                line = child.stdout.readline()
                if not line.endswith(b"\n"):
                    status = child.wait()
                    said.seek(0)
                    raise InputError(_ended(file, status, said.read()))
                yield json.loads(line)
        finally:
            child.kill()
            child.stdout.close()
            child.wait()


def _ended(file: str, status: int, said: bytes) -> str:
    if status < 0:
        return (
            f"cannot read {file}: pyarrow ended at it ({signal.strsignal(-status)}): the file is "
            "damaged. Get it anew"
        )
    last = said.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return f"cannot read {file}: the process that looks through it ended with {status}: {last}"


def _table(path: str, found: dict[str, Any]) -> _Table:
    if "error" in found:
        raise InputError(found["error"])
    if "integers" in found:
        labels = _unpacked(found["integers"])
    else:
        where = f"{path}, column {found['label']}"
        numbers = [class_number(value, where) for value in found["values"]]
        labels = np.array([*numbers, -1], np.int64)[_unpacked(found["codes"])]
    places = found.get("places")
    return _Table(
        path=path,
        bytes=found["bytes"],
        image=found["image"],
        label=found["label"],
        groups=found["groups"],
        labels=labels,
        names=class_names(path, found["label"], found["metadata"]),
        places=places and (_unpacked(places[0]), _unpacked(places[1])),
        looked_at=found["looked_at"],
        missing=found["missing"],
    )


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.int64)


def _common_names(tables: list[_Table]) -> list[str] | None:
    """Class names of the first file. Raises InputError if the others have not the same columns."""
    first = tables[0]
    for other in tables[1:]:
        differences = [
            f"{what} {_shown(a)} and {_shown(b)}"
            for what, a, b in (
                ("image column", first.image, other.image),
                ("label column", first.label, other.label),
                ("class names", first.names, other.names),
            )
            if a != b and (not isinstance(a, list) or set(a) != set(b or ()))
        ]
        if differences:
            raise InputError(
                f"{first.path} and {other.path} are not of one dataset: {'; '.join(differences)}. "
                "Choose one subset, its folder: --config.dataset.path="
            )
    return first.names


def _shown(value: str | list[str] | None) -> str:
    if not isinstance(value, list):
        return str(value)
    return f"{', '.join(value[:5])}{', …' if value[5:] else ''} ({len(value)})"


def _numbers(table: _Table, names: list[str] | None) -> np.ndarray:
    """The labels of a file as the first file numbers the classes."""
    if table.names is None or names is None:
        return table.labels
    check_labels(table.labels, len(table.names), table.path)
    if table.names == names:
        return table.labels
    return np.array([names.index(name) for name in table.names], np.int64)[table.labels]


def _check_images(tables: list[_Table]) -> None:
    looked_at = sum(table.looked_at for table in tables)
    if looked_at and looked_at == sum(table.missing for table in tables):
        raise InputError(
            f"{tables[0].path}: column {tables[0].image} has no images, only paths to them or "
            "nothing. Write the dataset with its images inside (datasets: "
            "cast_column(..., Image()), then save_to_disk or push_to_hub, which embed them)"
        )
