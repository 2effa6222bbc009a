"""What the TPU kernels for attention in windows share: tiles of tokens, groups and stacks of heads.

The lanes of a tile, 128 at most, are the channels of a *group* of heads, side by side. Queries are
stacked once per head with the other heads' lanes zeroed, so that one product gives the scores of
all heads, [heads·tokens, tokens], and nothing ever moves across lanes.
"""

import dataclasses
import functools
from typing import Generic, NamedTuple, Protocol, TypeVar

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu_core import LANES, VMEM_BYTES, largest_divisor

MASKED = -1e30
UNROLLED_TOKENS = 512  # of windows side by side in the schedule, so that their latencies overlap


class Plan(NamedTuple):
    """How a shape is cut into programs.

    `tall` windows, higher than wide, are walked column by column: their lines are columns.
    """

    tall: bool
    lines: int  # of a window
    length: int  # of a line, in tokens
    stride: int  # of a line in a tile: length rounded up to sublanes
    heads: int  # of a group
    stacked: int  # heads of a group whose scores are computed at once
    lanes: int  # of a group
    groups: int  # of a program
    programs: tuple[int, int, int, int]  # halves of the batch, channels, images, rows of windows
    images: int  # of a program
    strips: int  # rows of windows of a program
    buffers: int  # of each block: 2 to load one while another is used

    @property
    def tokens(self) -> int:
        return self.lines * self.stride

    @property
    def is_split(self) -> bool:
        """Whether the parts of the packed map come as separate blocks."""
        return self.programs[1] > 1


def largest_group(heads: int, dim: int) -> int:
    """How many heads share the lanes."""
    return largest_divisor(heads, max(LANES, dim) // dim)


class Geometry(Protocol):
    """The fields that both attentions' geometries have."""

    @property
    def dim(self) -> int: ...
    @property
    def dtype(self) -> str: ...


G = TypeVar("G", bound=Geometry)


class Tiles(Generic[G]):
    """The arithmetic on tiles, [tokens, lanes] in float32, inside a program."""

    def __init__(self, geometry: G, cut: Plan):
        self.geometry, self.cut = geometry, cut
        self.dtype = jnp.dtype(geometry.dtype)
        self.precision = lax.Precision.HIGHEST if geometry.dtype == "float32" else None

    def lanes(self, group):
        """The lanes of a group in a block that has several."""
        return pl.ds(group * self.cut.lanes, self.cut.lanes)

    def places(self, shape, axis):
        """(line, place in the line) of the tokens along an axis."""
        token = lax.rem(lax.broadcasted_iota(jnp.int32, shape, axis), self.cut.tokens)
        return lax.div(token, self.cut.stride), lax.rem(token, self.cut.stride)

    def is_token(self, shape, axis):
        return self.places(shape, axis)[1] < self.cut.length

    def stack(self, tile, first):
        """[tokens, lanes] → [stacked·tokens, lanes]: for each head a copy with its lanes alone."""
        heads = range(first, first + self.cut.stacked)
        return jnp.concatenate([self.keep(tile, head) for head in heads], axis=0)

    def unstack(self, stack, first):
        """[stacked·tokens, lanes] → [tokens, lanes]: of each copy its head's lanes."""
        tokens = self.cut.tokens
        copies = [stack[i * tokens : (i + 1) * tokens] for i in range(self.cut.stacked)]
        return functools.reduce(
            jnp.add, [self.keep(copy, first + i) for i, copy in enumerate(copies)]
        )

    def stacks(self):
        """(first head, its rows of the bias) of the stacks of a group."""
        for first in range(0, self.cut.heads, self.cut.stacked):
            yield first, pl.ds(first * self.cut.tokens, self.cut.stacked * self.cut.tokens)

    def keep(self, tile, head):
        if self.cut.heads == 1:
            return tile
        lane = lax.broadcasted_iota(jnp.int32, tile.shape, 1)
        return jnp.where(lax.div(lane, self.geometry.dim) == head, tile, 0)

    def dot(self, x, y, contract):
        """Products in the map's dtype, sums in float32."""
        return lax.dot_general(
            x.astype(self.dtype),
            y.astype(self.dtype),
            (contract, ((), ())),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )

    def softmax_gradient(self, weights, out_grads, value):
        """The gradient of the scores, from their softmax and the gradient of the result."""
        weight_grads = self.dot(out_grads, value, ((1,), (1,)))
        mean = (weights * weight_grads).sum(axis=1, keepdims=True)
        return weights * (weight_grads - mean)

    def unroll(self, steps, windows=1):
        """How many steps of a loop, of so many windows each, are scheduled together."""
        return largest_divisor(steps, UNROLLED_TOKENS // (windows * self.cut.tokens))


def call(body, kernel: Tiles, inputs, outputs, *, scratch, interpret, name: str, rounds: int = 1):
    """Runs a kernel on every program of the plan.

    Args:
      inputs: (block spec, array) of each.
      outputs: (block spec, shape) of each.
      rounds: how often a program is visited, to write one block after another.
    """

    def buffered(spec):
        """Loaded while another is used, or not, where memory is short."""
        once = {"pipeline_mode": pl.Buffered(1)} if kernel.cut.buffers == 1 else {}
        return dataclasses.replace(spec, **once)

    specs, arrays = zip(*inputs, strict=True)
    out_specs, out_shapes = zip(*outputs, strict=True)
    return pl.pallas_call(
        functools.partial(body, kernel=kernel),
        grid=(*kernel.cut.programs, rounds),
        in_specs=[buffered(spec) for spec in specs],
        out_specs=[buffered(spec) for spec in out_specs],
        out_shape=out_shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", *("arbitrary",) * 3),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=interpret,
        name=name,
    )(*arrays)
