"""Accuracy of a run's newest checkpoint: every validation image counted exactly once.

python -m hybrid_flax.evaluate --config=configs/gcvit_b.py --workdir=DIR

DIR is the work directory of a training run, or what `python -m convert` wrote. Several processes
can share the work, as they do in training; only the first has to see DIR.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from hybrid_flax import cli
from hybrid_flax.build import prepare
from hybrid_flax.data.loader import eval_batches
from hybrid_flax.data.transforms import EvalTransform
from hybrid_flax.distributed.batch import local_rows, round_up, to_devices
from hybrid_flax.settings import Settings
from hybrid_flax.start import trained_weights
from hybrid_flax.training.step import make_eval_step
from hybrid_flax.weights.functions import as_function

Results = dict[str, dict[str, float]]  # {"val": {"top1": …}}


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
      {name: {"top1": %, "top5": %, "loss": mean, "images": how many were counted}}; None if
      `should_stop` said so.
    """
    # Any batch size will do: rows are added, and masked, until it splits over the devices.
    batch_size = round_up(config.eval.batch_size, mesh)
    sums = {name: dict.fromkeys(("top1", "top5", "loss", "images"), 0.0) for name in weights}
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
    return {
        name: {
            "top1": 100 * total["top1"] / total["images"],
            "top5": 100 * total["top5"] / total["images"],
            "loss": total["loss"] / total["images"],
            "images": int(total["images"]),
        }
        for name, total in sums.items()
    }


def show_results(results: Results) -> str:
    """The results as lines for a person."""
    kinds = {"val": "trained weights ", "val_ema": "averaged weights"}
    return "\n".join(
        f"  {kinds[name]}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, "
        f"loss {result['loss']:.4f} over {result['images']} images"
        for name, result in results.items()
        if name in kinds
    )


def main(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Evaluates the newest intact checkpoint of a work directory and prints the result."""
    prepared = prepare(config, "val")
    settings, source, mesh, model = prepared
    found = trained_weights(prepared, workdir)
    averaged = {"val_ema": found.averaged} if found.averaged else {}
    results = evaluate(
        make_eval_step(as_function(model), settings.dataset, mesh),
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
    cli.run(main, in_parallel=True)
