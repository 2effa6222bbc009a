"""Parts that the benchmarks of one operation share: subjects, floors, table, command line.

Times are medians in microseconds of one call, on the device: every subject does its calls in one
program (a loop, or for PyTorch a CUDA graph), as launching them from Python would take longer than
the small shapes do. "forward + backward" has the gradients of all arguments.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import operation_torch
from hybrid_flax.costs import chips, records, timing
from hybrid_flax.errors import InputError
from hybrid_flax.run.ending import ending
from pallas.dispatch import Kernels, choose

PASSES = ("forward", "forward + backward")
TURNS, REPEATS = 9, 50


class Work(NamedTuple):
    """The least that a pass has to do."""

    moved: int  # bytes, to and from main memory
    flops: int = 0  # of products of matrices
    gathered: int = 0  # bytes, out of L1


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """An operation and what it is measured with; geometries are those of `pallas.dispatch`.

    Args:
      description: for `--help`.
      shapes: a dtype to geometries by name.
      random_arguments: geometry and batch to the operation's arguments by name, and `out_grad`, the
        gradient that comes back; the same in every call.
      operation: geometry and implementation to a function of these arguments.
      torch_operation: geometry, device and dtype to the same function in PyTorch.
      work: geometry and batch to that of forward and of backward.
      kernels: the modules that serve a geometry.
      conditions: what else the record says.
    """

    description: str
    shapes: Callable[[str], dict[str, Hashable]]
    random_arguments: Callable[[Hashable, int], dict[str, jax.Array]]
    operation: Callable[[Hashable, str], Callable]
    torch_operation: Callable[..., Callable]
    work: Callable[[Hashable, int], tuple[Work, Work]]
    kernels: Callable[[Hashable], Kernels]
    conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def normal(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Normal numbers, the same in every call."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape.shape, shape.dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def select(known: dict[str, Hashable], substring: str) -> dict[str, Hashable]:
    """Those with the substring in their name; raises InputError if there are none."""
    found = {name: known[name] for name in known if substring in name or substring == "all"}
    if not found:
        raise InputError(
            f"--shapes={substring}: no shape has this in its name; there are {', '.join(known)}"
        )
    return found


def floor(work: tuple[Work, Work], chip: chips.Chip) -> dict[str, float]:
    """Seconds that a perfect kernel takes, by pass."""
    forward, backward = (
        max(
            needed.moved / chip.bandwidth,
            needed.flops / chip.flops,
            needed.gathered / chip.l1_bandwidth,
        )
        for needed in work
    )
    return dict(zip(PASSES, (forward, forward + backward), strict=True))


def call(function: Callable, backward: bool):
    """`random_arguments` to the result, or to (result, gradients of the arguments by name)."""

    def once(arguments):
        rest = dict(arguments)
        out_grad = rest.pop("out_grad")
        if not backward:
            return function(**rest)
        out, pull_back = jax.vjp(lambda rest: function(**rest), rest)
        return out, *pull_back(out_grad)

    return once


def jax_subject(function: Callable, arguments: Callable, backward: bool, repeats: int):
    """Builds one of ours, for `timing.compare`; `arguments` makes its arrays."""
    once = call(function, backward)

    def turn(_, carry):
        # The barrier makes every call wait for the last: the same call twice would be done once.
        arguments, _ = carry
        return jax.lax.optimization_barrier((arguments, once(arguments)))

    # Donated, or every program would begin by copying its arguments.
    @functools.partial(jax.jit, donate_argnums=0)
    def program(arguments):
        shapes = jax.eval_shape(once, arguments)
        empty = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return jax.lax.fori_loop(0, repeats, turn, (arguments, empty))

    def build():
        held = [arguments()]

        def run():
            held[0], out = program(held[0])
            jax.block_until_ready(out)

        return run

    return build


def measure(
    benchmark: Benchmark,
    geometry: Hashable,
    batch: int,
    *,
    turns: int = TURNS,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """One shape: what `auto` picks, and by pass floor, median seconds, and failures."""
    platform, chip = chips.platform_name(), chips.chip()
    picked, forced = (
        choose(how, platform, geometry, benchmark.kernels(geometry)) for how in ("auto", "pallas")
    )
    row = {"geometry": dataclasses.asdict(geometry), "auto": picked._asdict(), "passes": {}}
    ours = ["pallas"] if forced.kernel and platform != "cpu" else []
    arguments = functools.partial(benchmark.random_arguments, geometry, batch)
    for backward, name in enumerate(PASSES):
        builders = {
            how: jax_subject(benchmark.operation(geometry, how), arguments, bool(backward), repeats)
            for how in [*ours, "xla"]
        }
        if platform == "cuda":
            theirs = functools.partial(benchmark.torch_operation, geometry)
            builders |= operation_torch.subjects(theirs, arguments, bool(backward), repeats)
        seconds, failed = timing.compare(builders, turns=turns, repeats=repeats)
        least = floor(benchmark.work(geometry, batch), chip)[name] if chip else None
        row["passes"][name] = {"seconds": seconds, "failed": failed, "floor": least}
    return row


def show(name: str, row: dict) -> str:
    """A few lines for people; what backward takes alone is the difference of the two passes."""
    lines = [f"{name}  (auto: {row['auto']['kernel'] or 'XLA'}, {row['auto']['why']})"]
    forward, both = (row["passes"][name] for name in PASSES)
    alone = {
        "seconds": {
            who: seconds - forward["seconds"][who]
            for who, seconds in both["seconds"].items()
            if who in forward["seconds"]
        },
        "floor": both["floor"] and both["floor"] - forward["floor"],
        "failed": {},
    }
    for what, figures in (*row["passes"].items(), ("  of it backward", alone)):
        times, least = figures["seconds"], figures["floor"]
        cells = [f"floor {1e6 * least:.1f}"] if least else []
        for who, seconds in times.items():
            ratios = [f"{seconds / least:.1f}× floor"] if least else []
            if "pallas" in times and who != "pallas":
                ratios.append(f"{seconds / times['pallas']:.2f}× pallas")
            cells.append(f"{who} {1e6 * seconds:.1f}" + (f" ({', '.join(ratios)})" * bool(ratios)))
        cells += [f"{who}: {why}" for who, why in figures["failed"].items()]
        lines.append(f"  {what:<18}  " + "   ".join(cells))
    return "\n".join(lines)


def command(benchmark: Benchmark, arguments: list[str] | None = None) -> int:
    """The `main` of a benchmark; its exit status, as `ending` says."""
    return ending(lambda: _command(benchmark, arguments), limited=False) or 0


def _command(benchmark: Benchmark, arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=benchmark.description)
    parser.add_argument("--batch", type=records.positive, help="images; 128, on CPUs 1")
    parser.add_argument("--shapes", default="all", help="only those whose name has this in it")
    parser.add_argument("--save", type=pathlib.Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves some to PyTorch
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    batch = options.batch or (1 if on_cpu else 128)
    records.check_file("--save", options.save)
    chosen = select(benchmark.shapes(dtype), options.shapes)
    record = {**records.record("torch"), "batch": batch, "dtype": dtype}
    record |= {**benchmark.conditions, "rows": {}}
    print(f"{record['device']}, {batch} images, {dtype}; microseconds")
    if on_cpu:
        print("only XLA is timed: kernels run interpreted on CPUs, which says nothing of speed")
    elif not chips.chip():
        print("no floor: this device's peaks are not in hybrid_flax/costs/chips.py")
    for name, geometry in chosen.items():
        counts = {"turns": 5, "repeats": 1} if on_cpu else {}
        row = measure(benchmark, geometry, batch, **counts)
        record["rows"][name] = row
        print(show(name, row), flush=True)
        if options.save:  # after every shape: what was measured is not lost when the next fails
            records.save(options.save, record)
    return 0
