"""Accuracy of a run's newest checkpoint: every validation image counted exactly once.

python -m hybrid_flax.evaluate --workdir=DIR [--config=configs/gcvit_b.py]

DIR is the work directory of a training run, or what `python -m convert` wrote, which needs a
config. A run has its own settings; fields that are given (`--config.dataset.path=…`) are used
instead of them, and it is said how (`as_trained.py`). Classes have the numbers that they were
trained with, by their names. Several processes can share the work, as they do in training; only the
first has to see DIR.
"""

import contextlib
import logging
from collections.abc import Callable, Collection
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from hybrid_flax import cli
from hybrid_flax.build import resolve_classes
from hybrid_flax.data.loader import eval_batches
from hybrid_flax.data.transforms import EvalTransform
from hybrid_flax.distributed.batch import local_rows, round_up, to_devices
from hybrid_flax.errors import InputError
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


if __name__ == "__main__":
    cli.run(
        lambda config, workdir: main(config, workdir, cli.given_fields()),
        needs_config=False,
        in_parallel=True,
    )
