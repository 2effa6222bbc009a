"""Looks through Parquet and Arrow files once, in a process of its own.

pyarrow believes what a file says of itself: one with flipped bits can end the process that reads
it. So this file is a program that imports nothing of ours: it reads a request from its standard
input, and writes one line of JSON for each file. `tables.py` starts it and judges what it says.
"""

import base64
import json
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_IMAGE_NAMES = ("image", "img", "photo", "picture", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target", "category")
_MOST_VALUES = 100_000  # different labels that are no integers
_SMALL = 64 << 20  # bytes of a Parquet file of which all images are looked at
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


class Unfit(Exception):
    """Says why a file cannot be used."""


def open_parquet(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(path, page_checksum_verification=True)


def open_arrow(source) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """The schema and record batches of an Arrow file, in either of Arrow's two formats."""
    try:
        stream = pa.ipc.open_stream(source)
        return stream.schema, list(stream)
    except (OSError, pa.ArrowInvalid) as error:
        try:
            source.seek(0)
            file = pa.ipc.open_file(source)
            return file.schema, [file.get_batch(n) for n in range(file.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as other:
            raise (error if "not an Arrow file" in str(other) else other) from None


def image_bytes(value) -> bytes | None:
    """The bytes of an image as a column of it holds them: alone, in a struct, in a list of one."""
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    return value.get("bytes") if isinstance(value, dict) else value


def scan(path: str, image: str, label: str) -> dict:
    """What `tables.py` has to know of a file; `image` and `label` are names of columns, or ""."""
    parquet = path.lower().endswith(".parquet")
    try:
        size = os.path.getsize(path)
        found = (_parquet if parquet else _arrow)(path, size, image, label)
    except Unfit as error:
        return {"error": f"{path}: {error}"}
    except Exception as error:  # pyarrow's, UnicodeDecodeError, MemoryError, …
        kind = "a Parquet" if parquet else "an Arrow"
        text = " ".join(str(error).split())[:300]
        return {"error": f"cannot read {path} as {kind} file: {text or type(error).__name__}"}
    return found | {"bytes": size}


def _parquet(path: str, size: int, image: str, label: str) -> dict:
    with open_parquet(path) as file:
        found = _described(file.schema_arrow, image, label)
        metadata = file.metadata
        rows = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        _check_rows(rows, size)
        labels = file.read(columns=[found["label"]])
        labels.validate(full=True)
        looked_at = missing = 0
        for group in range(len(rows)) if size <= _SMALL else range(1):
            images = file.read_row_group(group, columns=[found["image"]])
            images.validate(full=True)
            if len(images) != rows[group]:
                raise Unfit(f"row group {group} is to have {rows[group]} rows, has {len(images)}")
            looked_at += len(images)
            missing += _missing(images.column(0).combine_chunks())
    if len(labels) != sum(rows):
        raise Unfit(f"it is to have {sum(rows)} rows, and has {len(labels)}")
    return found | _labels(labels.column(0), found["label"]) | {
        "groups": rows, "looked_at": looked_at, "missing": missing,
    }  # fmt: skip


def _arrow(path: str, size: int, image: str, label: str) -> dict:
    with pa.memory_map(path) as mapped:
        whole = mapped.read_buffer()
    schema, batches = open_arrow(pa.BufferReader(whole))
    head, tail = whole[:4].to_pybytes(), whole[-8:].to_pybytes()
    if head == _STREAM_END[:4] and tail != _STREAM_END:
        raise Unfit("it is cut off: it does not end as an Arrow stream ends")
    found = _described(schema, image, label)
    if not batches:
        return found | _empty()
    rows = [len(batch) for batch in batches]
    _check_rows(rows, size)
    table = pa.Table.from_batches([batch.select([found["image"], found["label"]])
                                   for batch in batches])  # fmt: skip
    table.validate(full=True)
    places = [_places(batch.column(found["image"]), whole) for batch in batches]
    if all(place is not None for place in places):
        found["places"] = [_packed(np.concatenate(part)) for part in zip(*places, strict=True)]
    missing = sum(_missing(batch.column(found["image"])) for batch in batches)
    return found | _labels(table.column(found["label"]), found["label"]) | {
        "groups": rows, "looked_at": sum(rows), "missing": missing,
    }  # fmt: skip


def _empty() -> dict:
    return {"integers": _packed(np.zeros(0, np.int64)), "groups": [], "looked_at": 0, "missing": 0}


def _check_rows(rows: list[int], size: int) -> None:
    if sum(rows) > size or min(rows, default=0) < 0:
        raise Unfit(f"it is to have {sum(rows)} rows in {size} bytes: it is damaged")


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, np.int64).tobytes()).decode()


# Columns


def _described(schema: pa.Schema, image: str, label: str) -> dict:
    metadata = (schema.metadata or {}).get(b"huggingface")
    image, label = _image_column(schema, image), _label_column(schema, label)
    return {
        "image": image,
        "label": label,
        "types": [str(schema.field(image).type), str(schema.field(label).type)],
        "metadata": None if metadata is None else metadata.decode("latin-1"),
    }


def _columns(schema: pa.Schema) -> str:
    names = [f"{field.name} ({str(field.type)[:60]})" for field in schema]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")


def _inner(kind: pa.DataType) -> pa.DataType:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return kind.value_type if is_list else kind


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(
        field.name == "bytes" and _is_binary(field.type) for field in kind
    )


def _image_column(schema: pa.Schema, wanted: str) -> str:
    def is_image(kind):
        return _is_struct(_inner(kind)) or _is_binary(_inner(kind))

    if wanted:
        if schema.get_field_index(wanted) < 0:
            raise Unfit(f"no column is named {wanted} (image_column), only {_columns(schema)}")
        if not is_image(schema.field(wanted).type):
            raise Unfit(
                f"column {wanted} holds {str(schema.field(wanted).type)[:80]}; expected images as "
                "bytes, or as structs of bytes and path"
            )
        return wanted
    structs = [field.name for field in schema if _is_struct(_inner(field.type))]
    found = structs or [field.name for field in schema if is_image(field.type)]
    named = [name for name in _IMAGE_NAMES if name in found]
    if len(found) != 1 and not named:
        raise Unfit(
            "expected one image column, of bytes or a struct of bytes and path; found "
            f"{', '.join(found) or 'none'} among the columns {_columns(schema)}. Choose one: "
            "--config.dataset.image_column=NAME"
        )
    return found[0] if len(found) == 1 else named[0]


def _label_column(schema: pa.Schema, wanted: str) -> str:
    names = (wanted,) if wanted else _LABEL_NAMES
    found = next((name for name in names if schema.get_field_index(name) >= 0), None)
    if found is None:
        raise Unfit(
            f"no column is named {' or '.join(names)}, only {_columns(schema)}. Choose the class "
            "numbers': --config.dataset.label_column=NAME"
        )
    kind = schema.field(found).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (
        pa.types.is_integer(inner)
        or pa.types.is_floating(inner)
        or pa.types.is_string(inner)
        or pa.types.is_large_string(inner)
    ):
        raise Unfit(
            f"column {found} holds {str(kind)[:80]}; expected class numbers (cast it to a "
            "ClassLabel), or another column: --config.dataset.label_column=NAME"
        )
    return found


def _labels(column: pa.ChunkedArray, name: str) -> dict:
    """The labels as integers, -1 where there is none; or their values, and which each is."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    if pa.types.is_integer(column.type):
        return {"integers": _packed(np.asarray(column.cast(pa.int64()).fill_null(-1)))}
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0) if encoded.num_chunks else pa.array([]).dictionary_encode()
    values = encoded.dictionary.to_pylist()
    if len(values) > _MOST_VALUES:
        raise Unfit(f"column {name} has {len(values)} different values, such as {values[0]!r:.60}")
    return {"values": values, "codes": _packed(np.asarray(encoded.indices.fill_null(-1)))}


# Images


def _bytes_column(column):
    """The array of bytes in one of images, where each image has one; else None."""
    if pa.types.is_struct(column.type):
        column = column.field("bytes")
    return column if _is_binary(column.type) else None


def _places(column, whole: pa.Buffer) -> tuple[np.ndarray, np.ndarray] | None:
    """Where in the file each image begins, and its size, -1: none. None if not so stored."""
    inner = _bytes_column(column)
    if inner is None:
        return None
    _, offsets, data = inner.buffers()
    if not len(inner):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    kind = np.int64 if pa.types.is_large_binary(inner.type) else np.int32
    ends = np.frombuffer(offsets, kind)[inner.offset : inner.offset + len(inner) + 1]
    ends = ends.astype(np.int64)
    begin = data.address - whole.address if ends[-1] else 0
    if begin < 0 or begin + int(ends[-1]) > whole.size:  # compressed buffers lie elsewhere
        return None
    absent = np.asarray(column.is_null()) | np.asarray(inner.is_null())
    return begin + ends[:-1], np.where(absent, -1, np.diff(ends))


def _missing(column) -> int:
    inner = _bytes_column(column)
    if inner is None:
        return sum(image_bytes(value) is None for value in column.to_pylist())
    return int((np.asarray(column.is_null()) | np.asarray(inner.is_null())).sum())


def main() -> None:
    request = json.load(sys.stdin)
    for path in request["files"]:
        print(json.dumps(scan(path, request["image"], request["label"])), flush=True)


if __name__ == "__main__":
    main()
