"""What Hugging Face's library writes beside its tables: which files belong, and class names."""

import collections
import os
from typing import Any

from hybrid_flax.data.sources.base import some
from hybrid_flax.data.sources.shards import find_split
from hybrid_flax.data.sources.splits import find_name
from hybrid_flax.data.sources.walk import name_below
from hybrid_flax.errors import InputError
from hybrid_flax.text_files import parse_json, read_json

_ENDINGS = (".parquet", ".arrow")


def table_files(path: str, split: str) -> tuple[list[str], dict[str, int]]:
    """Finds the tables of a split: (files, what is left out, how often).

    Where `save_to_disk` wrote a `state.json`, only the files that it names are data, and where it
    wrote a `dataset_dict.json`, only the splits that it names. Where it saved one split alone, the
    `state.json` says which.

    Raises InputError if there are none, or one that is named is missing.
    """
    splits = _splits(path)
    if splits is None and os.path.exists(os.path.join(path, "state.json")):
        return _only_split(path, split), {}
    found = find_split("hugging_face", path, split, _ENDINGS)
    left_out = collections.Counter(found.reasons(path))
    files = found.files
    if splits is not None:
        files = [file for file in files if name_below(path, file).split(os.sep)[0] in splits]
        left_out["tables of splits that dataset_dict.json lacks"] = len(found.files) - len(files)
    if not files:
        raise InputError(
            f"{os.path.join(path, 'dataset_dict.json')} names the splits {some(splits or ())}, and "
            f"none serves as {split!r}. Another name: --config.dataset.{split}_split=NAME"
        )
    named = []
    for folder in sorted({os.path.dirname(file) for file in files}):
        named += _named(folder) or [file for file in files if os.path.dirname(file) == folder]
    left_out["tables that state.json does not name"] = len(set(files) - set(named))
    return named, dict(+left_out)


def _only_split(path: str, split: str) -> list[str]:
    """The files of a dataset that was saved alone, if it is this split."""
    said = _state(path).get("_split")
    if not isinstance(said, str) or find_name(split, [said], path) is None:
        raise InputError(
            f"{path} is one saved dataset, of the split {_short(said)}, not {split!r}. Save a "
            "DatasetDict with train and validation; or name parts of this one: "
            f"--config.dataset.train_split='{said}[:90%]' --config.dataset.val_split='{said}[90%:]'"
        )
    return _named(path)


def _splits(path: str) -> list[str] | None:
    """The folders that a `DatasetDict` consists of."""
    file = os.path.join(path, "dataset_dict.json")
    if not os.path.exists(file):
        return None
    splits = _of_type(read_json(file), dict, file).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise InputError(f'{file}: "splits" is {_short(splits)}; expected a list of names')
    return splits


def _state(folder: str) -> dict[str, Any]:
    file = os.path.join(folder, "state.json")
    return _of_type(read_json(file), dict, file)


def _named(folder: str) -> list[str]:
    """The files that a `state.json` names; none where there is no such file."""
    file = os.path.join(folder, "state.json")
    if not os.path.exists(file):
        return []
    entries = _state(folder).get("_data_files")
    files = []
    for entry in entries if isinstance(entries, list) and entries else [None]:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name or os.path.basename(name) != name:
            raise InputError(
                f'{file}: "_data_files" is {_short(entries)}; expected a list of '
                '{"filename": NAME}'
            )
        files.append(os.path.join(folder, name))
        if not os.path.isfile(files[-1]):
            raise InputError(f"{file} names {name}, which is not there: get the dataset anew")
    return files


def class_names(table: str, label: str, metadata: str | None) -> list[str] | None:
    """Finds the names of the ClassLabel feature, in a table's metadata or in a file beside it.

    Args:
      metadata: what the table's schema holds for "huggingface", one character per byte.

    Raises InputError, naming the file, if what stands there is not what the library writes.
    """
    beside = os.path.join(os.path.dirname(table), "dataset_info.json")
    if metadata is not None:
        where = f"{table}, metadata huggingface"
        content = parse_json(metadata.encode("latin-1"), where)
        info = _of_type(content, dict, where).get("info")
        if info is None:
            return None
        features = _of_type(info, dict, f"{where}, info").get("features")
    elif os.path.exists(beside):
        where = beside
        features = _of_type(read_json(beside), dict, where).get("features")
    else:
        return None
    if features is None:
        return None
    feature = _of_type(features, dict, f"{where}, features").get(label)
    if not isinstance(feature, dict) or feature.get("names") is None:
        return None  # numbers without names
    names = feature["names"]
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) for name in names)
        or len(set(names)) < len(names)
    ):
        raise InputError(
            f"{where}: the names of {label} are {_short(names)}; expected a list of different texts"
        )
    return names


def _of_type(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise InputError(f"{where} is {_short(value)}; expected a JSON object")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text[:77] + "…" if text[78:] else text
