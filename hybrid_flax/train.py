"""One training run, from top to bottom: build, restore, loop, save.

The loop's order is what makes resuming exact: whatever is due at a step (checkpoint, evaluation)
happens before the next batch is used, and which batch that is follows from the step alone.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from clu.parameter_overview import get_parameter_overview
from jax.sharding import Mesh

from hybrid_flax import bridge
from hybrid_flax.checkpoints import Checkpoints
from hybrid_flax.config import check, resolve_classes
from hybrid_flax.data.loader import (
    Batch,
    EvalTransform,
    TrainTransform,
    batches_per_epoch,
    train_batches,
)
from hybrid_flax.data.sources import Source, check_same_data, fingerprint, source_of
from hybrid_flax.distributed.mesh import check_batch_size, make_mesh, replicated, to_devices
from hybrid_flax.distributed.preemption import StopSignal
from hybrid_flax.errors import TrainingError
from hybrid_flax.evaluate import evaluate, show_results
from hybrid_flax.init_from import initial_weights
from hybrid_flax.program import training_program
from hybrid_flax.training.metrics import MetricWriter, draw_curves
from hybrid_flax.training.progress import Progress
from hybrid_flax.training.step import make_eval_step, weights_of
from hybrid_flax.workdir import Workdir, to_plain


def train(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Trains until the config's last epoch, continuing what the work directory holds.

    Returns:
      The exit status: 0 when the run is finished, 128 + the signal after a stop that was asked for.

    Raises:
      InputError: the config, the data or the work directory cannot be used.
      TrainingError: the loss became non-finite, or a checkpoint could not be written.
    """
    config = ml_collections.ConfigDict(config)
    check(config)
    train_source, val_source = (source_of(config.dataset, split) for split in ("train", "val"))
    resolve_classes(config, train_source)
    mesh = make_mesh()
    check_batch_size(config.batch_size, config.accumulation_steps, mesh)
    with Workdir(workdir, config) as run, StopSignal() as stop:
        return _train(config, run, stop, mesh, train_source, val_source)


def _train(
    config: ml_collections.ConfigDict,
    run: Workdir,
    stop: StopSignal,
    mesh: Mesh,
    train_source: Source,
    val_source: Source,
) -> int:
    # ------------------------------------------------------------------- the data, both steps
    transform = TrainTransform.from_config(config, train_source)
    steps_per_epoch = batches_per_epoch(train_source, config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    eval_every = config.eval.every_epochs * steps_per_epoch
    model, train_step, begin, template = training_program(config, mesh, steps_per_epoch)
    eval_step = make_eval_step(bridge.as_function(model), config, mesh)

    # --------------------------------------------------------- continue this run, or begin it
    checkpoints = Checkpoints(run.checkpoints, keep=config.checkpoint.keep)
    restored = checkpoints.restore(template)
    if restored:
        check_same_data(train_source, restored[2].get("data", {}), restored[0])
    checkpoints.clear_after(restored[0] if restored else -1)
    if restored:
        step, arrays, _ = restored
        state = jax.device_put(bridge.unflatten_like(template, arrays), replicated(mesh))
        print(f"continuing {run.path} from the checkpoint of step {step}")
    else:
        step = 0
        weights = initial_weights(config, mesh)
        state = jax.jit(begin, out_shardings=replicated(mesh))(weights)

    run.write_text(
        "parameters.txt", get_parameter_overview(template["params"], include_stats=False)
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(template["params"]))
    print(
        f"{config.model.name}, {parameters:,} parameters, {config.model.image_size} pixels; "
        f"{config.dataset.name}, {len(train_source):,} training and {len(val_source):,} validation "
        f"images; {total_steps:,} steps of {config.batch_size} images on {mesh.size} "
        f"{jax.devices()[0].device_kind} device(s)"
    )

    # ------------------------------------------------------------------------------- the loop
    meta = {
        "model": config.model.name,
        "num_classes": config.model.num_classes,
        "image_size": config.model.image_size,
        "data": fingerprint(train_source),
        "config": to_plain(config),
    }
    batches = train_batches(
        transform,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=step,
        num_workers=config.dataset.num_workers,
        repeats=config.augment.repeats,
        group=config.augment.mix_group,
    )
    feed = _feed(batches, mesh)
    val_transform = EvalTransform.from_config(config, val_source)
    writer = MetricWriter(run.path, run.metrics, start_step=step)
    evaluated = {record["step"]: record for record in writer.records if "val/top1" in record}
    progress = Progress(config.batch_size, step, total_steps)
    pending: list[tuple[int, dict[str, Any]]] = []  # (step, metrics that are still on the device)
    unreadable = 0

    def log(count: int) -> None:
        """Fetches, checks and records the metrics of the `count` oldest pending steps."""
        fetched = [(at, jax.device_get(metrics)) for at, metrics in pending[:count]]
        del pending[:count]
        for at, metrics in fetched:
            if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"]):
                checkpoints.wait()
                raise TrainingError(_non_finite(at, metrics, checkpoints))
        if fetched:
            at, numbers = fetched[-1]
            numbers["loss"] = np.mean([metrics["loss"] for _, metrics in fetched])
            numbers |= progress.report(at, float(numbers["loss"]))
            if unreadable:
                numbers["unreadable_images"] = unreadable
            writer.write(at, **{f"train/{name}": float(x) for name, x in numbers.items()})

    with contextlib.closing(writer), contextlib.closing(progress), contextlib.closing(batches):
        while not stop.received:
            if step and (step % eval_every == 0 or step == total_steps) and step not in evaluated:
                log(len(pending))
                averaged = {"val_ema": state["ema"]} if "ema" in state else {}
                with progress.paused():
                    results = evaluate(
                        eval_step,
                        {"val": weights_of(state), **averaged},
                        val_transform,
                        config,
                        mesh,
                        should_stop=lambda: stop.received is not None,
                    )
                if results is None:
                    break
                evaluated[step] = writer.write(step, **bridge.flatten(results))
                draw_curves(writer.records, run.curves, f"{config.model.name}, {run.path}")
                progress.say(f"step {step}:\n{show_results(results)}")
            if step == total_steps:
                break
            with progress.waiting():
                batch, skipped = next(feed)
            unreadable += skipped
            state, metrics = train_step(state, batch)
            step += 1
            pending.append((step, metrics))
            progress.stepped()
            if (step - 1) % config.log_every_steps == 0:
                log(len(pending) - 1)  # one step late: the device must never wait for us
            if step % config.checkpoint.every_steps == 0 or step == total_steps:
                log(len(pending))
                with progress.paused():
                    checkpoints.save(step, state, meta)
        log(len(pending))
        checkpoints.save(step, state, meta)
        checkpoints.wait()

    if total_steps not in evaluated:
        print(f"stopped by {stop.received.name}; step {step} is saved, the same command continues")
        return 128 + stop.received
    print(f"finished: {total_steps} steps of {config.model.name}, all results in {run.path}")
    print(show_results(bridge.unflatten(evaluated[total_steps])))
    return 0


def _feed(batches: Iterator[Batch], mesh: Mesh) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """(batch on the devices, how many unreadable images it left out), copied one batch ahead."""
    ahead = None
    for batch in batches:
        names = [name for name in batch if name not in ("index", "unreadable")]
        on_devices = to_devices({name: batch[name] for name in names}, mesh)
        if ahead:
            yield ahead
        ahead = on_devices, int(batch["unreadable"].sum())


def _non_finite(step: int, metrics: dict[str, Any], checkpoints: Checkpoints) -> str:
    steps = checkpoints.steps()
    last = checkpoints.directory / str(steps[-1]) if steps else "none was saved yet"
    return (
        f"at step {step} the loss is {metrics['loss']} and the gradient norm "
        f"{metrics['grad_norm']}; nothing was saved after that. Last good checkpoint: {last}. To "
        "go on from it with other settings: a new --workdir, --config.init_from= this one, and for "
        "example a lower --config.optimizer.learning_rate"
    )
