"""Attention in windows of a feature map: one operation for every window of the five papers.

`window_attention` serves Swin's shifted windows, GC ViT's local and global-query windows, CSWin's
stripes and L2ViT's windows; `halo_attention` serves HaloNet's blocks, whose keys come from a larger
neighbourhood. Both take the NHWC map with query, key and value packed side by side, as one
projection makes them, and give the NHWC map back.

`reference.py` is the definition, `tpu*.py` and `gpu*.py` are the kernels, `choice.py` says which of
them serves what. `pallas/README.md` explains how they work.

Shapes: B images of H×W places, h heads of d channels; windows of a×b places hold N = a·b tokens,
numbered row-major.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas.window_attention import reference
from pallas.window_attention.choice import (
    IMPLEMENTATIONS,
    PLATFORMS,
    Choice,
    choose,
    gpu_kernels,
    tpu_kernels,
)
from pallas.window_attention.geometry import Halo, Windows
from pallas.window_attention.reference import attention

__all__ = ["IMPLEMENTATIONS", "attention", "halo_attention", "recorded", "window_attention"]

_records = contextvars.ContextVar("_records", default=None)


def window_attention(
    qkv: jax.Array,
    bias: jax.Array | None = None,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    query: jax.Array | None = None,
    local_kernel: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention of every place to the places of its window; [B, H, W, h, d].

    Args:
      qkv: [B, H, W, 3, h, d], bfloat16 or float32: query, key and value. With `query`
        [B, H, W, 2, h, d]: key and value.
      bias: [h, N, N] float32, added to the scores d^-0.5·query·key of query i and key j.
      window: height and width (a, b) of the windows, which divide H and W; a number: a square.
      shift: the windows begin at this place (down, right), from 0 to below a window, and go on at
        the opposite border; there tokens see only those that were their neighbours on the map
        (Swin Transformer, arXiv:2103.14030, section 3.2).
      query: [B, a, b, h, d], the queries that all windows of an image share (GC ViT,
        arXiv:2206.09959, section 3.2).
      local_kernel: [3, 3, h, d], a depthwise convolution of the values, with zeros beyond the
        window, that is added to the result (CSWin's locally-enhanced position, arXiv:2107.00652,
        section 3.3).
      implementation: "auto", "pallas" or "xla", see `choice.py`.

    Returns:
      [B, H, W, h, d] in the dtype of `qkv`. Scores and softmax are computed in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, naming the argument and the rule.
    """
    window, shift = _pair("window", window), _pair("shift", shift)
    geometry = Windows.of(qkv, bias, window, shift, query, local_kernel)

    def plain(qkv, bias, query, local_kernel):
        return reference.window_attention(
            qkv, bias, window=window, shift=shift, query=query, local_kernel=local_kernel
        )

    arguments = (
        _Argument(qkv, batch=0, heads=4),
        _Argument(bias, heads=0),
        _Argument(query, batch=0, heads=3),
        _Argument(local_kernel, heads=2),
    )
    return _run(implementation, geometry, plain, arguments)


def halo_attention(
    qkv: jax.Array,
    row_table: jax.Array,
    column_table: jax.Array,
    *,
    block: int,
    halo: int,
    implementation: str = "auto",
) -> jax.Array:
    """Each block of b×b queries attends to the w×w places around it, w = b + 2·halo.

    (HaloNet, arXiv:2103.12731, section 2.2.) The score of query (i, j) of a block and key (a, c) of
    its neighbourhood is d^-0.5·q·k + q·row_table[a - i + w - 1] + q·column_table[c - j + w - 1]. As
    i does not count the halo, the first w - b rows of the tables are never read. Keys outside the
    map do not take part.

    Args:
      qkv: [B, H, W, 3, h, d], bfloat16 or float32.
      row_table, column_table: [2w - 1, d] float32, shared by all heads.
      block: b, which divides H and W.
      halo: how many places the keys reach over the block on each side.
      implementation: "auto", "pallas" or "xla", see `choice.py`.

    Returns:
      [B, H, W, h, d] in the dtype of `qkv`. Scores and softmax are computed in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, naming the argument and the rule.
    """
    geometry = Halo.of(qkv, row_table, column_table, block, halo)
    plain = functools.partial(reference.halo_attention, block=block, halo=halo)
    arguments = (_Argument(qkv, batch=0, heads=4), _Argument(row_table), _Argument(column_table))
    return _run(implementation, geometry, plain, arguments)


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Windows | Halo, dict[str, Choice]]]]:
    """Lists what is traced inside: for every call its geometry, and for each platform what runs it.

    with recorded() as calls:
        jax.eval_shape(model, images)
    """
    token = _records.set(calls := [])
    try:
        yield calls
    finally:
        _records.reset(token)


def _pair(name: str, value) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(x, int) for x in pair):
        raise ValueError(f"{name}={value!r}: expected a whole number or (height, width)")
    return pair


class _Argument(NamedTuple):
    """An array, or None, and which of its axes count images and heads."""

    array: jax.Array | None
    batch: int | None = None
    heads: int | None = None

    def spec(self, batch_axes, heads_axis) -> PartitionSpec:
        axes = {self.batch: batch_axes, self.heads: heads_axis}
        return PartitionSpec(*(axes.get(axis) for axis in range(jnp.ndim(self.array))))


def _run(implementation: str, geometry: Windows | Halo, plain, arguments: Sequence[_Argument]):
    """Runs on every device's own images and heads, with what `choose` picks for its platform."""
    given = [argument for argument in arguments if argument.array is not None]
    mesh, batch_axes, heads_axis = _mesh_axes(given[0].array.shape[0], geometry.heads)
    if heads_axis:
        heads = geometry.heads // mesh.shape[heads_axis]
        geometry = dataclasses.replace(geometry, heads=heads)
    choices = {platform: choose(implementation, platform, geometry) for platform in PLATFORMS}
    if (calls := _records.get()) is not None:
        calls.append((geometry, choices))
    if not any(choice.kernel for choice in choices.values()):
        return plain(*(argument.array for argument in arguments))

    def local(*arrays):
        arrays = iter(arrays)
        arrays = [None if a.array is None else next(arrays) for a in arguments]
        kernels = {
            platform: functools.partial(_kernel, geometry, choice.kernel)
            for platform, choice in choices.items()
            if choice.kernel
        }
        return jax.lax.platform_dependent(*arrays, default=plain, **kernels)

    arrays = [argument.array for argument in given]
    if mesh is None:
        return local(*arrays)
    return jax.shard_map(
        local,
        in_specs=tuple(argument.spec(batch_axes, heads_axis) for argument in given),
        out_specs=PartitionSpec(batch_axes, None, None, heads_axis),
        check_vma=False,
    )(*arrays)


def _mesh_axes(batch: int, heads: int):
    """(mesh, axes that split the images, axis that splits the heads) of the mesh in use.

    The partitioner cannot see into a kernel: it would gather the whole batch on every device. All
    axes of the mesh split the images but `tensor`, which splits the heads where it can. Without a
    mesh (`jax.set_mesh`), or inside a `shard_map`, there is nothing to split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return None, None, None
    batch_axes = tuple(name for name in mesh.axis_names if name != "tensor")
    if batch % math.prod(mesh.shape[name] for name in batch_axes):
        batch_axes = None
    heads_axis = "tensor" if mesh.shape.get("tensor", 1) > 1 else None
    if heads_axis and heads % mesh.shape["tensor"]:
        heads_axis = None
    return mesh, batch_axes, heads_axis


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel(geometry: Windows | Halo, kernel: str, *arrays):
    return _forward(geometry, kernel, *arrays)


def _kernel_forward(geometry, kernel, *arrays):
    # Only the arguments are kept: the backward kernel computes the probabilities again.
    return _forward(geometry, kernel, *arrays), arrays


def _kernel_backward(geometry, kernel, arrays, out_grad):
    return _backward(geometry, kernel, *arrays, out_grad)


_kernel.defvjp(_kernel_forward, _kernel_backward)


# Compiled functions, so that a model's many equal blocks trace their kernel once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(geometry: Windows | Halo, kernel: str, *arrays):
    module, options = _module(geometry, kernel)
    return module.forward(geometry, *arrays, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(geometry: Windows | Halo, kernel: str, *arrays):
    module, options = _module(geometry, kernel)
    return module.backward(geometry, *arrays, **options)


def _module(geometry, kernel: str):
    if kernel == "gpu":
        return gpu_kernels(geometry), {}
    return tpu_kernels(geometry), {"interpret": kernel == "tpu interpreted"}
