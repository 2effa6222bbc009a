"""Sources of images: random access by index, one small interface.

`base.py` says what a source is; each kind of storage has a file.
"""

import os
from collections.abc import Callable, Sequence

from hybrid_flax.data.sources.base import (
    Encoded,
    EncodedSource,
    Source,
    describe_files,
)
from hybrid_flax.data.sources.digits import Digits
from hybrid_flax.data.sources.files import ImageFolder, ListFiles
from hybrid_flax.data.sources.memory import InMemory
from hybrid_flax.data.sources.part import Subset, numbered_by, part_of, split_name
from hybrid_flax.data.sources.tables import HuggingFace
from hybrid_flax.data.sources.tars import TarShards
from hybrid_flax.data.sources.tfds import TfdsSource
from hybrid_flax.errors import InputError
from hybrid_flax.settings import Dataset

__all__ = [
    "Encoded",
    "EncodedSource",
    "Source",
    "Subset",
    "describe_files",
    "open_source",
    "source_of",
]


def open_source(
    name: str,
    path: str,
    split: str,
    *,
    train_split: str = "train",
    val_split: str = "val",
    index: str = "",
    cache: bool = False,
    image_column: str = "",
    label_column: str = "",
    skip_damaged: bool = False,
    classes: Sequence[str] | None = None,
) -> EncodedSource:
    """Opens one split of a dataset.

    Args:
      name: "digits" (bundled with scikit-learn), "image_folder", "list_files", "tar_shards",
        "hugging_face", or a TFDS dataset.
      path: folder of the images, or TFDS's data folder ("" for its default).
      split: "train" or "val".
      train_split: what the data calls it; a part of it as `train[:90%]`, see `part.py`.
      val_split: likewise.
      index: folder for the index of tar files, "" for beside them.
      cache: read every file once, now, and keep the bytes in memory that all processes share.
      image_column: what tar shards, tables or TFDS call the images, "" for the usual names.
      label_column: likewise the class numbers.
      skip_damaged: use what is whole in damaged tar shards, and count what is lost.
      classes: names that number the classes, those a model was trained with; None: the data's own
        number them. Data without names keeps its numbers.

    Raises:
      InputError: the dataset is unknown, not prepared, empty or inconsistent, or has images of
        classes that `classes` has not.
    """
    path = os.path.expanduser(path)  # which a shell does not do behind an equals sign
    wanted = val_split if split == "val" else train_split
    columns = {"image_column": image_column, "label_column": label_column}
    tars = {"index": index, "skip_damaged": skip_damaged}
    if name in _WITHOUT_COLUMNS and any(columns.values()):
        raise InputError(
            f"--config.dataset.image_column={image_column}, label_column={label_column}: dataset "
            f"{name} has no columns; leave them empty"
        )
    if name in _OURS:
        base, part = split_name(wanted)
        train, _ = split_name(train_split)
        if classes is not None and name == "image_folder":
            train = base  # not the training folders, but `classes` will number these
        source = _OURS[name](path, base, train, columns, tars)
        if part:
            source = part_of(source, part, wanted)
    else:
        source = TfdsSource(name, path, wanted, **columns)
    source = numbered_by(source, classes)
    return InMemory(source) if cache else source


_OURS: dict[str, Callable[[str, str, str, dict, dict], EncodedSource]] = {
    "digits": lambda path, split, train, columns, tars: Digits(split),
    "image_folder": lambda path, split, train, columns, tars: ImageFolder(path, split, train),
    "list_files": lambda path, split, train, columns, tars: ListFiles(path, split, train),
    "tar_shards": lambda path, split, train, columns, tars: TarShards(
        path, split, train=train, **columns, **tars
    ),
    "hugging_face": lambda path, split, train, columns, tars: HuggingFace(path, split, **columns),
}
_WITHOUT_COLUMNS = ("digits", "image_folder", "list_files")


def source_of(dataset: Dataset, split: str, classes: Sequence[str] | None = None) -> EncodedSource:
    """Opens the split, "train" or "val", that the settings name; `classes` as in `open_source`."""
    return open_source(
        dataset.name,
        dataset.path,
        split,
        train_split=dataset.train_split,
        val_split=dataset.val_split,
        index=dataset.index,
        cache=dataset.cache,
        image_column=dataset.image_column,
        label_column=dataset.label_column,
        skip_damaged=dataset.on_unreadable == "skip",
        classes=classes,
    )
