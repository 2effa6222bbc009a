"""What a training run would need on machines that are not here: compiled for them, not run.

python -m hybrid_flax.plan --config=configs/gcvit_l.py --topology=v5e:16x16 [--largest_batch]

The very step that `hybrid_flax.main` would run is compiled by the machines' own compiler, for the
config's batch split over all chips. Topologies are v4, v5e, v5p and v6e with a shape that the
compiler knows (v5e:2x4, v5p:4x4x8), and h200:8. TPUs need `pip install libtpu`, the H200
`pip install "jax[cuda13]"`; neither needs a chip. `--json=FILE` keeps the figures. Speed is not
foretold: a compiler does not know it.
"""

import collections
import importlib.util
import json
import os
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh

from hybrid_flax import cli
from hybrid_flax.config import check
from hybrid_flax.distributed.mesh import batch_sharded, check_batch_size, make_mesh, replicated
from hybrid_flax.errors import InputError
from hybrid_flax.flops import training_flops
from hybrid_flax.program import training_program
from hybrid_flax.versions import versions
from pallas.dispatch import recorded

GIB = 2**30
MEMORY = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "h200": 141e9}
EXAMPLES = "v4:2x2x4, v5e:16x16, v5p:4x4x8, v6e:8x8, h200:8"
IMAGENET = 1_281_167  # training images, for schedules that count epochs
H200 = pathlib.Path(__file__).parent.parent / "benchmarks" / "targets" / "h200.textproto"
_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "u8": 1, "s8": 1, "f64": 8}


class Target(NamedTuple):
    """Machines as their compiler knows them."""

    name: str  # v5e:16x16
    chip: str
    platform: str  # "tpu" or "cuda"
    mesh: Mesh

    @property
    def memory(self) -> float:
        """Bytes of a chip."""
        return MEMORY[self.chip]


def find_target(name: str) -> Target:
    """The machines of that name; InputError for an unknown one, or without their compiler."""
    chip, _, shape = name.partition(":")
    if chip not in MEMORY or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise InputError(f"--topology={name}: expected a chip and a shape, such as {EXAMPLES}")
    gpu = chip == "h200"
    needed, install = ("jax_cuda13_plugin", '"jax[cuda13]"') if gpu else ("libtpu", "libtpu")
    if importlib.util.find_spec(needed) is None:
        raise InputError(
            f"--topology={name}: its compiler is not installed here. Install it, no chip is "
            f"needed: pip install {install}"
        )
    try:
        if gpu:
            topology = topologies.get_topology_desc(
                platform="cuda", target_config=H200.read_text(), topology=f"1x1x{int(shape)}"
            )
        else:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        mesh = make_mesh(topology.devices)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--topology={name}: the compiler knows no such machines ({reason}). Among those it "
            f"knows are {EXAMPLES}"
        ) from error
    return Target(name, chip, "cuda" if gpu else "tpu", mesh)


def plan(config: ml_collections.ConfigDict, target: Target) -> dict[str, Any]:
    """Compiles the config's training step for the target and says what it needs.

    Bytes are those of one chip. `fits` is whether the program does; without it only what is known
    without a program is there.

    Raises:
      InputError: the config cannot be used, or its batch not be split over the chips.
    """
    config = ml_collections.ConfigDict(config)
    check(config)
    config.model.num_classes = config.model.num_classes or 1000
    check_batch_size(config.batch_size, config.accumulation_steps, target.mesh)
    steps_per_epoch = max(1, IMAGENET // config.batch_size)
    with recorded() as calls:
        program = training_program(config, target.mesh, steps_per_epoch)
        batch = _batch(config, target.mesh)
        started = time.perf_counter()
        traced = program.train_step.trace(_on(program.state, replicated(target.mesh)), batch)
    flops = training_flops(program.model, config.model.image_size, config.batch_size)
    found = {
        "topology": target.name,
        "chips": target.mesh.size,
        "model": config.model.name,
        "batch_size": config.batch_size,
        "batch_per_chip": config.batch_size // target.mesh.size,
        "accumulation_steps": config.accumulation_steps,
        "bytes_of_state": {name: _bytes(part) for name, part in program.state.items()},
        "flops_per_chip": flops // target.mesh.size,
        "kernels": _kernels(calls, target.platform),
        "memory": target.memory,
        "versions": versions(),
    }
    try:
        compiled = traced.lower(lowering_platforms=(target.platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"Used ([\d.]+)([GM]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        scale = GIB if needed[2] == "G" else 2**20
        return found | {"fits": False, "peak_bytes": round(float(needed[1]) * scale)}
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    text = compiled.as_text()
    return found | {
        "fits": peak <= target.memory,
        "peak_bytes": peak,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": collectives(text),
        "largest": largest(text),
        "compile_seconds": round(time.perf_counter() - started, 1),
    }


def largest_batch(config: ml_collections.ConfigDict, target: Target) -> int:
    """The most images per step that fit, as a multiple of 8 per chip and micro-batch; 0: not 8.

    Compiles once for each try: twice as many, or half, then between.
    """
    config = ml_collections.ConfigDict(config)
    unit = 8 * target.mesh.size * config.accumulation_steps

    def fits(units: int) -> bool:
        config.batch_size = units * unit
        config.augment.mix_group = config.model.batch_norm_group = 0
        return plan(config, target)["fits"]

    low, high = 0, max(1, config.batch_size // unit)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


# ------------------------------------------------------------------ what a program consists of


def collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of the collectives in a compiled program; bytes of one chip's
    results. One in a loop counts once, one within a single chip not at all."""
    found = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    pattern = rf"^ *(?:ROOT )?\S+ = (.*?) ({_COLLECTIVES})(-start)?\((.*)"
    for shapes, kind, start, rest in re.findall(pattern, text, re.MULTILINE):
        if re.search(r"replica_groups=\{(\{\d+\},?)+\}", rest):
            continue
        sizes = _sizes(shapes)
        # What begins an all-gather has its operands beside its results.
        if start and kind != "all-reduce":
            sizes = sizes[len(sizes) // 2 :]
        found[kind]["count"] += 1
        found[kind]["bytes"] += sum(sizes)
    return dict(found)


def largest(text: str, count: int = 5) -> list[dict[str, Any]]:
    """The largest arrays of a compiled program, and what computes them."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?\S+ = (\w+\[[\d,]*\])\S* ([\w-]+)\(", line)
        if not match or match[2] in ("parameter", "get-tuple-element", "bitcast"):
            continue
        origin = re.search(r'op_name="([^"]*)"', line)
        entry = {"array": match[1], "by": origin[1].split("/", 1)[-1] if origin else match[2]}
        found.setdefault(match[1], entry | {"bytes": sum(_sizes(match[1]))})
    return sorted(found.values(), key=lambda entry: -entry["bytes"])[:count]


def _sizes(shapes: str) -> list[int]:
    sizes = []
    for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes):
        size = _BYTES.get(dtype, 4)
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        sizes.append(size)
    return sizes


def _batch(config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    side, split = config.model.image_size, batch_sharded(mesh)
    return {
        "image": jax.ShapeDtypeStruct(
            (config.batch_size, side, side, 3), jnp.uint8, sharding=split
        ),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=split),
    }


def _on(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _kernels(calls, platform: str) -> dict[str, int]:
    """{"kernel", or why XLA: how many calls}"""
    chosen = (choices[platform] for _, choices in calls)
    return dict(collections.Counter("kernel" if c.kernel else f"XLA: {c.why}" for c in chosen))


# ------------------------------------------------------------------------------------- for a person


def show(found: dict[str, Any]) -> str:
    """The plan as lines of text."""

    def size(count: float) -> str:
        return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"

    state = found["bytes_of_state"]
    room = found["memory"] - found["peak_bytes"]
    verdict = f"fits, {size(room)} to spare" if found["fits"] else f"does not fit by {size(-room)}"
    lines = [
        f"{found['model']} on {found['topology']}: {found['chips']} chips, {found['batch_size']} "
        f"images a step, {found['batch_per_chip']} on a chip"
        + (f" in {found['accumulation_steps']} parts" * (found["accumulation_steps"] > 1)),
        "memory of a chip",
        *(f"  {name:12} {size(count)}" for name, count in state.items() if count > 4),
        *([f"  temporary    {size(found['temporary_bytes'])}"] * ("temporary_bytes" in found)),
        f"  at most      {size(found['peak_bytes'])} of {size(found['memory'])}: {verdict}",
        f"work of a chip: {found['flops_per_chip'] / 1e12:.2f} TFLOP a step",
        "windows and deformable sampling: "
        + (", ".join(f"{n} × {what}" for what, n in found["kernels"].items()) or "none"),
    ]
    if found["fits"]:
        moved = found["collectives"].items()
        lines += [
            "between chips: "
            + (", ".join(f"{kind} {size(x['bytes'])} ({x['count']})" for kind, x in moved) or "-"),
            "largest arrays",
            *(f"  {size(x['bytes']):>10}  {x['array']}  {x['by']}" for x in found["largest"]),
            f"compiled in {found['compile_seconds']} s",
        ]
    return "\n".join(lines)


def main(config: ml_collections.ConfigDict, options) -> int:
    """Plans, prints, and writes the figures if asked; 1 if the step does not fit."""
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed JAX would look for a TPU
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TPU_SKIP_MDS_QUERY": "1"}
    target = find_target(options.topology or "")
    found = plan(config, target)
    print(show(found))
    if options.largest_batch:
        found["largest_batch"] = largest_batch(config, target)
        print(f"largest batch that fits: {found['largest_batch']}")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, f"Machines: {EXAMPLES}.")
    flags.DEFINE_bool("largest_batch", False, "Find the largest batch that fits, by compiling.")
    flags.DEFINE_string("json", None, "File for the figures.")
    cli.run(lambda config, workdir: main(config, flags.FLAGS), needs_workdir=False)
