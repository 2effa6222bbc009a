"""Compiles a config's training step for machines that are not here, and says what it needs."""

import collections
import re
import time
from collections.abc import Iterable
from typing import Any

import jax
import ml_collections

from hybrid_flax import settings
from hybrid_flax.build import batch_shapes, checked, training_program
from hybrid_flax.costs import compile_only
from hybrid_flax.costs.hlo_text import collectives, largest
from hybrid_flax.costs.targets import GIB, Target, find_target, set_up
from hybrid_flax.costs.traffic import memory_traffic
from hybrid_flax.distributed.batch import batch_parts, check_batch_size
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.distributed.shardings import memory_table
from hybrid_flax.errors import InputError
from hybrid_flax.run import saved_program
from hybrid_flax.sign_of_life import alive
from hybrid_flax.versions import versions
from pallas.dispatch import Call, recorded

IMAGENET = 1_281_167  # training images, for schedules that count epochs


def plan(
    config: ml_collections.ConfigDict,
    target: Target,
    quick: bool = False,
    *,
    save: str = "",
    train_images: int = IMAGENET,
) -> dict[str, Any]:
    """Compiles the config's training step for the target and says what it needs.

    Bytes are those of one chip. `fits` is whether the program does; without it only what is known
    without a program may be there. `quick` stops before machine code is made, and leaves out its
    size (a few hundredths of a TPU's memory); only TPUs' compilers can. `save` is a file for the
    compiled step, `train_images` how many there are: schedules count epochs.

    Raises:
      InputError: the config cannot be used, or its mesh or batch not be split over the chips.
    """
    if quick and target.platform != "tpu":
        raise InputError(f"--quick: only TPUs' compilers can, not that of {target.name}")
    started = time.perf_counter()
    try:
        if quick:
            found, text, peak, temporary = compile_only.buffer_assignment(
                lower_for, config, target.name, max(1, config.mesh.num_slices)
            )
        else:
            found, lowered = lower(config, target, train_images)
            compiled = lowered.compile()
            text, peak, temporary = _with_code(compiled)
            if save:
                mesh = make_mesh(target.devices, **vars(checked(config).mesh))
                about = saved_program.fingerprint(lowered, mesh)
                found["saved_bytes"] = saved_program.save(save, compiled, about)
    except (jax.errors.JaxRuntimeError, compile_only.CompilerError) as error:
        needed = re.search(r"Used ([\d.]+)([GM]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        peak = round(float(needed[1]) * (GIB if needed[2] == "G" else 2**20))
        return lower(config, target)[0] | {"fits": False, "peak_bytes": peak}
    return found | {
        "fits": peak <= target.memory,
        "peak_bytes": peak,
        "temporary_bytes": temporary,
        "memory_traffic": memory_traffic(text),
        "collectives": collectives(text),
        "largest": largest(text),
        "machine_code": not quick,
        "compile_seconds": round(time.perf_counter() - started, 1),
    }


def _with_code(compiled: jax.stages.Compiled) -> tuple[str, int, int]:
    """Returns (text, bytes in a chip's memory, temporary bytes)."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise compile_only.CompilerError("the compiler tells nothing of memory or program")
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return text, peak, memory.temp_size_in_bytes


def lower(
    asked: ml_collections.ConfigDict, target: Target, train_images: int = IMAGENET
) -> tuple[dict[str, Any], Any]:
    """Lowers a config's training step for the target: (what is known of it, the step)."""
    config = checked(asked)
    if not config.model.num_classes:
        config = settings.replace(config, {"model.num_classes": 1000})
    mesh = make_mesh(target.devices, **vars(config.mesh))
    check_batch_size(config.batch_size, config.accumulation_steps, mesh)
    steps_per_epoch = max(1, train_images // config.batch_size)
    with recorded() as calls:
        program = training_program(config, mesh, steps_per_epoch)
        traced = program.train_step.trace(program.placed(), batch_shapes(config, mesh))
    split = memory_table(program.state, program.shardings)
    found = {
        "topology": target.name,
        "chips": mesh.size,
        "slices": max(1, config.mesh.num_slices),
        "mesh": dict(mesh.shape),
        "model": config.model.name,
        "batch_size": config.batch_size,
        "batch_per_chip": config.batch_size // batch_parts(mesh),
        "accumulation_steps": config.accumulation_steps,
        "bytes_of_state": {
            name: sum(share.chip_bytes for share in split if share.part == name)
            for name in program.state
        },
        "split": [share._asdict() for share in split],
        "flops_per_chip": program.flops() // mesh.size,
        "kernels": _kernels(calls, target.platform),
        "memory": target.memory,
        "versions": versions(),
    }
    return found, traced.lower(lowering_platforms=(target.platform,))


def lower_for(config: ml_collections.ConfigDict, name: str, num_slices: int):
    """Calls `lower` in a process where nothing is set up."""
    set_up()
    return lower(config, find_target(name, num_slices))


def largest_batch(config: ml_collections.ConfigDict, target: Target, quick: bool = False) -> int:
    """Finds the most images a step that fit: a multiple of 8 per chip and micro-batch, 0 if none.

    Chips that share their images (the mesh's axis `tensor`) count as one here.

    Compiles once for each try: twice as many, or half, then between.
    """
    config = ml_collections.ConfigDict(config)
    parts = batch_parts(make_mesh(target.devices, **vars(checked(config).mesh)))
    unit = 8 * parts * config.accumulation_steps

    def fits(units: int) -> bool:
        alive()
        config.batch_size = units * unit
        config.augment.mix_group = config.model.batch_norm_group = 0
        return plan(config, target, quick)["fits"]

    low, high = 0, max(1, config.batch_size // unit)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def _kernels(calls: Iterable[Call], platform: str) -> dict[str, int]:
    """Counts calls: {"kernel", or why XLA: how many}."""
    chosen = (choices[platform] for _, choices in calls)
    return dict(collections.Counter("kernel" if c.kernel else f"XLA: {c.why}" for c in chosen))
