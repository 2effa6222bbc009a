"""One training run, from top to bottom: build, restore, loop, save.

The loop's order is what makes resuming exact: whatever is due at a step (checkpoint, evaluation)
happens before the next batch is used, and which batch that is follows from the step alone.

In a run of several processes all of them walk through the same lines. Only the first has the work
directory, writes and speaks: the `record` of the others is silent. What it alone knows it tells the
others (`from_first`).
"""

import contextlib
import functools
import logging
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from hybrid_flax.build import (
    Program,
    batch_shapes,
    check_same_everywhere,
    checked,
    evaluation_step,
    open_splits,
    training_program,
)
from hybrid_flax.data.feed import Data, Feed
from hybrid_flax.data.identity import check_same_data
from hybrid_flax.distributed.batch import check_batch_size
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.distributed.processes import from_first, is_first
from hybrid_flax.distributed.shardings import memory_table, show_memory_table
from hybrid_flax.distributed.step_status import StatusExchange
from hybrid_flax.distributed.transfer import broadcast_from_first, gather_to_host, put
from hybrid_flax.errors import TrainingError, closed_after
from hybrid_flax.evaluate import Results, evaluate, show_results
from hybrid_flax.run.cadence import Cadence
from hybrid_flax.run.compilation_cache import FOLDER, cached
from hybrid_flax.run.compiling import CompiledOnce, compiling
from hybrid_flax.run.metrics import Numbers, PendingMetrics
from hybrid_flax.run.phases import Phases
from hybrid_flax.run.progress import seconds_at_peak
from hybrid_flax.run.record import Record
from hybrid_flax.run.saved_program import check_file, saved
from hybrid_flax.run.silent_record import SilentRecord
from hybrid_flax.run.skipped_steps import NonFiniteStep, SkippedSteps, is_finite, skip_or_raise
from hybrid_flax.run.stop_signal import StopSignal
from hybrid_flax.run.supervision import Supervision, supervised
from hybrid_flax.settings import Settings, Tree
from hybrid_flax.start import initial_weights
from hybrid_flax.training.step import State, weights_of
from hybrid_flax.versions import check_same_numerics
from hybrid_flax.weights.paths import flatten, unflatten_like


def train(
    config: Tree,
    workdir: str,
    *,
    profile: str = "",
    compilation_cache: str | None = None,
    saved_program: str = "",
    build: Callable[[Settings, Mesh, int], Program] = training_program,
) -> int:
    """Trains until the config's last epoch, continuing what the work directory holds.

    Args:
      profile: "FIRST:LAST" steps to record into WORKDIR/profile; "": none.
      compilation_cache: see `compilation_cache.cached`; by default WORKDIR/compiled.
      saved_program: file with the compiled training step, see `saved_program.py`; "": none.
      build: makes the program of settings, for a mesh and so many steps per epoch.

    Returns:
      The exit status: 0 when the run is finished, 128 + the signal after a stop that was asked for.

    Raises:
      InputError: the config, the data or the work directory cannot be used.
      TrainingError: the loss became non-finite, or a checkpoint could not be written.
    """
    if saved_program:
        check_file(saved_program)
    with supervised() as watch:
        phases = watch.phases
        settings, train_source, val_source = open_splits(checked(config))
        watch.watchdog.seconds = settings.watchdog_seconds
        check_same_everywhere(settings, train_source, val_source)
        mesh = make_mesh(**vars(settings.mesh))
        check_batch_size(settings.batch_size, settings.accumulation_steps, mesh)
        data = Data(settings, train_source, val_source, mesh)
        with phases("build"):
            program = build(settings, mesh, data.steps_per_epoch)
        record: Record | SilentRecord = SilentRecord(workdir)
        if is_first():
            fastest = seconds_at_peak(program.flops, settings.model.dtype, mesh.size)
            record = Record(settings, workdir, phases, profile=profile, seconds_at_peak=fastest)
        cache = cached(compilation_cache, f"{workdir.rstrip('/')}/{FOLDER}")
        return run(program, data, record, settings, mesh, watch, cache, saved_program)


class Job(NamedTuple):
    """Everything that stays the same from the first step to the last."""

    program: Program
    train_step: CompiledOnce
    eval_step: Callable[..., Any]
    data: Data
    record: Record | SilentRecord
    config: Settings
    mesh: Mesh
    phases: Phases
    stop: StopSignal
    cadence: Cadence


def run(
    program: Program,
    data: Data,
    record: Record | SilentRecord,
    config: Settings,
    mesh: Mesh,
    watch: Supervision,
    cache: contextlib.AbstractContextManager[None],
    saved_program: str = "",
) -> int:
    """Runs a program to its end, or until it is asked to stop; returns the exit status.

    Args:
      cache: of compiled programs, entered when the work directory belongs to this process.

    Raises:
      InputError: the work directory or its checkpoints cannot be used.
      TrainingError: the loss became non-finite, or a checkpoint or record could not be written.
    """
    with record, cache, compiling() as threads:
        watch.watchdog.file = record.stall_file
        steps = (
            CompiledOnce(program.train_step, "training step", saved(saved_program, mesh)),
            evaluation_step(program),
        )
        cadence = Cadence.from_config(config, data.steps_per_epoch)
        job = Job(program, *steps, data, record, config, mesh, watch.phases, watch.stop, cadence)
        try:
            _introduce(job)
            _begin_to_compile(job, threads)
            with watch.stop.deferred():
                return _train(job)
        except OSError as error:
            raise TrainingError(record.interrupted(error)) from error


def _begin_to_compile(job: Job, threads: ThreadPoolExecutor) -> None:
    """Lets both steps compile while the run is restored and the first images are read."""
    newest = from_first("look for checkpoints", job.record.newest_step)
    if jax.default_backend() == "gpu" or newest == job.cadence.total_steps:
        return  # GPUs' compiler measures on the devices; a finished run compiles nothing
    state, config = job.program.placed(), job.config
    if not config.dataset.label_maps:
        job.train_step.begin(threads, state, batch_shapes(config, job.mesh))
    images = batch_shapes(config, job.mesh, evaluation=True)
    if isinstance(job.eval_step, CompiledOnce):
        job.eval_step.begin(threads, weights_of(state), images)


def _train(job: Job) -> int:
    """Begins or continues, and does so again after a step for which the run is rolled back."""
    config, phases = job.config, job.phases
    rolled_back_from = None
    while True:
        with phases("restore"):
            step, state, skipped = _begin_or_continue(job, rolled_back_from)
        phases.enter("start")
        try:
            return _loop(job, step, state, skipped)
        except NonFiniteStep as error:
            limit = config.non_finite_limit if config.on_non_finite == "roll_back" else 0
            if error.skipped.rolled_back >= limit:
                images = job.data.images_of(error.batch) if is_first() else {}
                raise TrainingError(job.record.non_finite(error, images)) from error
            logging.warning("%s; going back to the last checkpoint", error)
            rolled_back_from = error


def _introduce(job: Job) -> None:
    """Says what is going to be trained, and where its arrays lie."""
    config, data, state = job.config, job.data, job.program.state
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    table = show_memory_table(memory_table(state, job.program.shardings))
    said = (
        f"{config.model.name}, {parameters:,} parameters, {config.model.image_size} pixels; "
        f"{config.dataset.name}, {len(data.train):,} training and {len(data.val):,} "
        f"validation images; {job.cadence.total_steps:,} steps of {config.batch_size} "
        f"images on {job.mesh.size} {jax.devices()[0].device_kind} device(s){processes}"
    )
    if job.mesh.size > 1:
        said += f"\nmesh {dict(job.mesh.shape)}: {table}"
    job.record.introduce(said, state["params"], table)
    job.record.write_classes(data.train.class_names)


def _begin_or_continue(
    job: Job, rolled_back_from: NonFiniteStep | None
) -> tuple[int, State, SkippedSteps]:
    """(steps done, state, skipped steps) of the newest intact checkpoint, or of a fresh start."""
    program, record = job.program, job.record
    restored = record.restore(program.state)
    found = from_first(
        "read the newest checkpoint", lambda: restored and [restored.step, restored.meta]
    )
    if found:
        step, meta = found
        check_same_data(job.data.fingerprint, meta.get("data", {}), step)
        check_same_numerics(meta.get("numerics", {}), step)
        arrays = broadcast_from_first(restored.arrays if restored else None, flatten(program.state))
        state = put(unflatten_like(program.state, arrays), program.shardings)
        skipped = SkippedSteps(*meta.get("mishaps", SkippedSteps()))
        print(f"continuing from the checkpoint of step {step}")
    else:
        step, skipped = 0, SkippedSteps()
        with job.phases("build"):
            names = job.data.train.class_names
            weights = initial_weights(job.config, program.fresh, job.mesh, names)
            state = jax.jit(program.begin, out_shardings=program.shardings)(weights)
    record.clear_after(step if found else -1)
    if rolled_back_from:
        skipped = rolled_back_from.after_rolling_back(step, skipped)
    if step < job.cadence.total_steps:
        record.check_space(program.state)
    return step, state, skipped


def _loop(job: Job, step: int, state: State, skipped: SkippedSteps) -> int:
    data, record, phases, total_steps = job.data, job.record, job.phases, job.cadence.total_steps
    exchange, pending = StatusExchange(job.mesh), PendingMetrics()
    feed = data.batches_from(step + skipped.batches_left_out)
    due = job.cadence.at(step)

    def asked_to_stop() -> bool:
        phases.alive()
        waited = phases.seconds()["input wait"]
        return exchange.at_step(job.stop.received, waited).stop is not None

    with (
        record.training(step, total_steps),
        closed_after(feed.close),
        jax.transfer_guard("disallow"),
    ):
        evaluated = set(from_first("read the evaluations", record.evaluated_steps))
        phases.enter("train")
        while not asked_to_stop():
            if due.evaluate and step not in evaluated:
                skipped = _log(job, pending.fetch(), skipped, exchange, feed)
                with phases("evaluate"):
                    results = _evaluate(job, state, asked_to_stop)
                    if results is None:
                        break
                    record.evaluation(step, results, show_results(results))
                evaluated.add(step)
                is_among_best = functools.partial(record.is_among_best, step)
                if from_first("rate the evaluation", is_among_best):
                    _save(job, step, state, skipped)
            if step == total_steps:
                break
            first = not phases.seconds()["first step"]
            with phases("first batch" if first else "input wait"):
                batch = next(feed)
                if pending.in_flight():
                    phases.was("train")  # the devices had work meanwhile
            with phases("compile" if first else "train"):
                made = job.train_step.ready(state, batch)
            with record.step(step + 1), phases("first step" if first else "train"):
                state, metrics = job.train_step(state, batch)
                if first:
                    jax.block_until_ready(metrics)
            step += 1
            pending.add(step, metrics)
            record.stepped(step, metrics)
            if first:
                record.started(step, made)
            due = job.cadence.at(step)
            if due.log:
                skipped = _log(job, pending.fetch(but_newest=True), skipped, exchange, feed)
            if due.save:
                skipped = _log(job, pending.fetch(), skipped, exchange, feed)
                _save(job, step, state, skipped)
        skipped = _log(job, pending.fetch(), skipped, exchange, feed)
        _save(job, step, state, skipped)
        with phases("save"):
            finish = functools.partial(record.finish, step, step == total_steps)
            from_first("write the last checkpoint", finish)

    stop = exchange.last.stop
    if stop and total_steps not in evaluated:
        if stop == signal.SIGPIPE:
            raise TrainingError(
                "nobody reads what training says (standard output cannot be written): stopped at "
                f"step {step}, which is saved; the same command continues"
            )
        print(f"stopped by {stop.name}; step {step} is saved, the same command continues")
        return 128 + stop
    print(f"finished: {total_steps} steps of {job.config.model.name}")
    print(show_results(record.results(total_steps)))
    print(f"  {record.account()}")
    return 0


def _log(
    job: Job,
    steps: list[tuple[int, Numbers]],
    skipped: SkippedSteps,
    exchange: StatusExchange,
    feed: Feed,
) -> SkippedSteps:
    """Records steps that are done, and counts those that were not finite.

    Raises:
      NonFiniteStep: there was one, and it is not to be skipped.
    """
    limit = job.config.non_finite_limit if job.config.on_non_finite == "skip" else 0
    parameters = list(flatten(job.program.state["params"]))
    for step, numbers in steps:
        if not is_finite(numbers):
            skipped = skip_or_raise(step, numbers, skipped, parameters=parameters, limit=limit)
    finite = [(step, numbers) for step, numbers in steps if is_finite(numbers)]
    job.record.log(finite, exchange.last.waited, skipped, feed.unreadable)
    return skipped


def _evaluate(job: Job, state: State, asked_to_stop: Callable[[], bool]) -> Results | None:
    """Evaluates the trained weights, and the averaged ones if there are any."""
    weights = {"val": weights_of(state)}
    if "ema" in state:
        weights["val_ema"] = state["ema"]
    return evaluate(
        job.eval_step,
        weights,
        job.data.val_transform,
        job.config,
        job.mesh,
        should_stop=asked_to_stop,
    )


def _save(job: Job, step: int, state: State, skipped: SkippedSteps) -> None:
    with job.phases("save"):
        job.record.save(step, gather_to_host(state), skipped, job.data.fingerprint)
