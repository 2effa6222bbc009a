"""Single image files: folders of classes, and lists of paths with class numbers."""

import os
from collections.abc import Sequence

import numpy as np

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources.base import (
    IMAGE_SUFFIXES,
    MOST_BYTES,
    TRY_DIGITS,
    Encoded,
    LabelledSource,
    identity_of_files,
    some,
)
from hybrid_flax.data.sources.labels import check_label_range, class_number
from hybrid_flax.data.sources.splits import find_name, how_to_name
from hybrid_flax.data.sources.walk import Walk, join, say, subfolders, walk
from hybrid_flax.errors import InputError
from hybrid_flax.text_files import read_bytes, read_lines


class _Files(LabelledSource):
    _path: str  # of the dataset
    _files: list[str]

    def name(self, index: int) -> str:
        return self._files[index]

    def identity(self) -> str:
        return identity_of_files(self._files, self._path)

    def read(self, index: int) -> Encoded:
        file = self._files[index]
        try:
            data = read_bytes(file, MOST_BYTES)
        except InputError as error:
            raise UnreadableImageError(f"cannot read image {error}") from error
        return Encoded(data, int(self.labels[index]), file)


class FileSource(_Files):
    """Image files that somebody else found, with their labels."""

    def __init__(self, files: Sequence[str], labels: np.ndarray, num_classes: int):
        self._path, self._files = "", list(files)
        self.labels, self.num_classes = np.asarray(labels), num_classes


class ImageFolder(_Files):
    """`path/train/CLASS/*.JPEG` and `path/val/CLASS/*.JPEG`; folders inside a class are walked too.

    Classes are numbered in the sorted order of the training folders' names, as torchvision does;
    to evaluate, `val` alone is enough. Which files are images: see `walk.py`; what the folders of
    the splits may be called: see `splits.py`.
    """

    def __init__(self, path: str, split: str, train: str = "train"):
        if not path:
            raise InputError(
                "dataset image_folder needs a folder: --config.dataset.path=DIR, holding "
                f"train/CLASS/*.JPEG and val/CLASS/*.JPEG. {TRY_DIGITS}"
            )
        self._path, self.found_in = path, _split_folder(path, split)
        folders, beside = _class_folders(self.found_in, path, split)
        self.class_names = folders
        if _name_of_folder(path, train):
            train_folder = _split_folder(path, train)
            self.class_names = _class_folders(train_folder, path, train)[0]
            _check_known(folders, self.class_names, self.found_in, train_folder)
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.num_classes = len(self.class_names)
        walks = [walk(os.path.join(self.found_in, name), IMAGE_SUFFIXES) for name in folders]
        _check_images(folders, walks, self.found_in)
        found = join([beside, *walks])
        self._files, self.left_out = found.files, found.reasons(path)
        self.labels = np.repeat(
            np.array([numbers[name] for name in folders]), [len(one.files) for one in walks]
        )


class ListFiles(_Files):
    """`path/meta/train.txt` and `path/meta/val.txt`: "relative path, blank, class number" per line.

    Paths are relative to `path/train` and `path/val`. There are as many classes as the largest
    number in the two lists says, counted from 0. What lists and folders of the splits may be
    called: see `splits.py`.
    """

    def __init__(self, path: str, split: str, train: str = "train"):
        if not path:
            raise InputError(
                "dataset list_files needs a folder: --config.dataset.path=DIR, holding "
                f"meta/train.txt, meta/val.txt, and images in train/ and val/. {TRY_DIGITS}"
            )
        name, names_of_train = _name_of_list(path, split), _name_of_list(path, train)
        if name is None:
            meta = os.path.join(path, "meta")
            raise InputError(
                f"there is no list {os.path.join(meta, split)}.txt. list_files expects "
                f'{meta}/train.txt and {meta}/val.txt, each line "relative path, blank, class '
                f'number". {how_to_name(split, _lists(path))}'
            )
        self._path, self.found_in = path, os.path.join(path, "meta", f"{name}.txt")
        names, self.labels, lines = _read_list(self.found_in)
        largest = self.labels.max()
        if names_of_train and names_of_train != name:
            file = os.path.join(path, "meta", f"{names_of_train}.txt")
            largest = max(largest, _read_list(file)[1].max())
        self.num_classes = int(largest) + 1
        folder = _split_folder(path, split)
        self._files = [os.path.join(folder, name) for name in names]
        self._check_existence(lines)

    def _check_existence(self, lines: list[int]):
        # By listing folders, not by asking for files: a million questions take a network minutes.
        there: dict[str, set[str]] = {}
        missing = []
        for line, file in zip(lines, self._files, strict=True):
            folder, name = os.path.split(file)
            if folder not in there:
                there[folder] = _regular_files(folder)
            if name not in there[folder]:
                missing.append((line, file))
        if missing:
            shown = [
                f"line {line}: {file}" + (" (no regular file)" if os.path.exists(file) else "")
                for line, file in missing[:3]
            ]
            raise InputError(
                f"{self.found_in} names {len(missing)} of {len(self._files)} images that are not "
                f"there: {'; '.join(shown)}{'; …' if missing[3:] else ''}. Mend the list or the "
                "folder"
            )


def _read_list(file: str) -> tuple[list[str], np.ndarray, list[int]]:
    """(paths, class numbers, numbers of the lines) of a list."""
    names: list[str] = []
    labels: list[int] = []
    lines: list[int] = []
    known: dict[str, int] = {}
    for number, line in read_lines(file):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        name, label = _line(line, where)
        before = known.setdefault(os.path.normpath(name), label)
        if before != label:
            raise InputError(
                f"{where}: {name} is of class {label}, and in a line above of class {before}. Keep "
                "one of the lines"
            )
        names.append(name)
        labels.append(label)
        lines.append(number)
    if not names:
        raise InputError(f"{file} is empty: there are no images in this split")
    found = np.array(labels)
    check_label_range(found, lambda index: f"line {lines[index]}, {names[index]},", file)
    return names, found, lines


def _line(text: str, where: str) -> tuple[str, int]:
    words = text.rsplit(maxsplit=1)  # a path may hold blanks
    expected = 'expected "relative path, blank, class number"'
    if len(words) < 2:
        raise InputError(f"{where}: {text[:80]!r} is not understood; {expected}")
    try:
        return words[0], class_number(words[1], where)
    except InputError as error:
        raise InputError(f"{error}; {expected}, and found {text[:80]!r}") from error


def _lists(path: str) -> list[str]:
    """Names, without .txt, of the lists that are there."""
    meta = os.path.join(path, "meta")
    if not os.path.isdir(meta):
        return []
    return [
        os.path.basename(file)[:-4] for file in subfolders(meta)[1].files if file.endswith(".txt")
    ]


def _name_of_list(path: str, split: str) -> str | None:
    return find_name(split, _lists(path), os.path.join(path, "meta"))


def _regular_files(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:  # there is no such folder
        return set()


def _folders(path: str) -> list[str]:
    return subfolders(path)[0] if os.path.isdir(path) else []


def _name_of_folder(path: str, split: str) -> str | None:
    return find_name(split, _folders(path), path)


def _split_folder(path: str, split: str) -> str:
    name = _name_of_folder(path, split)
    if name is None:
        raise InputError(
            f"there is no folder {os.path.join(path, split)}. Expected {path}/train and "
            f"{path}/val, for image_folder with one folder per class, the same names in both. "
            f"{how_to_name(split, _folders(path))}"
        )
    return os.path.join(path, name)


def _class_folders(folder: str, path: str, split: str) -> tuple[list[str], Walk]:
    """(names of the class folders, what is left out beside them)."""
    names, beside = subfolders(folder)
    if not names:
        raise InputError(
            f"{folder} has no class folders; expected {folder}/CLASS/*.JPEG. "
            f"{how_to_name(split, _folders(path))}"
        )
    for name in names:
        if name != name.encode(errors="ignore").decode():
            raise InputError(f"{folder}: the class folder {name!r} has no name in UTF-8. Rename it")
    outside = {"files outside of class folders": len(beside.files)} if beside.files else {}
    examples = dict.fromkeys(outside, beside.files[0]) if beside.files else {}
    return names, Walk([], beside.left_out | outside, {**beside.examples, **examples})


def _check_known(folders: list[str], known: list[str], folder: str, train: str) -> None:
    unknown = sorted(set(folders) - set(known))
    if unknown:
        raise InputError(
            f"{folder} has {len(unknown)} of {len(folders)} classes that {train} has not: "
            f"{some(unknown)}. Both need the same class folders; {train} has {some(known)}"
        )


def _check_images(names: list[str], walks: list[Walk], folder: str) -> None:
    empty = [i for i, found in enumerate(walks) if not found.files]
    if empty:
        left_out = say(join(walks[i] for i in empty).reasons(folder))
        raise InputError(
            f"class folders without images: {some([os.path.join(folder, names[i]) for i in empty])}"
            + (f" (left out there: {left_out})" if left_out else "")
            + f". Add images (known endings: {', '.join(IMAGE_SUFFIXES)}) or remove the folders"
        )
