"""Accuracy of a run's newest checkpoint: every validation image counted exactly once.

python -m hybrid_flax.evaluate --workdir=DIR [--config=configs/gcvit_b.py]

DIR is the work directory of a training run, or what `python -m convert` wrote, which needs a
config. A run has its own settings; fields that are given (`--config.dataset.path=…`) are used
instead of them, and it is said how (`as_trained.py`). Classes have the numbers that they were
trained with, by their names. Several processes can share the work, as they do in training; only the
first has to see DIR.

Other sets, in the folders that they are released in (`evaluation/sets.py`), by one process:

python -m hybrid_flax.evaluate --workdir=DIR --set=a --set_path=DIR [--clean=DIR]
python -m hybrid_flax.evaluate --models='gcvit_*' --checkpoints=DIR --set=v2 --set_path=DIR

--set is val, real, v2, a, r, sketch or c; --clean, for a and r, the validation folder: the
reference on the same classes. --models: names, patterns, or a folder of work directories; the table
--out is written after each. --predictions=FILE keeps what was said of every image, for
`python -m hybrid_flax.compare_predictions`. --average=flips,crops averages the logits of views.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags
from jax.sharding import Mesh

from hybrid_flax import cli
from hybrid_flax.build import resolve_classes
from hybrid_flax.data.loader import eval_batches
from hybrid_flax.data.transforms import EvalTransform
from hybrid_flax.distributed.batch import local_rows, round_up, to_devices
from hybrid_flax.errors import InputError
from hybrid_flax.evaluation.scoring import answers, check_average, logits_by, widened
from hybrid_flax.evaluation.sets import SETS, Part
from hybrid_flax.evaluation.sweep import (
    Request,
    candidates,
    check,
    describe,
    sweep,
    write_predictions,
)
from hybrid_flax.opened import open_model
from hybrid_flax.run.compiling import CompiledOnce
from hybrid_flax.scan_choice import scans
from hybrid_flax.settings import Settings
from hybrid_flax.start import open_trained
from hybrid_flax.training.step import make_eval_step
from hybrid_flax.weights.functions import as_function

Results = dict[str, dict[str, float]]  # {"val": {"top1": …}}

_SUMS = ("top1", "top5", "loss", "images", "non_finite")
_KINDS = {"val": "trained weights ", "val_ema": "averaged weights"}


def evaluate(
    eval_step: Callable,
    weights: dict[str, Any],
    transform: EvalTransform,
    config: Settings,
    mesh: Mesh,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Results | None:
    """Evaluates one or several sets of weights in one pass over the validation images.

    Args:
      eval_step: from `make_eval_step`.
      weights: {name: weights as `bridge.get_weights` gives them}: {"val": …, "val_ema": …}.
      should_stop: asked between batches.

    Returns:
      {name: {"top1": %, "top5": %, "loss": mean, "images": how many were scored}}, and
      "non_finite", how many more have logits that are not finite, if there are any. None if
      `should_stop` said so.

    Raises:
      InputError: there are labels beyond the model's classes, no image can be read, or none can be
        scored.
    """
    resolve_classes(config, transform.source, "val")
    # Any batch size will do: rows are added, and masked, until it splits over the devices.
    batch_size = round_up(config.eval.batch_size, mesh)
    sums: dict[str, dict[str, float]] = {name: dict.fromkeys(_SUMS, 0.0) for name in weights}
    batches = eval_batches(
        transform,
        batch_size=batch_size,
        num_workers=config.dataset.num_workers,
        rows=local_rows(batch_size, mesh),
    )
    with contextlib.closing(batches):
        for batch in batches:
            if should_stop():
                return None
            on_devices = to_devices(batch, mesh)
            results = {name: eval_step(each, on_devices) for name, each in weights.items()}
            for name, result in jax.device_get(results).items():
                for key, value in result.items():
                    sums[name][key] += float(value)
    return {name: _means(name, total, len(transform.source)) for name, total in sums.items()}


def _means(name: str, total: dict[str, float], images: int) -> dict[str, float]:
    """The results of one set of weights. Raises InputError if nothing could be scored."""
    scored, unscored = int(total["images"]), int(total["non_finite"])
    if not scored + unscored:
        raise InputError(
            f"none of the {images} validation images can be read: there is nothing to evaluate. "
            "Mend the images, or give others: --config.dataset.path="
        )
    if not scored:
        raise InputError(
            f"the logits of all {unscored} images that can be read are NaN or infinite, with the "
            f"{_KINDS.get(name, name).strip()}: nothing can be scored. The weights are not usable "
            "as they are; with --config.model.dtype=float32 fewer numbers overflow"
        )
    if unscored:
        logging.warning(
            "%s: the logits of %d images are NaN or infinite; they are not scored", name, unscored
        )
    return {
        "top1": 100 * total["top1"] / scored,
        "top5": 100 * total["top5"] / scored,
        "loss": total["loss"] / scored,
        "images": scored,
        **({"non_finite": unscored} if unscored else {}),
    }


def show_results(results: Results) -> str:
    """The results as lines for a person."""
    lines = []
    for name, result in results.items():
        if name in _KINDS:
            unscored = int(result.get("non_finite", 0))
            lines.append(
                f"  {_KINDS[name]}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, "
                f"loss {result['loss']:.4f} over {int(result['images'])} images"
                + (f"; {unscored} more have NaN or infinite logits" if unscored else "")
            )
    return "\n".join(lines)


def main(
    config: ml_collections.ConfigDict | None, workdir: str, given: Collection[str] | None = None
) -> int:
    """Evaluates the newest intact checkpoint of a work directory and prints the result.

    Args:
      config, given: see `as_trained`.
    """
    found = open_trained(config, workdir, "val", given)
    settings, source, mesh, model = found.prepared
    averaged = {"val_ema": found.averaged} if found.averaged else {}
    apply = as_function(model, scan=scans(settings.model, mesh))
    results = evaluate(
        CompiledOnce(make_eval_step(apply, settings.dataset, mesh), "evaluation step"),
        {"val": found.trained, **averaged},
        EvalTransform.from_config(settings, source),
        settings,
        mesh,
    )
    assert results is not None  # nobody asks it to stop
    print(f"{settings.model.name} at step {found.step} of {workdir}, {settings.dataset.name}:")
    print(show_results(results))
    return 0


def main_of_sets(
    config: ml_collections.ConfigDict | None,
    workdir: str,
    models: str,
    checkpoints: str,
    request: Request,
    out: str = "",
    given: Collection[str] | None = None,
) -> int:
    """Evaluates a run, or many models, on a set beside the validation split.

    Args:
      config, given: see `as_trained`.
      models, checkpoints: see `evaluation.sweep.candidates`.
      out: file of the table.
    """
    if jax.process_count() > 1:
        raise InputError(
            f"--set={request.set_name} is evaluated by one process, on all its devices"
        )
    check(request)
    if bool(models) == bool(workdir):
        raise InputError("give a run, --workdir=DIR, or --models=: one of the two")

    def opens():
        return open_model(config, workdir, "", "", given=given)

    found = candidates(models, checkpoints) if models else [(workdir, opens)]
    sweep(found, request, os.path.expanduser(out))
    return 0


def main_of_images(
    config: ml_collections.ConfigDict | None,
    workdir: str,
    average: Sequence[str],
    predictions: str,
    given: Collection[str] | None = None,
) -> int:
    """Evaluates the best weights of a work directory image by image, and keeps what they said.

    Args:
      config, given: see `as_trained`.
      average: views whose logits are averaged.
      predictions: file for the answers; "": none is written.
    """
    if jax.process_count() > 1:
        raise InputError("--predictions and --average are for one process, on all its devices")
    check_average(average)
    found = open_trained(config, workdir, "val", given)
    settings, source, mesh, model = found.prepared
    size, dataset = settings.model.image_size, settings.dataset
    step = logits_by(model, found.best, dataset.mean, dataset.std, mesh, size, average)
    transform = widened(EvalTransform.from_config(settings, source), average)
    every = answers(
        step,
        Part("", source, None),
        transform,
        mesh,
        settings.eval.batch_size,
        num_workers=dataset.num_workers,
    )
    name = f"{settings.model.name} at step {found.step} of {workdir}"
    print(describe(name, dataset.name, every.metrics()))
    if predictions:
        write_predictions(predictions, [every])
    return 0


def _program(config: ml_collections.ConfigDict | None, workdir: str) -> int:
    values = flags.FLAGS
    average = tuple(filter(None, values.average.split(",")))
    if not values.set and (values.models or values.set_path):
        raise InputError(f"--set is missing: expected one of {', '.join(SETS)}")
    if values.set:
        request = Request(
            values.set,
            values.set_path,
            values.real,
            values.clean,
            average,
            values.batch_size,
            predictions=values.predictions,
        )
        models, checkpoints = values.models, values.checkpoints
        given = cli.given_fields()
        return main_of_sets(config, workdir, models, checkpoints, request, values.out, given)
    if not workdir:
        raise InputError("--workdir is missing")
    if values.predictions or average:
        return main_of_images(config, workdir, average, values.predictions, cli.given_fields())
    return main(config, workdir, cli.given_fields())


if __name__ == "__main__":
    flags.DEFINE_string("set", "", f"Another set than the dataset's: {', '.join(SETS)}.")
    flags.DEFINE_string("set_path", "", "Its folder.")
    flags.DEFINE_string("real", "", "Labels of --set=real; default: real.json in its folder.")
    flags.DEFINE_string("clean", "", "For a and r: the validation folder, of the same classes.")
    flags.DEFINE_string("models", "", "Names, patterns, or a folder of work directories.")
    flags.DEFINE_string("checkpoints", "", "Folder of their released files; default: download.")
    flags.DEFINE_string("out", "", "File for the table.")
    flags.DEFINE_string("predictions", "", "File for what is said of every image.")
    flags.DEFINE_string("average", "", "Views whose logits are averaged: flips, crops.")
    flags.DEFINE_integer("batch_size", 64, "Of --set; halved where memory is out.")
    cli.run(_program, needs_config=False, needs_workdir=False, in_parallel=True)
