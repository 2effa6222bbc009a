"""Parquet and Arrow files as Hugging Face datasets are stored in."""

import collections
import json
import os
import threading

import numpy as np

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources.base import Encoded, LabelledSource, check_labels
from hybrid_flax.data.sources.shards import find_shards
from hybrid_flax.errors import InputError

_LABEL_COLUMNS = ("label", "labels", "fine_label")
_KEPT_ROW_GROUPS = 8  # of Parquet files, decoded, in each process


class HuggingFace(LabelledSource):
    """`data/train-00000-of-00005.parquet`, or the `.arrow` files of `Dataset.save_to_disk`.

    One column is an image ({bytes, path}), one, named label, labels or fine_label, its class
    number; names and number of the classes come from the ClassLabel feature where there is one.

    Arrow files are mapped into memory: every image is read alone. Of a Parquet file a whole row
    group has to be read for one image, typically a hundred: fine for small sets, which
    `dataset.cache` then keeps, and slow for large ones in random order.
    """

    def __init__(self, path: str, split: str):
        self._files = find_shards("hugging_face", path, split, (".parquet", ".arrow"))
        if len({os.path.splitext(file)[1] for file in self._files}) > 1:
            raise InputError(f"{path} has both .parquet and .arrow files for {split!r}; keep one")
        self._reset()
        tables = [self._table(number) for number in range(len(self._files))]
        self._image = _image_column(tables[0].schema, self._files[0])
        label = _label_column(tables[0].schema, self._files[0])
        self.labels = np.concatenate([_integers(table, label) for table in tables])
        if not len(self.labels):
            raise InputError(f"the split {split!r} of {path} has no rows")
        # (file, group in it, first row of the group in the file), and where each starts in all.
        self._groups = [
            (number, group, sum(table.groups[:group]))
            for number, table in enumerate(tables)
            for group in range(len(table.groups))
        ]
        self._starts = np.cumsum([0, *(rows for table in tables for rows in table.groups)])
        self.class_names = _class_names(tables[0].schema, self._files[0], label)
        self.num_classes = len(self.class_names or ()) or int(self.labels.max()) + 1
        check_labels(self.labels, self.num_classes, f"{path}, split {split!r}")

    def _reset(self):
        self._tables = {}
        self._kept = collections.OrderedDict()  # row groups of Parquet files
        self._lock = threading.Lock()  # Grain may read in threads

    def __getstate__(self):
        opened = ("_tables", "_kept", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset()

    def read(self, index: int) -> Encoded:
        position = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, group, first = self._groups[position]
        row = index - int(self._starts[position])
        name = f"{self._files[file]}, row {first + row}"
        try:
            with self._lock:
                image = self._images(file, group)[row].as_py() or {}
        except (OSError, ValueError) as error:  # pyarrow's errors are one or the other
            raise UnreadableImageError(f"cannot read image {name}: {error}") from error
        if image.get("bytes") is None:
            raise UnreadableImageError(
                f"cannot read image {name}: its bytes are not in the file"
                + (f", only its path {image['path']}" if image.get("path") else "")
            )
        return Encoded(image["bytes"], int(self.labels[index]), name)

    def _table(self, file: int) -> "_Parquet | _Arrow":
        if file not in self._tables:
            path = self._files[file]
            self._tables[file] = (_Parquet if path.endswith(".parquet") else _Arrow)(path)
        return self._tables[file]

    def _images(self, file: int, group: int):
        if (file, group) not in self._kept:
            self._kept[file, group] = self._table(file).column(group, self._image)
            if len(self._kept) > _KEPT_ROW_GROUPS:
                self._kept.popitem(last=False)
        self._kept.move_to_end((file, group))
        return self._kept[file, group]


class _Parquet:
    """`groups`: rows of each row group; `column` reads one column of one of them."""

    def __init__(self, path: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"cannot read {path} as a Parquet file: {error}") from error
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]

    def column(self, group: int, name: str):
        column = self._file.read_row_group(group, columns=[name]).column(0)
        return column.combine_chunks()


class _Arrow:
    """Reads, as `_Parquet`, the record batches of an Arrow file, mapped into memory."""

    def __init__(self, path: str):
        import pyarrow as pa

        mapped = pa.memory_map(path)
        try:
            batches = pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:  # the other of Arrow's two formats
            try:
                batches = pa.ipc.open_file(mapped).read_all()
            except (OSError, pa.ArrowInvalid) as error:
                raise InputError(f"cannot read {path} as an Arrow file: {error}") from error
        self.schema = batches.schema
        self._batches = batches.to_batches()
        self.groups = [batch.num_rows for batch in self._batches]

    def column(self, group: int, name: str):
        return self._batches[group].column(name)


def _image_column(schema, file: str) -> str:
    import pyarrow as pa

    found = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type)
        and {"bytes", "path"} <= {inner.name for inner in field.type}
    ]
    if len(found) != 1:
        raise InputError(
            f"{file}: expected one image column, a struct of bytes and path; found "
            f"{', '.join(found) or 'none'} among the columns {', '.join(schema.names)}"
        )
    return found[0]


def _label_column(schema, file: str) -> str:
    import pyarrow as pa

    for name in _LABEL_COLUMNS:
        if name in schema.names:
            if not pa.types.is_integer(schema.field(name).type):
                raise InputError(
                    f"{file}: column {name} holds {schema.field(name).type}; expected class "
                    "numbers (cast it to a ClassLabel)"
                )
            return name
    raise InputError(
        f"{file}: no column is named {' or '.join(_LABEL_COLUMNS)}, only {', '.join(schema.names)}"
    )


def _integers(table: "_Parquet | _Arrow", column: str) -> np.ndarray:
    parts = [table.column(group, column).fill_null(-1) for group in range(len(table.groups))]
    return np.concatenate([np.zeros(0, np.int64), *map(np.asarray, parts)]).astype(np.int64)


def _class_names(schema, file: str, label: str) -> list[str] | None:
    """Finds the ClassLabel feature, which stands in the schema or in a file beside the data."""
    beside = os.path.join(os.path.dirname(file), "dataset_info.json")
    if b"huggingface" in (schema.metadata or {}):
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    elif os.path.exists(beside):
        with open(beside) as stream:
            features = json.load(stream).get("features") or {}
    else:
        return None
    return features.get(label, {}).get("names")
