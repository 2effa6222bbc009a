"""Single image files: folders of classes, and lists of paths with class numbers."""

import os

import numpy as np

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources.base import IMAGE_SUFFIXES, TRY_DIGITS, Encoded, LabelledSource
from hybrid_flax.errors import InputError


class _Files(LabelledSource):
    _files: list[str]

    def name(self, index: int) -> str:
        return self._files[index]

    def read(self, index: int) -> Encoded:
        file = self._files[index]
        try:
            with open(file, "rb") as stream:
                return Encoded(stream.read(), int(self.labels[index]), file)
        except OSError as error:
            raise UnreadableImageError(f"cannot read image {file}: {error}") from error


class ImageFolder(_Files):
    """`path/train/CLASS/*.JPEG` and `path/val/CLASS/*.JPEG`; folders inside a class are walked too.

    Classes are numbered in the sorted order of the training folders' names, as torchvision does;
    to evaluate, `val` alone is enough.
    """

    def __init__(self, path: str, split: str, train: str = "train"):
        if not path:
            raise InputError(
                "dataset image_folder needs a folder: --config.dataset.path=DIR, holding "
                f"train/CLASS/*.JPEG and val/CLASS/*.JPEG. {TRY_DIGITS}"
            )
        folders = _class_folders(path, split)
        has_train = os.path.isdir(os.path.join(path, train))
        self.class_names = _class_folders(path, train) if has_train else folders
        unknown = sorted(set(folders) - set(self.class_names))
        if unknown:
            raise InputError(
                f"{path}/{split} has classes that {path}/{train} has not: {', '.join(unknown)}. "
                "Both need the same class folders"
            )
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.num_classes = len(self.class_names)
        self._files = []
        labels = []
        empty = []
        for name in folders:
            files = _image_files(os.path.join(path, split, name))
            if not files:
                empty.append(os.path.join(path, split, name))
            self._files += files
            labels += [numbers[name]] * len(files)
        if empty:
            raise InputError(
                f"class folders without images: {', '.join(empty)}. Add images (known endings: "
                f"{', '.join(IMAGE_SUFFIXES)}) or remove the folders"
            )
        self.labels = np.array(labels)


class ListFiles(_Files):
    """`path/meta/train.txt` and `path/meta/val.txt`: "relative path, blank, class number" per line.

    Paths are relative to `path/train` and `path/val`. There are as many classes as the largest
    number in the two lists says, counted from 0.
    """

    def __init__(self, path: str, split: str, train: str = "train"):
        if not path:
            raise InputError(
                "dataset list_files needs a folder: --config.dataset.path=DIR, holding "
                f"meta/train.txt, meta/val.txt, and images in train/ and val/. {TRY_DIGITS}"
            )
        names, self.labels = _read_list(path, split)
        largest = self.labels.max()
        if split != train and os.path.exists(_list_file(path, train)):
            largest = max(largest, _read_list(path, train)[1].max())
        self.num_classes = int(largest) + 1
        self._files = [os.path.join(path, split, name) for name in names]
        self._check_existence(_list_file(path, split))

    def _check_existence(self, source: str):
        # By listing folders, not by asking for files: a million questions take a network minutes.
        there = {}
        missing = []
        for line, file in enumerate(self._files, 1):
            folder, name = os.path.split(file)
            if folder not in there:
                there[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else ()
            if name not in there[folder]:
                missing.append(f"line {line}: {file}")
        if missing:
            raise InputError(
                f"{source} names {len(missing)} of {len(self._files)} images that are not there: "
                f"{'; '.join(missing[:3])}{'; …' if missing[3:] else ''}. Mend the list or the "
                "folder"
            )


def _list_file(path: str, split: str) -> str:
    return os.path.join(path, "meta", f"{split}.txt")


def _read_list(path: str, split: str) -> tuple[list[str], np.ndarray]:
    file = _list_file(path, split)
    if not os.path.exists(file):
        raise InputError(
            f"there is no list {file}. list_files expects {path}/meta/train.txt and meta/val.txt, "
            f'each line "relative path, blank, class number". {TRY_DIGITS}'
        )
    names, labels = [], []
    with open(file) as stream:
        for number, line in enumerate(stream, 1):
            name, _, label = line.rstrip("\n").rpartition(" ")  # a path may hold blanks
            if not name or not label.isdecimal():
                raise InputError(
                    f"{file}, line {number}: {line.rstrip()!r} is not understood; expected "
                    '"relative path, blank, class number", the number from 0 up'
                )
            names.append(name)
            labels.append(int(label))
    if not names:
        raise InputError(f"{file} is empty: there are no images in this split")
    return names, np.array(labels)


def _class_folders(path: str, split: str) -> list[str]:
    folder = os.path.join(path, split)
    if not os.path.isdir(folder):
        raise InputError(
            f"there is no folder {folder}. image_folder expects {path}/train/CLASS/*.JPEG and "
            f"{path}/val/CLASS/*.JPEG: one folder per class, the same names in both. {TRY_DIGITS}"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise InputError(f"{folder} has no class folders; expected {folder}/CLASS/*.JPEG")
    return classes


def _image_files(folder: str) -> list[str]:
    return sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(IMAGE_SUFFIXES)
    )
