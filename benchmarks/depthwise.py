"""Depthwise convolution: its formulations side by side, and PyTorch where it is installed.

python -m benchmarks.depthwise [--save=FILE]

Times are medians in milliseconds of forward, and of forward and backward together, float32 on CPUs
and bfloat16 elsewhere.
"""

import argparse
import functools
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_flax.costs import records, timing
from hybrid_flax.layers import convolutions
from hybrid_flax.run.ending import ending

# (batch, side, channels, kernel): the stages of GC ViT and GLNet, CSWin's and the 7×7 of ConvNeXt.
SHAPES = (
    (8, 56, 64, 3),
    (8, 28, 128, 5),
    (8, 56, 96, 7),
    (8, 14, 384, 7),
)
PASSES = ("forward", "forward + backward")
FORMULATIONS = {
    "shifted_sum": convolutions.depthwise_as_shifted_sum,
    "grouped_conv": convolutions.depthwise_as_grouped_conv,
}
TURNS = 15


def subjects(shape: tuple[int, int, int, int], dtype: str, backward: bool):
    """{name: what builds it}, for `timing.compare`."""
    batch, side, channels, size = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, side, side, channels)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 1, channels)).astype(np.float32)
    builders = {
        name: functools.partial(build, formulation, x, kernel, dtype, backward)
        for name, formulation in FORMULATIONS.items()
    }
    if importlib.util.find_spec("torch"):
        builders["pytorch"] = functools.partial(build_torch, x, kernel, dtype, backward)
    return builders


def build(formulation, x, kernel, dtype: str, backward: bool):
    """One of ours."""
    arrays = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)

    def loss(x, kernel):
        return formulation(x, kernel).astype(jnp.float32).sum()

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)) if backward else formulation)
    return lambda: jax.block_until_ready(program(*arrays))


def build_torch(x, kernel, dtype: str, backward: bool):
    """PyTorch's, in the layout that it is fastest in."""
    import torch

    options = {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": getattr(torch, dtype),
        "requires_grad": backward,
    }
    x = torch.tensor(x, **options).permute(0, 3, 1, 2)  # still channels last in memory
    kernel = torch.tensor(kernel.transpose(3, 2, 0, 1), **options)
    convolve = functools.partial(
        torch.nn.functional.conv2d, padding=kernel.shape[-1] // 2, groups=len(kernel)
    )

    def run():
        with torch.inference_mode(not backward):
            out = convolve(x, kernel)
            if backward:
                torch.autograd.grad(out.float().sum(), (x, kernel))
        if out.is_cuda:
            torch.cuda.synchronize()

    return run


def show(row: dict) -> str:
    """A line for people."""
    cells = [f"{who} {1e3 * seconds:.2f}" for who, seconds in row["seconds"].items()]
    cells += [f"{who}: {why}" for who, why in row["failed"].items()]
    batch, side, channels, size = row["shape"]
    name = f"{batch}×{side}×{side}×{channels}, {size}×{size}"
    return f"{name:<16}  {row['pass']:<18}  " + "   ".join(cells)


def main(arguments: list[str] | None = None) -> int:
    return ending(lambda: _main(arguments), limited=False) or 0


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=pathlib.Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    records.check_file("--save", options.save)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    record = {**records.record("torch"), "dtype": dtype, "rows": []}
    print(f"{record['device']}, {dtype}; milliseconds")
    for shape in SHAPES:
        for backward, name in enumerate(PASSES):
            compared = timing.compare(subjects(shape, dtype, bool(backward)), turns=TURNS)
            row = {"shape": shape, "pass": name, **compared._asdict()}
            record["rows"].append(row)
            print(show(row), flush=True)
            if options.save:  # after every row: what was measured is not lost when the next fails
                records.save(options.save, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
