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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.extend.core
from jax.interpreters import mlir
from jax.sharding import PartitionSpec

from pallas.watching import part_of, watching

IMPLEMENTATIONS = ("auto", "pallas", "xla")
PLATFORMS = ("tpu", "cuda", "cpu")


class Choice(NamedTuple):
    """The implementation that runs, and the reason in words."""

    kernel: str | None  # "tpu", "gpu" or "tpu interpreted"; None: XLA
    why: str


Call = tuple[Hashable, dict[str, Choice]]  # a geometry, and what runs it on each platform
_records: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar(
    "_records", default=None
)
_times: contextvars.ContextVar[int] = contextvars.ContextVar("_times", default=1)


class KernelModule(Protocol):
    """A platform's kernels for one operation."""

    forward: Callable[..., Any]  # (geometry, *arrays, interpret=) → result
    backward: Callable[..., Any]  # (geometry, *arrays, result's gradient, interpret=) → gradients


class TpuModule(KernelModule, Protocol):
    """TPU kernels; `refusal` gives the reason why they cannot serve a shape, None if they can.

    `every_core`: on every TPU since v4, not only on those with more vector memory.
    """

    def refusal(self, geometry: Any, *, every_core: bool) -> str | None: ...


class GpuModule(KernelModule, Protocol):
    """Hopper kernels; `refusal` as for TPUs."""

    def refusal(self, geometry: Any) -> str | None: ...


class Rule(NamedTuple):
    """The platform's row in an operation's `choice.py`: what "auto" does there, and why."""

    kernel: bool  # wherever it can serve the shape; otherwise XLA
    why: str


class Kernels(NamedTuple):
    """An operation's kernels, and what "auto" makes of them on each of `PLATFORMS`."""

    tpu: TpuModule
    gpu: GpuModule
    auto: Mapping[str, Rule]


class UnservedShapeError(ValueError):
    """A kernel was asked for by name, for a shape that it cannot serve."""


def choose(implementation: str, platform: str, geometry: Hashable, kernels: Kernels) -> Choice:
    """Picks what runs a shape on a platform.

    Args:
      implementation: "auto", as the operation's `choice.py` says; "pallas", a kernel; or "xla".
      platform: one of PLATFORMS; all others run XLA.

    Returns:
      The choice. With "pallas" it is XLA only where no kernel can serve the shape; `run` makes an
      error of that.

    Raises:
      ValueError: unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected one of {IMPLEMENTATIONS}")
    if implementation == "xla":
        return Choice(None, "asked for")
    if platform not in PLATFORMS:
        return Choice(None, f"there is no kernel for platform {platform}")
    automatic, rule = implementation == "auto", kernels.auto[platform]
    if automatic and platform == "cpu" and not rule.kernel:
        return Choice(None, rule.why)
    if platform == "cuda":
        refusal = kernels.gpu.refusal(geometry)
    else:
        refusal = kernels.tpu.refusal(geometry, every_core=automatic)
    if refusal:
        return Choice(None, refusal)
    if automatic and not rule.kernel:
        return Choice(None, rule.why)
    kernel = {"cuda": "gpu", "cpu": "tpu interpreted"}.get(platform, platform)
    return Choice(kernel, rule.why if automatic else "asked for")


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Lists what is traced inside: for every call its geometry, and for each platform what runs it.

    with recorded() as calls:
        jax.eval_shape(model, images)
    """
    calls: list[Call] = []
    token = _records.set(calls)
    try:
        yield calls
    finally:
        _records.reset(token)


@contextlib.contextmanager
def repeated(count: int) -> Iterator[None]:
    """Inside it, `recorded` lists a call `count` times: for the body of a loop, traced once."""
    token = _times.set(_times.get() * count)
    try:
        yield
    finally:
        _times.reset(token)


class Argument(NamedTuple):
    """An array, or None, and which of its axes count images and heads."""

    array: jax.Array | None
    batch: int | None = None
    heads: int | None = None

    def spec(self, batch_axes, heads_axis) -> PartitionSpec:
        axes = {self.batch: batch_axes, self.heads: heads_axis}
        return PartitionSpec(
            *(axes.get(axis) for axis in range(0 if self.array is None else self.array.ndim))
        )


def run(
    implementation: str,
    geometry: Any,
    heads: str | None,
    kernels: Kernels,
    plain: Callable,
    arguments: Sequence[Argument],
):
    """Runs on every device's own images and heads, with what `choose` picks for its platform.

    Which platform a program is for is known only when it is lowered. So "pallas" is refused there,
    and for that platform alone: a step traced on a CPU for TPUs may have shapes that only they
    serve.

    Args:
      geometry: a frozen dataclass of all that kernels must know beforehand.
      heads: the field of it that counts what the mesh axis `tensor` may split, heads or groups.
        They come before the last axis of the result. None: nothing.
      plain: the definition, of the arrays of `arguments`.

    Raises:
      UnservedShapeError: (when lowered) "pallas", and no kernel of the platform serves the shape.
    """
    given = [argument for argument in arguments if argument.array is not None]
    arrays = [argument.array for argument in given if argument.array is not None]
    count = getattr(geometry, heads) if heads else 1
    mesh, batch_axes, heads_axis = _mesh_axes(arrays[0].shape[0], count)
    if heads and heads_axis:
        geometry = dataclasses.replace(geometry, **{heads: count // mesh.shape[heads_axis]})
    choices = {
        platform: choose(implementation, platform, geometry, kernels) for platform in PLATFORMS
    }
    if (calls := _records.get()) is not None:
        calls.extend([(geometry, choices)] * _times.get())
    if watching():  # what it computes on the way is asked for
        with part_of(geometry):
            return plain(*(argument.array for argument in arguments))
    forced = implementation == "pallas"
    if not forced and not any(choice.kernel for choice in choices.values()):
        return plain(*(argument.array for argument in arguments))

    def local(*arrays):
        remaining = iter(arrays)
        arrays = [None if a.array is None else next(remaining) for a in arguments]
        branches = {}
        for platform, (kernel, why) in choices.items():
            module: KernelModule | _Refusal | None = None
            if kernel:
                module = kernels.gpu if kernel == "gpu" else kernels.tpu
            elif forced:
                module = _Refusal(platform, why, plain)
            if module:
                branches[platform] = functools.partial(
                    _kernel, module, geometry, kernel == "tpu interpreted"
                )
        return jax.lax.platform_dependent(*arrays, default=plain, **branches)

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


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """Stands in for kernels that were asked for and cannot be had; lowering it is an error."""

    platform: str
    why: str
    plain: Callable

    def forward(self, geometry: Hashable, *arrays, interpret: bool = False):
        return self._raises(geometry, jax.eval_shape(self.plain, *arrays))

    def backward(self, geometry: Hashable, *arrays, interpret: bool = False):
        return tuple(None if a is None else self._raises(geometry, a) for a in arrays[:-1])

    def _raises(self, geometry: Hashable, like: jax.ShapeDtypeStruct | jax.Array):
        message = (
            f"implementation='pallas': no kernel for platform {self.platform} serves {geometry}: "
            f"{self.why}. Take 'auto', which runs XLA there, or 'xla'"
        )
        return _refused.bind(shape=like.shape, dtype=like.dtype, message=message)


_refused = jax.extend.core.Primitive("refused_kernel")


@_refused.def_abstract_eval
def _refused_result(*, shape, dtype, message):
    return jax.core.ShapedArray(shape, dtype)


def _refused_lowering(context, *, shape, dtype, message):
    raise UnservedShapeError(message)


mlir.register_lowering(_refused, _refused_lowering)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _kernel(module: KernelModule | _Refusal, geometry: Hashable, interpret: bool, *arrays):
    return _forward(module, geometry, interpret, *arrays)


def _kernel_forward(module, geometry, interpret, *arrays):
    # Only the arguments are kept: the backward kernel computes the rest again.
    return _forward(module, geometry, interpret, *arrays), arrays


def _kernel_backward(module, geometry, interpret, arrays, out_grad):
    return _backward(module, geometry, interpret, *arrays, out_grad)


_kernel.defvjp(_kernel_forward, _kernel_backward)


# Compiled functions, so that a model's many equal blocks trace their kernel once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(module: KernelModule | _Refusal, geometry: Hashable, interpret: bool, *arrays):
    return module.forward(geometry, *arrays, interpret=interpret)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(module: KernelModule | _Refusal, geometry: Hashable, interpret: bool, *arrays):
    return module.backward(geometry, *arrays, interpret=interpret)
