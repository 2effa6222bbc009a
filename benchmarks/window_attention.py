"""Attention in windows, for every shape that the large models have: ours, XLA's, PyTorch's.

python -m benchmarks.window_attention [--batch=128] [--shapes=SUBSTRING] [--save=FILE]

Times are medians in microseconds of one call, on the device: every contestant does its calls in one
program (a loop, or for PyTorch a CUDA graph), as launching them from Python would take longer than
the small shapes do. "forward + backward" has the gradients of everything: map, bias or tables,
shared query, local kernel. The floor is what a perfect kernel would take, which reads and writes
every map once; shapes that fit in the chip's cache may be faster than that.
"""

import argparse
import dataclasses
import functools
import math
import os
import pathlib
import sys

import jax
import jax.numpy as jnp

from benchmarks.window_attention_torch import contestants as torch_contestants
from hybrid_flax import measuring
from hybrid_flax.errors import InputError
from pallas.dispatch import choose
from pallas.window_attention import halo_attention, window_attention
from pallas.window_attention.choice import kernels
from pallas.window_attention.geometry import Halo, Windows

HEAD_DIM = 32
PASSES = ("forward", "forward + backward")
TURNS, REPEATS = 9, 50


def shapes(dtype: str) -> dict[str, Windows | Halo]:
    """Every distinct shape of the large models at 224 pixels, by model, stage and kind."""
    found = {}
    for stage, side in enumerate((56, 28, 14, 7)):

        def add(model, kind, geometry, stage=stage):
            found[f"{model} s{stage + 1} {kind}".strip()] = geometry

        base = (side, side, 4 * 2**stage, HEAD_DIM)  # 128 channels in stage 1
        square = (14, 14) if stage == 2 else (7, 7)
        local = Windows(*base, square, dtype, has_bias=True)
        add("gcvit_b", "local", local)
        add("gcvit_b", "global", dataclasses.replace(local, shared_query=True))
        swin = Windows(*base, (7, 7), dtype, has_bias=True)
        add("unified_swin_base", "", swin)
        if side == 7:  # one window, which is not shifted; GA-CSWin's is for all its channels
            cswin = Windows(7, 7, 16, HEAD_DIM, (7, 7), dtype, has_local=True)
            add("ga_cswin_s", "", cswin)
        else:  # its stripes have half of 64·2^stage channels for each direction
            split, half = (1, 2, 7)[stage], (side, side, 2**stage, HEAD_DIM)
            add("ga_cswin_s", "vertical", Windows(*half, (side, split), dtype, has_local=True))
            add("ga_cswin_s", "horizontal", Windows(*half, (split, side), dtype, has_local=True))
            add("unified_swin_base", "shifted", dataclasses.replace(swin, shift=(3, 3)))
        add("l2vit_b", "", Windows(*base, (7, 7), dtype))
        add("unified_halonet_base", "", Halo(*base, block=7, halo=3, dtype=dtype))
    return dict(sorted(found.items()))


def select(known: dict[str, Windows | Halo], substring: str) -> dict[str, Windows | Halo]:
    """Those with the substring in their name; raises InputError if there are none."""
    found = {name: known[name] for name in known if substring in name or substring == "all"}
    if not found:
        raise InputError(
            f"--shapes={substring}: no shape has this in its name; there are {', '.join(known)}"
        )
    return found


def argument_shapes(geometry: Windows | Halo, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What the operation takes, by argument name."""
    heads, dim = geometry.heads, geometry.dim
    if isinstance(geometry, Halo):
        parts, shapes = (
            3,
            dict.fromkeys(
                ("row_table", "column_table"), ((2 * geometry.window - 1, dim), "float32")
            ),
        )
    else:
        parts, tokens, shapes = 3 - geometry.shared_query, math.prod(geometry.window), {}
        if geometry.has_bias:
            shapes["bias"] = (heads, tokens, tokens), "float32"
        if geometry.shared_query:
            shapes["query"] = (batch, *geometry.window, heads, dim), geometry.dtype
        if geometry.has_local:
            shapes["local_kernel"] = (3, 3, heads, dim), geometry.dtype
    shapes["qkv"] = (batch, geometry.height, geometry.width, parts, heads, dim), geometry.dtype
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def random_arguments(geometry: Windows | Halo, batch: int) -> dict[str, jax.Array]:
    """Normal numbers, the same in every call; `out_grad` is the gradient that comes back."""
    shapes = argument_shapes(geometry, batch)
    qkv = shapes["qkv"]
    shapes["out_grad"] = jax.ShapeDtypeStruct(qkv.shape[:3] + qkv.shape[4:], qkv.dtype)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape.shape, shape.dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def operation(geometry: Windows | Halo, implementation: str):
    """The operation as a function of `argument_shapes`."""
    if isinstance(geometry, Halo):
        options = {"block": geometry.block, "halo": geometry.halo}
        return functools.partial(halo_attention, **options, implementation=implementation)
    options = {"window": geometry.window, "shift": geometry.shift}
    return functools.partial(window_attention, **options, implementation=implementation)


def floor(geometry: Windows | Halo, batch: int, chip: measuring.Chip) -> dict[str, float]:
    """Seconds that no kernel can be faster than, by pass.

    Forward moves query, key, value and result once, and multiplies every query with its keys and
    these weights with the values. Backward moves twice as much (these four and the result's
    gradient in, three gradients out) and multiplies five matrices instead of two.
    """
    size = jnp.dtype(geometry.dtype).itemsize
    maps = batch * geometry.height * geometry.width * geometry.heads * geometry.dim
    if isinstance(geometry, Halo):
        keys, query = geometry.window**2, maps
    else:
        keys = math.prod(geometry.window)
        query = batch * keys * geometry.heads * geometry.dim if geometry.shared_query else maps
    moved, flops = (query + 3 * maps) * size, 4 * keys * maps

    def at_least(moved, flops):
        return max(moved / chip.bandwidth, flops / chip.flops)

    forward = at_least(moved, flops)
    return dict(zip(PASSES, (forward, forward + at_least(2 * moved, 2.5 * flops)), strict=True))


def call(geometry: Windows | Halo, implementation: str, backward: bool):
    """`random_arguments` to the result, or to (result, gradients of the arguments by name)."""
    function = operation(geometry, implementation)

    def once(arguments):
        rest = dict(arguments)
        out_grad = rest.pop("out_grad")
        if not backward:
            return function(**rest)
        out, pull_back = jax.vjp(lambda rest: function(**rest), rest)
        return out, *pull_back(out_grad)

    return once


def jax_contestant(geometry, batch: int, implementation: str, backward: bool, repeats: int):
    """What builds one of ours, for `measuring.race`."""
    once = call(geometry, implementation, backward)

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
        held = [random_arguments(geometry, batch)]

        def run():
            held[0], out = program(held[0])
            jax.block_until_ready(out)

        return run

    return build


def measure(geometry, batch: int, *, turns: int = TURNS, repeats: int = REPEATS) -> dict:
    """One shape: what `auto` picks, and by pass floor, median seconds, and failures."""
    platform, chip = measuring.platform_name(), measuring.chip()
    picked, forced = (
        choose(how, platform, geometry, kernels(geometry)) for how in ("auto", "pallas")
    )
    row = {"geometry": dataclasses.asdict(geometry), "auto": picked._asdict(), "passes": {}}
    ours = ["pallas"] if forced.kernel and platform != "cpu" else []
    arguments = functools.partial(random_arguments, geometry, batch)
    for backward, name in enumerate(PASSES):
        builders = {
            how: jax_contestant(geometry, batch, how, bool(backward), repeats)
            for how in [*ours, "xla"]
        }
        if platform == "cuda":
            builders |= torch_contestants(geometry, arguments, bool(backward), repeats)
        seconds, failed = measuring.race(builders, turns=turns, repeats=repeats)
        least = floor(geometry, batch, chip)[name] if chip else None
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=measuring.positive, help="images; 128, on CPUs 1")
    parser.add_argument("--shapes", default="all", help="only those whose name has this in it")
    parser.add_argument("--save", type=pathlib.Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves some to PyTorch
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    batch = options.batch or (1 if on_cpu else 128)
    try:
        measuring.check_file("--save", options.save)
        chosen = select(shapes(dtype), options.shapes)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record = {**measuring.record("torch"), "batch": batch, "dtype": dtype, "rows": {}}
    print(f"{record['device']}, {batch} images, {dtype}; microseconds")
    if on_cpu:
        print("only XLA is timed: kernels run interpreted on CPUs, which says nothing of speed")
    elif not measuring.chip():
        print("no floor: this device's peaks are not in hybrid_flax/measuring.py")
    for name, geometry in chosen.items():
        row = measure(geometry, batch, **({"turns": 5, "repeats": 1} if on_cpu else {}))
        record["rows"][name] = row
        print(show(name, row), flush=True)
        if options.save:  # after every shape: what was measured is not lost when the next fails
            measuring.save(options.save, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
