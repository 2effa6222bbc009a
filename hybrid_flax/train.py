"""One training run, from top to bottom: build, restore, loop, save.

The loop's order is what makes resuming exact: whatever is due at a step (checkpoint, evaluation)
happens before the next batch is used, and which batch that is follows from the step alone.

In a run of several processes all of them walk through the same lines. Only the first has the work
directory (`run`), writes and speaks; what it alone knows it tells the others (`from_first`).
"""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from clu.parameter_overview import get_parameter_overview
from jax.sharding import Mesh

from hybrid_flax.build import (
    CompiledOnce,
    Program,
    checked,
    resolve_classes,
    training_program,
)
from hybrid_flax.data.loader import train_batches
from hybrid_flax.data.order import batches_per_epoch, images_of_batch
from hybrid_flax.data.sources import Source, check_same_data, fingerprint, source_of
from hybrid_flax.data.transforms import Batch, EvalTransform, TrainTransform
from hybrid_flax.distributed.batch import check_batch_size, local_rows, to_devices
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.distributed.processes import from_first, is_first
from hybrid_flax.distributed.shardings import memory_table, show_memory_table
from hybrid_flax.distributed.step_status import StatusExchange, StepStatus
from hybrid_flax.distributed.transfer import broadcast_from_first, gather_to_host, put
from hybrid_flax.errors import InputError, TrainingError
from hybrid_flax.evaluate import evaluate, show_results
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.run.goodput import Ledger
from hybrid_flax.run.metrics import MetricWriter, draw_curves
from hybrid_flax.run.phases import Phases
from hybrid_flax.run.profiling import Profile
from hybrid_flax.run.progress import Progress, seconds_at_peak
from hybrid_flax.run.skipped_steps import NonFiniteStep, SkippedSteps, is_finite
from hybrid_flax.run.stop_signal import StopSignal
from hybrid_flax.run.storage.bucket import is_bucket
from hybrid_flax.run.watchdog import Watchdog
from hybrid_flax.run.workdir import Workdir, differences
from hybrid_flax.settings import FIELDS, Settings, to_plain
from hybrid_flax.start import initial_weights
from hybrid_flax.training.step import State, make_eval_step, weights_of
from hybrid_flax.versions import versions
from hybrid_flax.weights.functions import as_function
from hybrid_flax.weights.paths import flatten, unflatten, unflatten_like


class Job(NamedTuple):
    """What stays the same from the first step to the last."""

    config: Settings
    mesh: Mesh
    program: Program
    train_step: CompiledOnce
    train_source: Source
    val_source: Source
    stop: StopSignal
    phases: Phases
    ledger: Ledger
    profile: Profile
    run: Workdir | None  # in the first process; the others write nothing
    checkpoints: Checkpoints | None  # likewise


def train(config: ml_collections.ConfigDict, workdir: str, *, profile: str = "") -> int:
    """Trains until the config's last epoch, continuing what the work directory holds.

    Args:
      profile: "FIRST:LAST" steps to record into WORKDIR/profile; "": none.

    Returns:
      The exit status: 0 when the run is finished, 128 + the signal after a stop that was asked for.

    Raises:
      InputError: the config, the data or the work directory cannot be used.
      TrainingError: the loss became non-finite, or a checkpoint could not be written.
    """
    phases = Phases()
    settings = checked(config)
    train_source, val_source = (source_of(settings.dataset, split) for split in ("train", "val"))
    settings = resolve_classes(settings, train_source)
    run = Workdir(workdir, settings) if is_first() else None
    recorder = Profile(profile, os.path.join(run.path, "profile")) if run else Profile("", "")
    _check_same_everywhere(settings, train_source, val_source)
    mesh = make_mesh(**vars(settings.mesh))
    check_batch_size(settings.batch_size, settings.accumulation_steps, mesh)
    with contextlib.ExitStack() as stack:
        if run:
            stack.enter_context(run)
        stop = stack.enter_context(StopSignal())
        stall = f"stall-{jax.process_index()}.txt"
        stall = None if is_bucket(workdir) else os.path.join(workdir, stall)
        stack.enter_context(Watchdog(phases, settings.watchdog_seconds, stall))
        stack.callback(recorder.close)
        steps_per_epoch = batches_per_epoch(train_source, settings.batch_size)
        program = training_program(settings, mesh, steps_per_epoch)
        job = Job(
            settings,
            mesh,
            program,
            CompiledOnce(program.train_step),
            train_source,
            val_source,
            stop,
            phases,
            Ledger(run.ledger if run else None, phases),
            recorder,
            run,
            _checkpoints(settings, run) if run else None,
        )
        _introduce(job, steps_per_epoch)
        rolled_back_from = None
        while True:
            with phases("restore"):
                step, state, mishaps = _begin_or_continue(job, rolled_back_from)
            phases.enter("start")
            try:
                return _loop(job, steps_per_epoch, step, state, mishaps)
            except NonFiniteStep as error:
                if (
                    settings.on_non_finite != "roll_back"
                    or error.mishaps.rolled_back >= settings.non_finite_limit
                ):
                    raise TrainingError(_report(job, error)) from error
                logging.warning("%s; going back to the last checkpoint", error)
                rolled_back_from = error


def _check_same_everywhere(config: Settings, *sources: Source) -> None:
    """Raises InputError if this process was not started with the settings and data of the first."""
    mine = to_plain(config) | {f"data {i}": fingerprint(source) for i, source in enumerate(sources)}
    mine["commit"] = versions()["commit"]
    of_host = [field.name for field in FIELDS.values() if field.of_host]
    first = from_first("compare the settings", lambda: mine)
    if lines := [
        f"  {name}: there {theirs!r}, here {ours!r}"
        for name, theirs, ours in differences(first, mine, of_host)
    ]:
        raise InputError(
            "this process was started with other settings, data or code than the first one; give "
            "the same to all:\n" + "\n".join(lines)
        )


def _introduce(job: Job, steps_per_epoch: int) -> None:
    """Says, and writes, what is going to be trained, and where its arrays lie."""
    config, state = job.config, job.program.state
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(
        f"{config.model.name}, {parameters:,} parameters, {config.model.image_size} pixels; "
        f"{config.dataset.name}, {len(job.train_source):,} training and {len(job.val_source):,} "
        f"validation images; {config.epochs * steps_per_epoch:,} steps of {config.batch_size} "
        f"images on {job.mesh.size} {jax.devices()[0].device_kind} device(s){processes}"
    )
    table = show_memory_table(memory_table(state, job.program.shardings))
    if job.mesh.size > 1:
        print(f"mesh {dict(job.mesh.shape)}: {table}")
    if job.run:
        overview = get_parameter_overview(state["params"], include_stats=False)
        job.run.write_text("parameters.txt", f"{overview}\n\n{table}\n")


def _begin_or_continue(
    job: Job, rolled_back_from: NonFiniteStep | None
) -> tuple[int, State, SkippedSteps]:
    """(steps done, state, mishaps) of the newest intact checkpoint, or of a fresh start."""
    program, arrays = job.program, None

    def newest():
        nonlocal arrays
        job.checkpoints.wait()  # one may still be on its way when a run rolls back
        restored = job.checkpoints.restore(program.state)
        if restored is None:
            return None
        step, arrays, meta = restored
        return {"step": step, "meta": meta}

    found = from_first("read the newest checkpoint", newest)
    if found:
        step, meta = found["step"], found["meta"]
        check_same_data(job.train_source, meta.get("data", {}), step)
        arrays = broadcast_from_first(arrays, flatten(program.state))
        state = put(unflatten_like(program.state, arrays), program.shardings)
        mishaps = SkippedSteps(*meta.get("mishaps", SkippedSteps()))
        print(f"continuing from the checkpoint of step {step}")
    else:
        step, mishaps = 0, SkippedSteps()
        weights = initial_weights(job.config, job.mesh)
        state = jax.jit(program.begin, out_shardings=program.shardings)(weights)
    if job.checkpoints:
        job.checkpoints.clear_after(step if found else -1)
    if rolled_back_from:
        mishaps = rolled_back_from.after_rolling_back(step, mishaps)
    return step, state, mishaps


def _loop(job: Job, steps_per_epoch: int, step: int, state: State, mishaps: SkippedSteps) -> int:
    config, mesh, run, checkpoints = job.config, job.mesh, job.run, job.checkpoints
    phases, ledger = job.phases, job.ledger
    total_steps = config.epochs * steps_per_epoch
    if checkpoints and step < total_steps:
        checkpoints.check_space(job.program.state)
    eval_every = config.eval.every_epochs * steps_per_epoch
    eval_step = make_eval_step(
        as_function(job.program.model), config.dataset, mesh, weights_of(job.program.shardings)
    )
    val_transform = EvalTransform.from_config(config, job.val_source)
    agreement = StatusExchange(mesh)
    known = StepStatus(None, [0.0] * jax.process_count())
    batches = train_batches(
        TrainTransform.from_config(config, job.train_source),
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=step + mishaps.batches_left_out,
        num_workers=config.dataset.num_workers,
        repeats=config.augment.repeats,
        group=config.augment.mix_group,
        rows=local_rows(config.batch_size, mesh),
    )
    feed = _feed(batches, mesh)
    writer = MetricWriter(run.path, run.metrics, start_step=step) if run else None
    evaluations = from_first(
        "read the evaluations", lambda: [r for r in writer.records if "val/top1" in r]
    )
    evaluated = {record["step"]: record for record in evaluations}
    save_every = config.checkpoint.every_steps, config.checkpoint.keep_every_steps
    if total_steps not in evaluated:
        ledger.begin(step)
    if checkpoints:
        for at, record in evaluated.items():
            checkpoints.rate(at, _score(record))
    progress = Progress(
        phases,
        batch_size=config.batch_size,
        step=step,
        total_steps=total_steps,
        seconds_at_peak=seconds_at_peak(config, job.program.model, mesh.size),
        quiet=not is_first(),
    )
    pending: list[tuple[int, dict[str, Any]]] = []  # (step, metrics that are still on the device)
    waited = known.waited  # when something was last logged
    unreadable = 0

    def agree() -> bool:
        """Whether any process was asked to stop."""
        nonlocal known
        phases.alive()
        known = agreement.at_step(job.stop.received, phases.seconds()["input wait"])
        return known.stop is not None

    def write(step: int, numbers: dict[str, float]) -> dict[str, float]:
        return writer.write(step, **numbers) if writer else {"step": step} | numbers

    def log(count: int) -> None:
        """Fetches, checks and records the metrics of the `count` oldest pending steps."""
        nonlocal mishaps, waited
        fetched = [(at, jax.device_get(metrics)) for at, metrics in pending[:count]]
        del pending[:count]
        for at, metrics in fetched:
            if not is_finite(metrics):
                mishaps = _pass_over(job, at, metrics, mishaps)
        fine = [(at, metrics) for at, metrics in fetched if is_finite(metrics)]
        if fine:
            at, numbers = fine[-1]
            del numbers["non_finite"]
            numbers["loss"] = np.mean([metrics["loss"] for _, metrics in fine])
            waits = [now - before for now, before in zip(known.waited, waited, strict=True)]
            waited = known.waited
            numbers |= progress.report(at, float(numbers["loss"]), waits)
            if unreadable:
                numbers["unreadable_images"] = unreadable
            if mishaps != SkippedSteps():
                numbers |= mishaps._asdict()
            write(at, {f"train/{name}": float(x) for name, x in numbers.items()})
            ledger.write(at)

    def save() -> None:
        with phases("save"):
            tree = gather_to_host(state)
            if checkpoints:
                run.push()  # what was recorded up to here
                checkpoints.save(step, tree, _meta(job, mishaps))
        ledger.write(step)

    def is_among_best() -> bool:
        return from_first(
            "rate the evaluation", lambda: checkpoints.rate(step, _score(evaluated[step]))
        )

    phases.enter("train")
    with contextlib.ExitStack() as stack:
        for each in (writer, progress, batches):
            if each:
                stack.enter_context(contextlib.closing(each))
        while not agree():
            if step and (step % eval_every == 0 or step == total_steps) and step not in evaluated:
                log(len(pending))
                averaged = {"val_ema": state["ema"]} if "ema" in state else {}
                with phases("evaluate"):
                    results = evaluate(
                        eval_step,
                        {"val": weights_of(state), **averaged},
                        val_transform,
                        config,
                        mesh,
                        should_stop=agree,
                    )
                if results is None:
                    break
                ledger.write(step)
                account = ledger.account()
                numbers = flatten(results) | {"run/goodput": account.goodput}
                evaluated[step] = write(step, numbers)
                if run:
                    draw_curves(writer.records, run.curves, f"{config.model.name}, {run.name}")
                progress.say(f"step {step}:\n{show_results(results)}\n  {account}")
                if config.checkpoint.keep_best and is_among_best():
                    save()
            if step == total_steps:
                break
            with phases("input wait"):
                batch, skipped = next(feed)
                if pending and not pending[-1][1]["loss"].is_ready():
                    phases.was("train")  # the devices had work meanwhile
            unreadable += skipped
            with job.profile.step(step + 1), phases("train" if progress.begun else "compile"):
                state, metrics = job.train_step(state, batch)
                if not progress.begun:
                    jax.block_until_ready(metrics)
            step += 1
            job.profile.after(step, metrics)
            pending.append((step, metrics))
            progress.stepped()
            if (step - 1) % config.log_every_steps == 0:
                log(len(pending) - 1)  # one step late: the device must never wait for us
            if step == total_steps or any(n and step % n == 0 for n in save_every):
                log(len(pending))
                save()
        log(len(pending))
        save()
        with phases("save"):
            from_first("write the last checkpoint", lambda: checkpoints.wait())
        ledger.write(step, finished=step == total_steps)

    if total_steps not in evaluated:
        print(f"stopped by {known.stop.name}; step {step} is saved, the same command continues")
        return 128 + known.stop
    print(f"finished: {total_steps} steps of {config.model.name}")
    print(show_results(unflatten(evaluated[total_steps])))
    print(f"  {ledger.account()}")
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


def _checkpoints(config: Settings, run: Workdir) -> Checkpoints:
    asked = config.checkpoint
    return Checkpoints(
        run.checkpoints,
        keep=asked.keep,
        keep_every_steps=asked.keep_every_steps,
        keep_best=asked.keep_best,
    )


def _score(record: dict[str, Any]) -> float:
    """Top-1 of an evaluation, of the averaged weights if there are any."""
    return record.get("val_ema/top1", record["val/top1"])


def _meta(job: Job, mishaps: SkippedSteps) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
        "model": job.config.model.name,
        "num_classes": job.config.model.num_classes,
        "image_size": job.config.model.image_size,
        "data": fingerprint(job.train_source),
        "config": to_plain(job.config),
        "mishaps": list(mishaps),
    }


def _pass_over(job: Job, step: int, metrics: dict[str, Any], mishaps: SkippedSteps) -> SkippedSteps:
    """Counts a step that was not finite as skipped; NonFiniteStep if that is not what to do."""
    parameters = list(flatten(job.program.state["params"]))
    number = int(metrics["non_finite"])
    error = NonFiniteStep(step, metrics, parameters[number] if number >= 0 else "", mishaps)
    if job.config.on_non_finite != "skip" or mishaps.skipped >= job.config.non_finite_limit:
        raise error
    logging.warning("%s; skipped, number %d", error, mishaps.skipped + 1)
    return mishaps._replace(skipped=mishaps.skipped + 1)


def _report(job: Job, error: NonFiniteStep) -> str:
    """Why the run stops, for its last message; what the batch was, for `non_finite.json`."""
    if not job.run:
        return str(error)
    job.checkpoints.wait()
    steps = job.checkpoints.steps()
    last = job.checkpoints.name(steps[-1]) if steps else "none was saved yet"
    config, source = job.config, job.train_source
    images = images_of_batch(
        source,
        error.batch,
        batch_size=config.batch_size,
        seed=config.seed,
        repeats=config.augment.repeats,
        group=config.augment.mix_group,
    )
    command = shlex.join(sys.orig_argv)
    names = {index: source.name(index) for index in images}
    job.run.write_json("non_finite.json", error.report(last, names, command))
    return (
        f"{error} (--config.on_non_finite={config.on_non_finite}, "
        f"--config.non_finite_limit={config.non_finite_limit}). It changed no weights, and nothing "
        f"was saved after it. Last checkpoint: {last}. The images of its batch are in "
        f"{job.run.name}/non_finite.json; the same command comes to it again: {command}. To go on, "
        "leave such steps out with --config.on_non_finite=skip or roll_back, or start from the "
        "checkpoint with other settings: a new --workdir, --config.init_from= this one, and for "
        "example a lower --config.optimizer.learning_rate"
    )
