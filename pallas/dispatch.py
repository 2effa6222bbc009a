"""What every operation with kernels shares: which of them runs, on which platform, on which mesh.

An operation has a definition in plain jnp and modules of kernels with `forward(geometry, *arrays)`,
`backward(geometry, *arrays, out_grad)` and `refusal(geometry)`. `run` is called where the operation
is traced.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

IMPLEMENTATIONS = ("auto", "pallas", "xla")
PLATFORMS = ("tpu", "cuda", "cpu")

_records = contextvars.ContextVar("_records", default=None)


class Kernels(NamedTuple):
    """The modules that have kernels for a geometry."""

    tpu: ModuleType
    gpu: ModuleType


class Choice(NamedTuple):
    """What runs, and the reason in words."""

    kernel: str | None  # "tpu", "gpu" or "tpu interpreted"; None: XLA
    why: str


def choose(implementation: str, platform: str, geometry: Hashable, kernels: Kernels) -> Choice:
    """What runs a shape.

    Args:
      implementation: "auto", "pallas" (a kernel wherever there is one) or "xla".
      platform: one of PLATFORMS; all others run XLA.

    Raises:
      ValueError: unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected one of {IMPLEMENTATIONS}")
    if implementation == "xla":
        return Choice(None, "asked for")
    automatic = implementation == "auto"
    if platform == "cuda":
        refusal = kernels.gpu.refusal(geometry)
        if refusal or automatic:
            return Choice(None, refusal or "the kernel is not yet measured to be faster")
        return Choice("gpu", "asked for")
    if platform not in ("tpu", "cpu") or (platform == "cpu" and automatic):
        return Choice(None, f"there is no kernel for platform {platform}")
    refusal = kernels.tpu.refusal(geometry, every_core=automatic)
    if refusal:
        return Choice(None, refusal)
    if platform == "cpu":
        return Choice("tpu interpreted", "asked for: slow, to test the kernel")
    return Choice("tpu", "one pass over the map" if automatic else "asked for")


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Hashable, dict[str, Choice]]]]:
    """Lists what is traced inside: for every call its geometry, and for each platform what runs it.

    with recorded() as calls:
        jax.eval_shape(model, images)
    """
    token = _records.set(calls := [])
    try:
        yield calls
    finally:
        _records.reset(token)


class Argument(NamedTuple):
    """An array, or None, and which of its axes count images and heads."""

    array: jax.Array | None
    batch: int | None = None
    heads: int | None = None

    def spec(self, batch_axes, heads_axis) -> PartitionSpec:
        axes = {self.batch: batch_axes, self.heads: heads_axis}
        return PartitionSpec(*(axes.get(axis) for axis in range(jnp.ndim(self.array))))


def run(
    implementation: str,
    geometry: Hashable,
    heads: str | None,
    kernels: Kernels,
    plain: Callable,
    arguments: Sequence[Argument],
):
    """Runs on every device's own images and heads, with what `choose` picks for its platform.

    Args:
      geometry: a frozen dataclass of all that kernels must know beforehand.
      heads: the field of it that counts what the mesh axis `tensor` may split, heads or groups.
        They come before the last axis of the result. None: nothing.
      plain: the definition, of the arrays of `arguments`.
    """
    given = [argument for argument in arguments if argument.array is not None]
    count = getattr(geometry, heads) if heads else 1
    mesh, batch_axes, heads_axis = _mesh_axes(given[0].array.shape[0], count)
    if heads_axis:
        geometry = dataclasses.replace(geometry, **{heads: count // mesh.shape[heads_axis]})
    choices = {
        platform: choose(implementation, platform, geometry, kernels) for platform in PLATFORMS
    }
    if (calls := _records.get()) is not None:
        calls.append((geometry, choices))
    if not any(choice.kernel for choice in choices.values()):
        return plain(*(argument.array for argument in arguments))

    def local(*arrays):
        arrays = iter(arrays)
        arrays = [None if a.array is None else next(arrays) for a in arguments]
        branches = {}
        for platform, choice in choices.items():
            if choice.kernel:
                module = kernels.gpu if choice.kernel == "gpu" else kernels.tpu
                interpret = choice.kernel == "tpu interpreted"
                branches[platform] = functools.partial(_kernel, module, geometry, interpret)
        return jax.lax.platform_dependent(*arrays, default=plain, **branches)

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _kernel(module: ModuleType, geometry: Hashable, interpret: bool, *arrays):
    return _forward(module, geometry, interpret, *arrays)


def _kernel_forward(module, geometry, interpret, *arrays):
    # Only the arguments are kept: the backward kernel computes the rest again.
    return _forward(module, geometry, interpret, *arrays), arrays


def _kernel_backward(module, geometry, interpret, arrays, out_grad):
    return _backward(module, geometry, interpret, *arrays, out_grad)


_kernel.defvjp(_kernel_forward, _kernel_backward)


# Compiled functions, so that a model's many equal blocks trace their kernel once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(module: ModuleType, geometry: Hashable, interpret: bool, *arrays):
    return module.forward(geometry, *arrays, interpret=interpret)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(module: ModuleType, geometry: Hashable, interpret: bool, *arrays):
    return module.backward(geometry, *arrays, interpret=interpret)
