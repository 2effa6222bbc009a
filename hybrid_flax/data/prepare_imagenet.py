"""ImageNet-1k from its two tar files to the layout that TFDS reads, without TensorFlow.

python -m hybrid_flax.data.prepare_imagenet --train_tar=ILSVRC2012_img_train.tar \
    --val_tar=ILSVRC2012_img_val.tar --out=DIR

Writes DIR/imagenet2012/5.1.0 with 1,024 and 64 ArrayRecord files and TFDS's description of them, to
be read with --config.dataset.path=DIR. It takes as much space as the tar files, 154 GB. Stopped in
any way, the same command goes on after the last whole file. Labels of the validation images are
those that TFDS brings.

What differs from TFDS's own preparation: the order (a fixed random one here and there), and that
files stay as they are, where TFDS recodes 22 that are CMYK and one that is PNG; our loader and
TFDS's read both.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import tqdm

from hybrid_flax.data.sources import index_file
from hybrid_flax.data.sources.tar_members import compression, members
from hybrid_flax.data.sources.tfds import open_builder
from hybrid_flax.errors import InputError
from hybrid_flax.run.ending import ending
from hybrid_flax.settings.arguments import with_home
from hybrid_flax.text_files import check_local


class Split(NamedTuple):
    """The contents that a tar file has to have, and in how many files it is stored."""

    name: str
    images: int
    shards: int


SPLITS = (Split("train", 1_281_167, 1024), Split("validation", 50_000, 64))
_ORDER_SEED = 0


class _Images(NamedTuple):
    """The places of the images of a tar file, in their order in it."""

    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray  # class number
    name: np.ndarray  # bytes


def prepare(
    tars: dict[str, str], out: str, splits: tuple[Split, ...] = SPLITS, num_classes: int = 1000
) -> pathlib.Path:
    """Writes the splits for which there is a tar file; returns the folder.

    Args:
      tars: {"train": file, "validation": file}, or one of them.
      out: TFDS's data folder, `--config.dataset.path` of a run.
      splits: what is expected.
      num_classes: how many classes every split must have images of.

    Raises:
      InputError: a tar file is missing, damaged or incomplete, `out` cannot be written, has too
        little space, or holds files that were made from other tar files.
    """
    import tensorflow_datasets as tfds

    check_local(out, "--out")
    builder = open_builder("imagenet2012", out)
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    folder = pathlib.Path(os.fspath(builder.data_dir))
    unfinished = folder / "unfinished"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={out}: cannot be written: {error.strerror}") from error

    given = [split for split in splits if split.name in tars]
    found = {}
    for split in given:  # both are checked before anything is written
        images = _index(split, tars[split.name], unfinished, builder.info.features["label"])
        _check(split, images, tars[split.name], num_classes)
        found[split.name] = images
    _check_space(folder, sum(int(images.size.sum()) for images in found.values()))

    infos = dict(builder.info.splits)  # of another time, when the other tar file was given
    for split in given:
        with open(tars[split.name], "rb") as tar:
            infos[split.name] = _write(split, found[split.name], tar.fileno(), builder, folder)
    builder.info.set_splits(tfds.core.SplitDict(list(infos.values())))
    builder.info.write_to_directory(folder)  # last: what is not whole does not look prepared
    for split in given:
        (unfinished / f"{split.name}.npz").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # what somebody else put there stays
        unfinished.rmdir()
    return folder


def _index(split: Split, tar: str, folder: pathlib.Path, classes) -> _Images:
    """Reads through the tar file's heads, or what that gave the last time."""
    if not os.path.isfile(tar):
        raise InputError(f"there is no file {tar} ({split.name} images)")
    stamp = f"{os.path.getsize(tar)} {os.stat(tar).st_mtime_ns}"
    file = folder / f"{split.name}.npz"
    found = index_file.load(file, stamp)
    if found is not None and set(found) == set(_Images._fields):
        return _Images(**found)
    if file.exists() and any(folder.parent.glob(f"imagenet2012-{split.name}.*")):
        raise InputError(
            f"{folder.parent} has files from another {tar} than this. Give the same "
            "again, or delete the folder to begin anew"
        )
    progress = tqdm.tqdm(
        _members(tar, split.name), desc=f"looking through {split.name}", unit=" images",
        total=split.images, file=sys.stderr,
    )  # fmt: skip
    rows = sorted(progress, key=lambda row: row[0])  # by name
    if split.name == "train":
        labels = [wnid for _, wnid, *_ in rows]
    else:
        labels = _validation_labels()
    if not rows or len(rows) != split.images or len(labels) != len(rows):
        raise InputError(
            f"{tar} has {len(rows):,} images, expected {split.images:,}: is the download complete, "
            "and is it the right file?"
        )
    twice = [name for (name, *_), (after, *_) in itertools.pairwise(rows) if name == after]
    if twice:  # labels of validation images are told by the order of the names
        raise InputError(f"{tar} has {len(twice):,} images twice, such as {twice[0]}")
    unknown = sorted(set(labels) - set(classes.names))
    if unknown:
        raise InputError(f"{tar} has classes that ImageNet-1k has not: {', '.join(unknown[:5])}")
    images = _Images(
        np.array([offset for *_, offset, _ in rows], np.int64),
        np.array([size for *_, size in rows], np.int64),
        np.array([classes.str2int(label) for label in labels], np.int64),
        np.array([name.encode() for name, *_ in rows]),
    )
    try:
        index_file.save(file, stamp, images._asdict())
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from error
    return images


def _members(tar: str, split: str) -> Iterator[tuple[str, str, int, int]]:
    """(file name, class folder or "", offset in the tar file, size) of every image."""

    def damaged(place: int, reason: str):
        raise InputError(
            f"cannot read {tar}: it is damaged at byte {place}: {reason}. Is the download complete?"
        )

    def files(stream: BinaryIO, begin: int, end: int):
        for member in members(stream, begin, end, damaged, counted=True):
            if member.kind == "sparse":
                raise InputError(f"{tar}: {member.name} is stored as a sparse file (tar -S)")
            if member.kind == "file" and not os.path.basename(member.name).startswith("."):
                yield member

    try:
        with open(tar, "rb") as stream:
            if kind := compression(stream.read(8)):
                raise InputError(
                    f"cannot read {tar}: it is compressed ({kind}), which the original is not. "
                    "Unpack it to plain .tar"
                )
            for outer in files(stream, 0, os.path.getsize(tar)):
                if split != "train":
                    yield os.path.basename(outer.name), "", outer.offset, outer.size
                    continue
                # The training images lie in a tar file per class, inside the tar file.
                wnid = os.path.basename(outer.name).removesuffix(".tar")
                for image in files(stream, outer.offset, outer.offset + outer.size):
                    yield os.path.basename(image.name), wnid, image.offset, image.size
    except OSError as error:
        raise InputError(f"cannot read {tar}: {error.strerror}") from error


def _validation_labels() -> list[str]:
    """Class folder names of the validation images in the order of their names; in TFDS's files."""
    import tensorflow_datasets as tfds

    file = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    return file.read_text().split()


def _check(split: Split, images: _Images, tar: str, num_classes: int):
    classes = len(np.unique(images.label))
    if classes != num_classes:
        raise InputError(f"{tar} has images of {classes:,} classes, expected {num_classes:,}")


def _check_space(folder: pathlib.Path, needed: int):
    there = sum(file.stat().st_size for file in folder.glob("*.array_record-*"))
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise InputError(
            f"{folder} needs {(needed - there) / 1e9:.1f} GB more, and has {free / 1e9:.1f} GB "
            "free. Choose another --out"
        )


def _write(split: Split, images: _Images, tar: int, builder, folder: pathlib.Path):
    """Writes the files of a split that are not there yet; returns TFDS's description of it."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=builder.data_dir,
        dataset_name="imagenet2012",
        split=split.name,
        filetype_suffix="array_record",
    )
    order = np.random.RandomState(_ORDER_SEED).permutation(len(images.size))
    shards = np.array_split(order, split.shards)
    files = [
        pathlib.Path(os.fspath(path))
        for path in template.sharded_filepaths(num_shards=split.shards)
    ]
    with tqdm.tqdm(
        total=len(order), desc=f"writing {split.name}", unit=" images", file=sys.stderr
    ) as progress:
        for file, chosen in zip(files, shards, strict=True):
            if not file.exists():
                _write_shard(file, images, np.sort(chosen), tar, builder.info.features)
            progress.update(len(chosen))
    return tfds.core.SplitInfo(
        name=split.name,
        shard_lengths=[len(chosen) for chosen in shards],
        num_bytes=sum(file.stat().st_size for file in files),
        filename_template=template,
    )


def _write_shard(file: pathlib.Path, images: _Images, chosen: np.ndarray, tar: int, features):
    """One file, which is there whole or not at all."""
    partial = file.parent / "unfinished" / file.name
    try:
        partial.unlink(missing_ok=True)  # of another time, or a link: nothing is written through it
        _write_records(partial, images, chosen, tar, features)
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # array_record raises the second
        raise InputError(f"cannot write {file}: {error}") from error


def _write_records(file: pathlib.Path, images: _Images, chosen: np.ndarray, tar: int, features):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")  # as TFDS
    with contextlib.closing(writer):
        for index in chosen:  # class by class, much as they lie in the tar file
            size, offset = int(images.size[index]), int(images.offset[index])
            data = os.pread(tar, size, offset)
            if len(data) != size:
                raise InputError(f"the tar file ends within {images.name[index].decode()}")
            writer.write(
                features.serialize_example(
                    {
                        "file_name": images.name[index],
                        "image": data,
                        "label": int(images.label[index]),
                    }
                )
            )


def main(arguments: list[str] | None = None) -> int:
    return ending(lambda: _main(arguments), limited=False) or 0


def _main(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_tar", "--train-tar", metavar="ILSVRC2012_img_train.tar")
    parser.add_argument("--val_tar", "--val-tar", metavar="ILSVRC2012_img_val.tar")
    parser.add_argument("--out", required=True, help="TFDS's data folder: --config.dataset.path")
    options = parser.parse_args(with_home(sys.argv[1:] if arguments is None else arguments))
    tars = {"train": options.train_tar, "validation": options.val_tar}
    tars = {name: tar for name, tar in tars.items() if tar}
    if not tars:
        raise InputError("give --train_tar, --val_tar or both")
    folder = prepare(tars, options.out)
    print(f"{folder} is prepared: --config.dataset.path={options.out}")


if __name__ == "__main__":
    sys.exit(main())
