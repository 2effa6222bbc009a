"""Evaluation sets for ImageNet's classes, in the folders that they are released in.

| set | folders below the path |
|---|---|
| val | SYNSET/FILE |
| real (Beyer et al., arXiv:2006.07159) | the validation files, ILSVRC2012_val_NNNNNNNN.*, in any |
| v2 (Recht et al., arXiv:1902.10811) | 0 … 999, the numbers of the classes |
| a (arXiv:1907.07174), r (arXiv:2006.16241) | 200 SYNSETs each |
| sketch (arXiv:1905.13549) | 1000 SYNSETs |
| c (arXiv:1903.12261) | [GROUP/]CORRUPTION/SEVERITY/SYNSET, images already cropped |
"""

import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_flax.data.sources.base import IMAGE_SUFFIXES, EncodedSource, some
from hybrid_flax.data.sources.files import FileSource
from hybrid_flax.data.sources.walk import subfolders, walk
from hybrid_flax.errors import InputError
from hybrid_flax.text_files import read_json, read_lines

SETS = ("val", "real", "v2", "a", "r", "sketch", "c")
SUBSETS = ("a", "r")  # metrics are over their own 200 classes
# Mean errors of AlexNet over the five severities, as AugMix (arXiv:1912.02781) carries them.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = ("1", "2", "3", "4", "5")
_SYNSET = re.compile(r"n\d{8}")
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+$")


class Part(NamedTuple):
    """Some of a set: all of it, or one corruption at one severity."""

    name: str  # "" or "fog/3"
    source: EncodedSource
    # The classes that count as right, of every image; None: the one of its label.
    accepted: Sequence[Sequence[int]] | None


class EvaluationSet(NamedTuple):
    """What is evaluated, and which classes take part."""

    name: str
    parts: list[Part]
    classes: np.ndarray | None  # numbers; None: all of the model's
    is_cropped: bool = False  # the images are crops: no second one is cut out of them


def synsets() -> list[str]:
    """WordNet's numbers of ImageNet's 1000 classes, in the order of all released models."""
    file = pathlib.Path(__file__).parents[1] / "data" / "imagenet_synsets.txt"
    return [line for _, line in read_lines(file) if line]


def open_set(name: str, path: str, numbers: Mapping[str, int], real: str = "") -> EvaluationSet:
    """Opens a set.

    Args:
      name: one of `SETS`.
      path: its folder.
      numbers: {synset: number of the class in the model}.
      real: of "real", its labels (real.json).

    Raises:
      InputError: an unknown set, or a folder that is not as the set is released.
    """
    if name not in SETS:
        raise InputError(f"--set={name}: expected one of {', '.join(SETS)}")
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        raise InputError(
            f"--set_path={path}: there is no such folder; expected that of --set={name}"
        )
    if name == "c":
        return EvaluationSet(name, _corrupted(path, numbers), None, is_cropped=True)
    if name == "real":
        return EvaluationSet(name, [_reassessed(path, real)], None)
    part = _numbered(path) if name == "v2" else _by_synset(path, numbers, name)
    classes = np.unique(np.asarray(part.source.labels)) if name in SUBSETS else None
    return EvaluationSet(name, [part], classes)


def restricted(part: Part, classes: np.ndarray) -> Part:
    """The images of some classes: the clean reference of a set of 200."""
    assert part.source.labels is not None
    kept = np.flatnonzero(np.isin(part.source.labels, classes))
    if not len(kept):
        raise InputError("--clean: none of its images is of a class of the set")
    source = FileSource(
        [part.source.name(int(i)) for i in kept], part.source.labels[kept], part.source.num_classes
    )
    return Part(part.name, source, None)


def _part(files: Sequence[str], labels: Iterable[int], name: str = "") -> Part:
    labels = np.asarray(list(labels), np.int64)
    return Part(name, FileSource(files, labels, int(labels.max()) + 1), None)


def _by_synset(path: str, numbers: Mapping[str, int], name: str) -> Part:
    folders, _ = subfolders(path)
    if not folders:
        raise InputError(f"--set_path={path} has no folders: --set={name} expects SYNSET/FILE")
    wrong = [folder for folder in folders if not _SYNSET.fullmatch(folder)]
    if wrong:
        hint = ""
        if all(folder.isdigit() for folder in folders):
            hint = ". Folders named by number are --set=v2's"
        elif set(folders) & {*ALEXNET, "noise", "blur", "weather", "digital"}:
            hint = ". Folders of corruptions are --set=c's"
        raise InputError(
            f"--set_path={path} has folders {some(wrong)}: --set={name} expects folders named by "
            f"synset, such as n01440764{hint}"
        )
    unknown = [folder for folder in folders if folder not in numbers]
    if unknown:
        raise InputError(
            f"--set_path={path} has {len(unknown)} classes that the model has not: {some(unknown)}"
            ". Sets are for models with ImageNet's classes"
        )
    if name in SUBSETS and len(folders) != 200:
        print(f"warning: --set={name} has 200 classes, here are {len(folders)}")
    files, labels = _files(path, {folder: numbers[folder] for folder in folders})
    return _part(files, labels)


def _files(path: str, numbers: Mapping[str, int]) -> tuple[list[str], list[int]]:
    files: list[str] = []
    labels: list[int] = []
    for folder, number in numbers.items():
        found = walk(os.path.join(path, folder), IMAGE_SUFFIXES).files
        files += found
        labels += [number] * len(found)
    if not files:
        raise InputError(f"--set_path={path}: there are no images in its folders")
    return files, labels


def _numbered(path: str) -> Part:
    folders, _ = subfolders(path)
    wrong = [folder for folder in folders if not folder.isdigit() or int(folder) > 999]
    if wrong or not folders:
        found = some(wrong) if wrong else "none"
        raise InputError(
            f"--set_path={path} has folders {found}: --set=v2 expects folders 0 to 999, named by "
            "the number of the class"
        )
    # By number: sorted as text, 10 comes before 2.
    return _part(*_files(path, {folder: int(folder) for folder in sorted(folders, key=int)}))


def _reassessed(path: str, real: str) -> Part:
    file = os.path.expanduser(real) or os.path.join(path, "real.json")
    answers = read_json(file)
    if not isinstance(answers, list) or not all(
        isinstance(each, list) and all(isinstance(x, int) and 0 <= x < 1000 for x in each)
        for each in answers
    ):
        raise InputError(
            f"{file}: expected real.json of github.com/google-research/reassessed-imagenet, a list "
            "of lists of class numbers"
        )
    found = walk(path, IMAGE_SUFFIXES).files
    files, accepted, others = [], [], []
    for image in found:
        match = _VALIDATION.search(image)
        if not match or not 1 <= int(match[1]) <= len(answers):
            others.append(image)
        elif answers[int(match[1]) - 1]:  # images without any label do not count
            files.append(image)
            accepted.append(tuple(answers[int(match[1]) - 1]))
    if others or not files:
        raise InputError(
            f"--set_path={path}: {len(others)} of {len(found)} images are not called "
            f"ILSVRC2012_val_NNNNNNNN with a number from 1 to {len(answers)}"
            + (f", such as {others[0]}" if others else "")
            + ". --set=real finds the labels by that number"
        )
    source = FileSource(files, np.array([each[0] for each in accepted]), 1000)
    return Part("", source, accepted)


def _corrupted(path: str, numbers: Mapping[str, int]) -> list[Part]:
    there = {}
    for folder, _, _ in os.walk(path, followlinks=True):
        if os.path.basename(folder) in ALEXNET:
            there[os.path.basename(folder)] = folder
    missing = [name for name in ALEXNET if name not in there]
    if missing:
        raise InputError(
            f"--set_path={path} lacks {len(missing)} of the 15 corruptions: {some(missing)}. "
            "--set=c expects CORRUPTION/SEVERITY/SYNSET, with or without folders of groups above"
        )
    parts = []
    for corruption in ALEXNET:
        for severity in SEVERITIES:
            folder = os.path.join(there[corruption], severity)
            if not os.path.isdir(folder):
                raise InputError(f"{there[corruption]} has no folder {severity}, of its severity")
            part = _by_synset(folder, numbers, "c")
            parts.append(part._replace(name=f"{corruption}/{severity}"))
    return parts
