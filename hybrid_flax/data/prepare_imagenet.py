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
import os
import pathlib
import shutil
import sys
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tqdm

from hybrid_flax.errors import InputError


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

    builder = tfds.builder("imagenet2012", data_dir=out)
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
    shutil.rmtree(unfinished)
    return folder


def _index(split: Split, tar: str, folder: pathlib.Path, classes) -> _Images:
    """Reads through the tar file's heads, or what that gave the last time."""
    if not os.path.isfile(tar):
        raise InputError(f"there is no file {tar} ({split.name} images)")
    stamp = f"{os.path.getsize(tar)} {os.stat(tar).st_mtime_ns}"
    file = folder / f"{split.name}.npz"
    if file.exists():
        with np.load(file) as saved:
            if str(saved["stamp"]) != stamp:
                raise InputError(
                    f"{folder.parent} has files from another {tar} than this. Give the same "
                    "again, or delete the folder to begin anew"
                )
            return _Images(*(saved[name] for name in _Images._fields))
    rows = []
    progress = tqdm.tqdm(
        _members(tar, split.name), desc=f"looking through {split.name}", unit=" images",
        total=split.images, file=sys.stderr,
    )  # fmt: skip
    try:
        rows = sorted(progress, key=lambda row: row[0])  # by name
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"cannot read {tar}: {error}. Is the download complete?") from error
    if split.name == "train":
        labels = [wnid for _, wnid, *_ in rows]
    else:
        labels = _validation_labels()
    if not rows or len(rows) != split.images or len(labels) != len(rows):
        raise InputError(
            f"{tar} has {len(rows):,} images, expected {split.images:,}: is the download complete, "
            "and is it the right file?"
        )
    unknown = sorted(set(labels) - set(classes.names))
    if unknown:
        raise InputError(f"{tar} has classes that ImageNet-1k has not: {', '.join(unknown[:5])}")
    images = _Images(
        np.array([offset for *_, offset, _ in rows], np.int64),
        np.array([size for *_, size in rows], np.int64),
        np.array([classes.str2int(label) for label in labels], np.int64),
        np.array([name.encode() for name, *_ in rows]),
    )
    partial = file.with_suffix(".tmp.npz")
    np.savez(partial, stamp=stamp, **images._asdict())
    os.replace(partial, file)
    return images


def _members(tar: str, split: str) -> Iterator[tuple[str, str, int, int]]:
    """(file name, class folder or "", offset in the tar file, size) of every image."""
    with tarfile.open(tar, "r:") as archive:
        for outer in archive:
            if not outer.isfile():
                continue
            if split != "train":
                yield os.path.basename(outer.name), "", outer.offset_data, outer.size
                continue
            # The training images lie in a tar file per class, inside the tar file.
            wnid = os.path.basename(outer.name).removesuffix(".tar")
            with tarfile.open(fileobj=archive.extractfile(outer), mode="r:") as inner:
                for image in inner:
                    if image.isfile():
                        offset = outer.offset_data + image.offset_data
                        yield os.path.basename(image.name), wnid, offset, image.size


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
    from array_record.python import array_record_module

    partial = file.parent / "unfinished" / file.name
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")  # as TFDS
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
    os.replace(partial, file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_tar", "--train-tar", metavar="ILSVRC2012_img_train.tar")
    parser.add_argument("--val_tar", "--val-tar", metavar="ILSVRC2012_img_val.tar")
    parser.add_argument("--out", required=True, help="TFDS's data folder: --config.dataset.path")
    options = parser.parse_args(arguments)
    tars = {"train": options.train_tar, "validation": options.val_tar}
    try:
        tars = {name: tar for name, tar in tars.items() if tar}
        if not tars:
            raise InputError("give --train_tar, --val_tar or both")
        folder = prepare(tars, options.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder} is prepared: --config.dataset.path={options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
