"""What a training run would need on machines that are not here: compiled for them, not run.

python -m hybrid_flax.plan --config=configs/gcvit_l.py --topology=v5e:16x16 [--largest_batch]

The very step that `hybrid_flax.main` would run is compiled by the machines' own compiler, for the
config's batch and mesh; with --config.mesh.num_slices=2 for two slices of that topology. TPUs need
`pip install libtpu`, the H200 `pip install "jax[cuda13]"`; neither needs a chip. It takes minutes,
nearly all of them for machine code: `--quick` stops before it is made, on TPUs. `--json` prints the
figures alone.

Speed is not foretold: a compiler does not know it. `--scaling` shows what a simple model makes of
the figures (scaling.py says what it assumes).
"""

import collections
import json
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from jax.sharding import Mesh

from hybrid_flax import cli, settings
from hybrid_flax.build import Program, checked, training_program
from hybrid_flax.costs import compile_only, scaling
from hybrid_flax.costs.flops import training_flops
from hybrid_flax.costs.hlo_text import collectives, largest, memory_traffic
from hybrid_flax.costs.targets import EXAMPLES, GIB, Target, find_target, set_up
from hybrid_flax.distributed.batch import batch_parts, batch_sharded, check_batch_size
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.distributed.shardings import MemoryRow, memory_table, show_memory_table
from hybrid_flax.errors import InputError
from hybrid_flax.settings import Settings
from hybrid_flax.versions import versions
from pallas.dispatch import recorded

IMAGENET = 1_281_167  # training images, for schedules that count epochs


def plan(config: ml_collections.ConfigDict, target: Target, quick: bool = False) -> dict[str, Any]:
    """Compiles the config's training step for the target and says what it needs.

    Bytes are those of one chip. `fits` is whether the program does; without it only what is known
    without a program may be there. `quick` stops before machine code is made, and leaves out its
    size (a few hundredths of a TPU's memory); only TPUs' compilers can.

    Raises:
      InputError: the config cannot be used, or its mesh or batch not be split over the chips.
    """
    if quick and target.platform != "tpu":
        raise InputError(f"--quick: only TPUs' compilers can, not that of {target.name}")
    started = time.perf_counter()
    try:
        if quick:
            found, *program = compile_only.buffer_assignment(
                lower_for, config, target.name, max(1, config.mesh.num_slices)
            )
        else:
            found, lowered = lower(config, target)
            program = _with_code(lowered.compile())
    except (jax.errors.JaxRuntimeError, compile_only.CompilerError) as error:
        needed = re.search(r"Used ([\d.]+)([GM]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        peak = round(float(needed[1]) * (GIB if needed[2] == "G" else 2**20))
        return lower(config, target)[0] | {"fits": False, "peak_bytes": peak}
    text, peak, temporary = program
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


def _with_code(compiled) -> tuple[str, int, int]:
    """(text, bytes in a chip's memory, temporary bytes)"""
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return compiled.as_text(), peak, memory.temp_size_in_bytes


def lower(asked: ml_collections.ConfigDict, target: Target) -> tuple[dict[str, Any], Any]:
    """Lowers a config's training step for the target: (what is known of it, the step)."""
    config = checked(asked)
    if not config.model.num_classes:
        config = settings.replace(config, {"model.num_classes": 1000})
    mesh = make_mesh(target.devices, **vars(config.mesh))
    check_batch_size(config.batch_size, config.accumulation_steps, mesh)
    steps_per_epoch = max(1, IMAGENET // config.batch_size)
    with recorded() as calls:
        program = training_program(config, mesh, steps_per_epoch)
        traced = program.train_step.trace(_placed(program), _batch(config, mesh))
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
        "flops_per_chip": training_flops(program.model, config.model.image_size, config.batch_size)
        // mesh.size,
        "kernels": _kernels(calls, target.platform),
        "memory": target.memory,
        "versions": versions(),
    }
    return found, traced.lower(lowering_platforms=(target.platform,))


def lower_for(config: ml_collections.ConfigDict, name: str, num_slices: int):
    """`lower`, in a process where nothing is set up."""
    set_up()
    return lower(config, find_target(name, num_slices))


def largest_batch(config: ml_collections.ConfigDict, target: Target, quick: bool = False) -> int:
    """The most images per step that fit, as a multiple of 8 per chip and micro-batch; 0: not 8.

    Chips that share their images (the mesh's axis `tensor`) count as one here.

    Compiles once for each try: twice as many, or half, then between.
    """
    config = ml_collections.ConfigDict(config)
    parts = batch_parts(make_mesh(target.devices, **vars(checked(config).mesh)))
    unit = 8 * parts * config.accumulation_steps

    def fits(units: int) -> bool:
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


def _batch(config: Settings, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    side, split = config.model.image_size, batch_sharded(mesh)
    return {
        "image": jax.ShapeDtypeStruct(
            (config.batch_size, side, side, 3), jnp.uint8, sharding=split
        ),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=split),
    }


def _placed(program: Program):
    """The state's shapes and dtypes, where they lie."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        program.state,
        program.shardings,
    )


def _kernels(calls, platform: str) -> dict[str, int]:
    """{"kernel", or why XLA: how many calls}"""
    chosen = (choices[platform] for _, choices in calls)
    return dict(collections.Counter("kernel" if c.kernel else f"XLA: {c.why}" for c in chosen))


# ------------------------------------------------------------------------------------- for a person
def show(found: dict[str, Any]) -> str:
    """The plan as lines of text."""
    state = found["bytes_of_state"]
    room = found["memory"] - found["peak_bytes"]
    verdict = f"fits, {size(room)} to spare" if found["fits"] else f"does not fit by {size(-room)}"
    axes = " × ".join(f"{axis} {count}" for axis, count in found["mesh"].items() if count > 1)
    lines = [
        f"{found['model']} on {found['topology']}"
        + (f", {found['slices']} slices" * (found["slices"] > 1))
        + f": {found['chips']} chips, {found['batch_size']} images a step, "
        + f"{found['batch_per_chip']} on a chip"
        + (f" in {found['accumulation_steps']} parts" * (found["accumulation_steps"] > 1)),
        f"mesh: {axes or 'one chip'}",
        show_memory_table([MemoryRow(**share) for share in found["split"]]),
        "memory of a chip",
        *(f"  {name:12} {size(count)}" for name, count in state.items() if count > 4),
        *([f"  temporary    {size(found['temporary_bytes'])}"] * ("temporary_bytes" in found)),
        f"  at most      {size(found['peak_bytes'])} of {size(found['memory'])}: {verdict}",
        f"work of a chip: {found['flops_per_chip'] / 1e12:.2f} TFLOP a step",
        "windows and deformable sampling: "
        + (", ".join(f"{n} × {what}" for what, n in found["kernels"].items()) or "none"),
    ]
    if "collectives" in found:
        lines += [
            *(f"exchanged {line}" for line in exchanged(found["collectives"])),
            "largest arrays",
            *(f"  {size(x['bytes']):>10}  {x['array']}  {x['by']}" for x in found["largest"]),
            f"compiled in {found['compile_seconds']} s"
            + ", without machine code" * (not found["machine_code"]),
        ]
    return "\n".join(lines)


def exchanged(parts: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """A line for what passes within slices, and one for what passes between them."""

    def line(kinds):
        return ", ".join(f"{kind} {size(x['bytes'])} ({x['count']})" for kind, x in kinds.items())

    where = {"within": "between chips", "between": "between slices"}
    return [f"{where[part]}: {line(kinds)}" for part, kinds in parts.items()] or ["nothing"]


def show_scaling(tables: dict[str, list[dict[str, float]]]) -> str:
    """What `scaling.of_plan` gives, as lines of text."""
    lines = ["on paper, nothing of it measured; hybrid_flax/costs/scaling.py says what is assumed"]
    for name, rows in tables.items():
        lines += [
            f"{name} scaling: chips, images on each, images a second, efficiency",
            *(
                f"  {row['chips']:5} {row['images_per_chip']:7g} {row['images_per_second']:10,.0f}"
                f" {row['efficiency']:6.0%}"
                for row in rows
            ),
        ]
    return "\n".join(lines)


def size(count: float) -> str:
    """Of so many bytes."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def main(config: ml_collections.ConfigDict, options) -> int:
    """Plans and prints; 1 if the step does not fit."""
    set_up()
    mesh = config.mesh
    if options.scaling and (mesh.fsdp, mesh.tensor, max(1, mesh.num_slices)) != (1, 1, 1):
        raise InputError(
            "--scaling starts from one slice that only splits the images; leave --config.mesh as "
            "it is (the model adds the slices itself)"
        )
    target = find_target(options.topology or "", max(1, mesh.num_slices))
    found = plan(config, target, options.quick)
    lines = [show(found)]
    if options.scaling and "collectives" in found:
        found["scaling"] = scaling.of_plan(found, target.chip)
        lines.append(show_scaling(found["scaling"]))
    if options.largest_batch:
        found["largest_batch"] = largest_batch(config, target, options.quick)
        lines.append(f"largest batch that fits: {found['largest_batch']}")
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines))
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, f"Machines: {EXAMPLES}.")
    flags.DEFINE_bool("largest_batch", False, "Find the largest batch that fits, by compiling.")
    flags.DEFINE_bool("quick", False, "Stop before machine code is made: a tenth of the time.")
    flags.DEFINE_bool("scaling", False, "Show what a simple model says of 8 to 1024 chips.")
    flags.DEFINE_bool("json", False, "Print the figures alone, as JSON.")
    cli.run(lambda config, workdir: main(config, flags.FLAGS), needs_workdir=False)
