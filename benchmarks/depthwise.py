"""Depthwise convolution: its formulations side by side, and PyTorch where it is installed.

python -m benchmarks.depthwise [--save=FILE]

Times are medians in milliseconds of forward, and of forward and backward together, float32 on CPUs
and bfloat16 elsewhere. Each round runs every contestant once, so that noise hits all alike.
"""

import argparse
import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_flax.layers import convolutions
from hybrid_flax.versions import versions

# (batch, side, channels, kernel): the stages of GC ViT and GLNet, CSWin's and the 7×7 of ConvNeXt.
SHAPES = (
    (8, 56, 64, 3),
    (8, 28, 128, 5),
    (8, 56, 96, 7),
    (8, 14, 384, 7),
)
ROUNDS = 15


def contestants(batch: int, side: int, channels: int, size: int, dtype):
    """{name: function without arguments}, for forward and for forward and backward."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, side, side, channels)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 1, channels)).astype(np.float32)
    arrays = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    forward, both = {}, {}
    for name in ("shifted_sum", "grouped_conv"):
        function = getattr(convolutions, f"depthwise_as_{name}")

        def loss(x, kernel, function=function):
            return function(x, kernel).astype(jnp.float32).sum()

        run, grad = jax.jit(function), jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        forward[name] = lambda run=run: jax.block_until_ready(run(*arrays))
        both[name] = lambda grad=grad: jax.block_until_ready(grad(*arrays))
    try:
        import torch
    except ImportError:
        return forward, both
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.float32 if dtype == jnp.float32 else torch.bfloat16
    tx = torch.tensor(x.transpose(0, 3, 1, 2), device=device, dtype=kind)
    tx = tx.to(memory_format=torch.channels_last).requires_grad_()
    tk = torch.tensor(kernel.transpose(3, 2, 0, 1), device=device, dtype=kind).requires_grad_()

    def wait(value):
        if device == "cuda":
            torch.cuda.synchronize()
        return value

    def torch_forward():
        return torch.nn.functional.conv2d(tx, tk, padding=size // 2, groups=channels)

    def torch_inference():
        with torch.inference_mode():
            return wait(torch_forward())

    forward["pytorch"] = torch_inference
    both["pytorch"] = lambda: wait(torch.autograd.grad(torch_forward().float().sum(), (tx, tk)))
    return forward, both


def measure(functions) -> dict[str, float]:
    """{name: median milliseconds}"""
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(float(np.median(values)), 3) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=pathlib.Path, help="JSON file for the figures")
    options = parser.parse_args()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    record = {"machine": platform.machine(), "versions": versions(), "dtype": dtype.__name__}
    rows = record["rows"] = []
    for shape in SHAPES:
        for what, functions in zip(
            ("forward", "forward and backward"), contestants(*shape, dtype), strict=True
        ):
            times = measure(functions)
            rows.append({"shape": shape, "what": what, "milliseconds": times})
            print(f"{shape} {what}: " + ", ".join(f"{k} {v:.2f} ms" for k, v in times.items()))
    if options.save:
        options.save.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
