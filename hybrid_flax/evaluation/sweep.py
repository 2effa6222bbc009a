"""Many models on one set: a table that grows after every model, in the columns of timm's.

A model that fails is recorded with its error, and the next one goes on. Where memory is out the
batch is halved and the model asked again.
"""

import csv
import fnmatch
import functools
import io
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from hybrid_flax.data.transforms import EvalTransform
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.errors import InputError, TrainingError
from hybrid_flax.evaluation import sets
from hybrid_flax.evaluation.scoring import (
    Answers,
    answers,
    as_csv,
    check_average,
    corruption_error,
    logits_by,
    widened,
)
from hybrid_flax.models.registry import list_models, model_info
from hybrid_flax.opened import Opened, open_model
from hybrid_flax.run import files
from hybrid_flax.weights import bridge

COLUMNS = (
    *("model", "img_size", "top1", "top1_err", "top5", "top5_err"),
    *("param_count", "crop_pct", "interpolation"),
)


class Request(NamedTuple):
    """Which set, and how."""

    set_name: str
    path: str
    real: str = ""  # labels of "real"
    clean: str = ""  # validation images, for the reference on the same classes
    average: tuple[str, ...] = ()
    batch_size: int = 64
    num_workers: int = 0
    predictions: str = ""  # file for the answers on every image


class Row(NamedTuple):
    """A model of the table."""

    cells: dict[str, str]
    metrics: dict[str, float]


def candidates(given: str, folder: str) -> list[tuple[str, Callable[[], Opened]]]:
    """(name, what opens it) of the models that --models names.

    Args:
      given: names and patterns with commas between, or a folder of work directories.
      folder: of released files, called as `model_info(name).release_file`; "": they are downloaded.

    Raises:
      InputError: nothing is found.
    """
    path = os.path.expanduser(given)
    if os.path.isdir(path):
        runs = sorted(
            entry for entry in os.listdir(path) if os.path.isdir(f"{path}/{entry}/checkpoints")
        )
        if not runs:
            raise InputError(
                f"--models={given}: the folder holds no work directories, with checkpoints/"
            )
        return [
            (run, functools.partial(open_model, None, os.path.join(path, run), "", ""))
            for run in runs
        ]
    names: list[str] = []
    for pattern in filter(None, given.split(",")):
        found = fnmatch.filter(list_models(), pattern)
        if not found:
            raise InputError(
                f"--models={pattern}: no model is called so, and no folder; "
                "hybrid_flax.list_models() has the names"
            )
        names += found
    return [(name, functools.partial(_released, name, folder)) for name in dict.fromkeys(names)]


def _released(name: str, folder: str) -> Opened:
    file = model_info(name).release_file
    if folder and not file:
        raise InputError(f"{name}: its authors released no weights")
    path = os.path.join(os.path.expanduser(folder), file) if folder else ""
    if path and not os.path.exists(path):
        raise InputError(f"{name}: there is no {path}")
    return open_model(None, "", name, path)


def check(request: Request) -> None:
    """Raises InputError for what cannot be asked for, before any model is opened."""
    if request.set_name not in sets.SETS:
        raise InputError(f"--set={request.set_name}: expected one of {', '.join(sets.SETS)}")
    if not request.path:
        raise InputError(f"--set_path is missing: the folder of --set={request.set_name}")
    if request.clean and request.set_name not in sets.SUBSETS:
        raise InputError(
            f"--clean is for --set={' and '.join(sets.SUBSETS)}, whose classes are few"
        )
    check_average(request.average)
    if request.batch_size < 1:
        raise InputError(f"--batch_size={request.batch_size}: expected 1 or more")


def class_numbers(opened: Opened) -> dict[str, int]:
    """{synset: number of the class} of a model.

    Raises InputError for a model of other classes than ImageNet's.
    """
    if opened.classes and set(opened.classes) <= set(sets.synsets()):
        return {name: number for number, name in enumerate(opened.classes)}
    if opened.model.num_classes == 1000:
        return {name: number for number, name in enumerate(sets.synsets())}
    raise InputError(
        f"{opened.title} has {opened.model.num_classes} classes that are not called by synset: the "
        "sets are for ImageNet's 1000"
    )


def evaluate_set(opened: Opened, request: Request) -> tuple[dict[str, float], list[Answers]]:
    """(metrics, the answers on each part) of a model on a set.

    Metrics are top1, top5 (percent), loss, images; of "a" and "r" those among their own 200
    classes, with clean_top1 where validation images are given; of "c" also mce, and the top1 of
    each corruption.

    Raises:
      InputError: the set is not as it is released, or the model has other classes.
    """
    numbers = class_numbers(opened)
    found = sets.open_set(request.set_name, request.path, numbers, request.real)
    if found.is_cropped and opened.image_size != 224:
        print(
            f"warning: images of --set=c are crops of 224 pixels; {opened.name} takes "
            f"{opened.image_size}, to which they are resized"
        )
    asked = _asking(opened, request, found.is_cropped)
    total = sum(len(part.source) for part in found.parts)
    every: list[Answers] = []
    with tqdm(total=total, unit="image", desc=opened.name, disable=None) as bar:
        for part in found.parts:
            every.append(asked(part, found.classes, bar.update))
    metrics = _joined(every).metrics()
    if found.name == "c":
        metrics |= _corruptions(found.parts, every)
    if request.clean:
        part = sets.open_set("val", request.clean, numbers).parts[0]
        assert found.classes is not None
        clean = asked(sets.restricted(part, found.classes), found.classes, lambda count: None)
        metrics |= {f"clean_{name}": value for name, value in clean.metrics().items()}
    return metrics, every


def _corruptions(parts: Sequence[sets.Part], every: Sequence[Answers]) -> dict[str, float]:
    errors: dict[str, list[float]] = {}
    for part, each in zip(parts, every, strict=True):
        errors.setdefault(part.name.partition("/")[0], []).append(1 - float(each.right1.mean()))
    means = {name: 100 * (1 - float(np.mean(values))) for name, values in errors.items()}
    return {"mce": corruption_error(errors)} | means


def _joined(every: Sequence[Answers]) -> Answers:
    images = [image for each in every for image in each.images]
    arrays = [np.concatenate([each[i] for each in every]) for i in range(1, 5)]
    return Answers(images, *arrays)


def _asking(opened: Opened, request: Request, is_cropped: bool):
    """`asked(part, classes, seen)`, which halves the batch where memory is out."""
    mesh = make_mesh()
    transform = opened.transform
    step = logits_by(
        opened.model,
        bridge.get_weights(opened.model),
        transform.mean,
        transform.std,
        mesh,
        opened.image_size,
        request.average,
    )
    size = [request.batch_size]

    def asked(part: sets.Part, classes, seen: Callable[[int], object]) -> Answers:
        crop = EvalTransform(
            part.source,
            opened.image_size,
            1.0 if is_cropped else transform.crop_fraction,
            "center" if is_cropped else transform.crop_mode,
            transform.interpolation,
            skip_unreadable=True,
        )
        while True:
            try:
                return answers(
                    step,
                    part,
                    widened(crop, request.average),
                    mesh,
                    size[0],
                    classes,
                    request.num_workers,
                    lambda count: (seen(count), None)[1],
                )
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or size[0] == 1:
                    raise
                size[0] //= 2
                print(f"memory is out: again with a batch of {size[0]}")

    return asked


def sweep(
    models: Sequence[tuple[str, Callable[[], Opened]]], request: Request, out: str
) -> list[Row]:
    """Evaluates model after model; the table is written after each.

    Args:
      models: of `candidates`.
      out: file of the table; "": none is written.

    Returns:
      The rows, the best first; models that failed have an error instead of metrics.

    Raises:
      InputError: what is asked for cannot be, or no model could be evaluated.
    """
    check(request)
    rows: list[Row] = []
    for name, opens in models:
        try:
            opened = opens()
            metrics, every = evaluate_set(opened, request)
        except (InputError, TrainingError, OSError, jax.errors.JaxRuntimeError) as error:
            reason = " ".join(str(error).split())
            print(f"{name}: {reason}")
            rows.append(Row({"model": name, "error": reason[:300]}, {}))
        else:
            rows.append(Row(_cells(name, opened, metrics), metrics))
            print(describe(name, request.set_name, metrics))
            if request.predictions:
                write_predictions(request.predictions, every, name if len(models) > 1 else "")
        rows.sort(key=lambda row: (-row.metrics.get("top1", -1), -row.metrics.get("top5", -1)))
        if out:
            files.replace_text(out, as_table(rows))
    if not any(row.metrics for row in rows):
        raise InputError(f"none of {len(models)} models could be evaluated: see above")
    return rows


def _cells(name: str, opened: Opened, metrics: dict[str, float]) -> dict[str, str]:
    count = sum(leaf.size for leaf in jax.tree.leaves(bridge.get_weights(opened.model)["params"]))
    cells = {
        "model": name,
        "img_size": str(opened.image_size),
        "top1": f"{metrics['top1']:.3f}",
        "top1_err": f"{100 - metrics['top1']:.3f}",
        "top5": f"{metrics['top5']:.3f}",
        "top5_err": f"{100 - metrics['top5']:.3f}",
        "param_count": f"{count / 1e6:.2f}",
        "crop_pct": f"{opened.transform.crop_fraction:g}",
        "interpolation": opened.transform.interpolation,
    }
    if "clean_top1" in metrics:
        cells["top1_diff"] = f"{metrics['top1'] - metrics['clean_top1']:+.3f}"
        cells["top5_diff"] = f"{metrics['top5'] - metrics['clean_top5']:+.3f}"
    if "mce" in metrics:
        cells["mce"] = f"{metrics['mce']:.3f}"
    return cells


def as_table(rows: Sequence[Row]) -> str:
    """CSV in the columns of timm's tables, and those that only some sets have."""
    more = [name for row in rows for name in row.cells if name not in COLUMNS]
    stream = io.StringIO()
    writer = csv.DictWriter(
        stream, [*COLUMNS, *dict.fromkeys(more)], restval="", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(row.cells for row in rows)
    return stream.getvalue()


def describe(name: str, set_name: str, metrics: dict[str, float]) -> str:
    """One line for a person."""
    said = (
        f"{name} on {set_name}: top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} % of "
        f"{int(metrics['images'])} images"
    )
    if "mce" in metrics:
        said += f"; mCE {metrics['mce']:.1f} %"
    if set_name in sets.SUBSETS:
        said += ", among the classes of the set"
    if "clean_top1" in metrics:
        said += (
            f"; validation images of the same classes: {metrics['clean_top1']:.2f} % of "
            f"{int(metrics['clean_images'])}"
        )
    return said


def write_predictions(file: str, every: Sequence[Answers], name: str = "") -> None:
    """Writes the answers on every image; with a name it becomes part of the file's."""
    stem, ending = os.path.splitext(os.path.expanduser(file))
    files.replace_text(
        f"{stem}_{name}{ending}" if name else f"{stem}{ending}", as_csv(_joined(every))
    )
