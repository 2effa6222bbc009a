"""Attention in windows, for every shape that the large models have: ours, XLA's, PyTorch's.

python -m benchmarks.window_attention [--batch=128] [--shapes=SUBSTRING] [--save=FILE]

Times are as `benchmarks/operation.py` takes them. "forward + backward" has the gradients of
everything: map, bias or tables, shared query, local kernel. The floor is what a perfect kernel
would take, which reads and writes every map once; shapes that fit in the chip's cache may be faster
than that.
"""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp

from benchmarks.operation import Benchmark, Work, command, normal
from benchmarks.window_attention_torch import attention
from pallas.halo_attention import halo_attention
from pallas.halo_attention.choice import KERNELS as HALO_KERNELS
from pallas.halo_attention.geometry import Halo
from pallas.window_attention import window_attention
from pallas.window_attention.choice import KERNELS
from pallas.window_attention.geometry import Windows

HEAD_DIM = 32


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


def argument_shapes(geometry: Windows | Halo, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the operation's arguments by name."""
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
    return normal(shapes)


def operation(geometry: Windows | Halo, implementation: str):
    """The operation as a function of `argument_shapes`."""
    if isinstance(geometry, Halo):
        options = {"block": geometry.block, "halo": geometry.halo}
        return functools.partial(halo_attention, **options, implementation=implementation)
    options = {"window": geometry.window, "shift": geometry.shift}
    return functools.partial(window_attention, **options, implementation=implementation)


def work(geometry: Windows | Halo, batch: int) -> tuple[Work, Work]:
    """The work of forward and backward.

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
    moved, products = (query + 3 * maps) * size, 2 * keys * maps
    return Work(moved, 2 * products), Work(2 * moved, 5 * products)


BENCHMARK = Benchmark(
    description=__doc__.splitlines()[0],
    shapes=shapes,
    random_arguments=random_arguments,
    operation=operation,
    torch_operation=attention,
    work=work,
    kernels=lambda geometry: HALO_KERNELS if isinstance(geometry, Halo) else KERNELS,
)
main = functools.partial(command, BENCHMARK)


if __name__ == "__main__":
    sys.exit(main())
