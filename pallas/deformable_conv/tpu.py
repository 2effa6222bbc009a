"""Deformable sampling on TPUs (Mosaic), without a gather and without a scatter.

A TPU moves single pixels slowly and multiplies matrices fast. Bilinear sampling is linear in the
map: out[t] = Σ_s A[s, t]·value[s] over its pixels s, with A[s, t] = Σ_p mask·tent(x_s - x_p)·
tent(y_s - y_p) and tent(d) = max(0, 1 - |d|). The gradient of the map is A·dout, that of A is
value·doutᵀ, which the tents and their derivatives bring to masks and offsets.

A program takes 128 places of an image, one in each lane, and goes through the groups. The tents of
all columns of the map, [W, 128] for each point, are computed once; every row of the map weighs them
with its tents in y, and a product of matrices samples that row. Only rows are visited that the
points of these places reach, from the first to the last, wherever the offsets lead: a point far
away costs time, never accuracy.

A row of more than 128 columns is several lines of 128. A map that does not fit into the vector
memory of the smallest core is cut into bands of rows; each band samples for all places, and what
they find is added up.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.deformable_conv.geometry import Sampling
from pallas.tpu_core import BUDGETS, LANES, SUBLANES, VMEM_BYTES, largest_divisor, round_up

AWAY = -2.0  # a coordinate where nothing is
TOGETHER = 16  # registers of a row's weights, or of several, that are computed side by side


def refusal(geometry: Sampling, *, every_core: bool) -> str | None:
    """Why the kernels cannot serve a shape; None if they can.

    `every_core`: on every TPU since v4, not only on those with more vector memory.
    """
    if Kernel(geometry).vmem_bytes() <= BUDGETS[0 if every_core else -1]:
        return None
    return "the gradient of one row does not fit into a core's vector memory"


class Kernel:
    """The arithmetic of one geometry inside a program."""

    def __init__(self, geometry: Sampling):
        self.geometry = geometry
        self.dtype = jnp.dtype(geometry.dtype)
        self.precision = lax.Precision.HIGHEST if geometry.dtype == "float32" else None
        # Groups may not lie across the borders of registers.
        sizes = [size for size in (16, 32, 64, LANES) if size >= geometry.channels]
        self.depth = sizes[0] if sizes else round_up(geometry.channels, LANES)
        self.block = max(self.depth, LANES)  # channels that are multiplied at a time
        self.channels = geometry.groups * self.depth
        if self.channels > self.block:
            self.channels = round_up(self.channels, self.block)
        else:
            self.block = self.channels
        self.pairs = geometry.groups * geometry.points
        self.tiles = pl.cdiv(geometry.places, LANES)
        self.lines = pl.cdiv(geometry.width, LANES)  # of a row
        self.columns = geometry.width if self.lines == 1 else LANES  # of a line
        self.band = geometry.height  # rows of the map in a program
        while self.band > 1 and self.vmem_bytes() > BUDGETS[0]:
            self.band = largest_divisor(geometry.height, self.band - 1)
        self.bands = geometry.height // self.band
        registers = pl.cdiv(self.columns, SUBLANES)
        # Tents are loaded once for so many rows, and their products' latencies overlap.
        self.rows = largest_divisor(self.band, TOGETHER // registers) if self.lines == 1 else 1

    # -------------------------------------------------------------------------- inside a program

    def dot(self, x, y, contract):
        """Products in the map's dtype, sums in float32."""
        return lax.dot_general(
            x.astype(self.dtype),
            y.astype(self.dtype),
            (contract, ((), ())),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )

    def places(self, tile, shape, axis):
        """The numbers of the places of a program along an axis."""
        return tile * LANES + lax.broadcasted_iota(jnp.int32, shape, axis)

    def first_row(self):
        """The first row of this program's band."""
        return lax.rem(pl.program_id(0), self.bands) * self.band

    def points(self, offsets, masks, grid, group, tile, start):
        """x, y and mask of a group's points, [P, 128] each, and the (first, end) they reach.

        These count steps: lines of the band, which begins at row `start`, so many together as
        `rows` says.

        Args:
          offsets: [2·G·P, 128], x and y in turn.
          masks: [G·P, 128].
          grid: [G, 2, P, 128], where the points of the first place are without offsets.
        """
        geometry, count = self.geometry, self.geometry.points
        place = self.places(tile, (count, LANES), 1)
        row, column = lax.div(place, geometry.out_width), lax.rem(place, geometry.out_width)
        x, y = (
            geometry.stride * at.astype(jnp.float32)
            + geometry.offset_scale * offsets[pl.ds(2 * count * group + axis, count, 2)]
            + grid[group, axis]
            for axis, at in enumerate((column, row))
        )
        reached = (place < geometry.places) & (x > -1) & (y > -1)
        mask = jnp.where(reached, masks[pl.ds(count * group, count)], 0.0)
        x, y = jnp.where(reached, x, AWAY), jnp.where(reached, y, AWAY)
        top = jnp.floor(y)
        first = jnp.where(reached, top, geometry.height).min()
        end = jnp.where(reached, top + 2, 0.0).max()
        first, end = (jnp.clip(edge, 0, geometry.height).astype(jnp.int32) for edge in (first, end))
        first, end = (jnp.clip(edge - start, 0, self.band) for edge in (first, end))
        first, end = lax.div(first, self.rows), lax.div(end + self.rows - 1, self.rows)
        return x, y, mask, (first * self.lines, end * self.lines)

    def lines_of(self, step, start):
        """(number in the band, which of its row, the row's number as a float) of a step's lines."""
        for i in range(self.rows):
            line = step * self.rows + i
            row, part = line, 0
            if self.lines > 1:
                row, part = lax.div(line, self.lines), lax.rem(line, self.lines)
            yield line, part, (row + start).astype(jnp.float32)

    def for_columns(self, x, fill):
        """Calls fill(line of a row, point, columns [columns, 128], x [1, 128]) for all."""
        column = lax.broadcasted_iota(jnp.int32, (self.columns, LANES), 0).astype(jnp.float32)
        for part in range(self.lines):
            for point in range(self.geometry.points):
                fill(part, point, column + float(part * LANES), x[point : point + 1])

    def channels_of(self, group):
        """The group's own channels."""
        return pl.ds(pl.multiple_of(group * self.depth, self.depth), self.depth)

    def block_of(self, group):
        """The block of channels that the group lies in."""
        if self.channels == self.block:
            return pl.ds(0, self.block)
        start = lax.div(group * self.depth, self.block) * self.block
        return pl.ds(pl.multiple_of(start, self.block), self.block)

    def is_own(self, group, shape, axis):
        """Which channels of that block are the group's."""
        channel = lax.broadcasted_iota(jnp.int32, shape, axis)
        return lax.div(channel, self.depth) == lax.rem(group, self.block // self.depth)

    # -------------------------------------------------------------------------- around a program

    def vmem_bytes(self) -> int:
        """Bytes of a core's vector memory for a program's blocks and scratch, at most."""
        size, geometry = self.dtype.itemsize, self.geometry
        lanes, pixels = (
            round_up(self.channels, LANES),
            self.band * self.lines * round_up(self.columns, 16),
        )
        numbers = round_up(2 * self.pairs, LANES) + round_up(self.pairs, LANES)
        tents = 4 * geometry.points * self.lines * round_up(self.columns, SUBLANES) * LANES
        tile = LANES * (2 * 4 * numbers + 2 * size * lanes) + 4 * LANES * (numbers + lanes)
        turned = self.band * self.lines * self.channels * LANES * size
        forward = pixels * lanes * size + turned + tents + tile
        tile += LANES * (2 * 4 * numbers + 4 * numbers)
        return max(forward, pixels * lanes * (2 * size + 4) + 2 * tents + tile)

    def pack(self, x):
        """[..., G, C] → [..., channels], with padding."""
        gap = self.depth - x.shape[-1]
        x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, gap),)) if gap else x
        x = x.reshape(*x.shape[:-2], -1)
        gap = self.channels - x.shape[-1]
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, gap),)) if gap else x

    def unpack(self, x):
        """The inverse."""
        x = x[..., : self.geometry.groups * self.depth]
        x = x.reshape(*x.shape[:-1], self.geometry.groups, self.depth)
        return x[..., : self.geometry.channels]

    def inputs(self, value, offsets, mask):
        """(block spec, array) of each as the kernels take them."""
        geometry, batch = self.geometry, len(value)
        grid = geometry.offset_scale * geometry.grid() + geometry.centers()[0, 0][:, None]
        grid = jnp.asarray(grid, jnp.float32).swapaxes(1, 2)[..., None]  # [G, 2, P, 1]
        grid = jnp.broadcast_to(grid, (*grid.shape[:3], LANES))
        value = self.pack(value)
        if self.lines > 1:
            gap = self.lines * LANES - geometry.width
            value = jnp.pad(value, ((0, 0), (0, 0), (0, gap), (0, 0)))
        shape = (batch * self.bands, self.band * self.lines, self.columns, self.channels)
        value = value.reshape(shape)
        return [
            (pl.BlockSpec(grid.shape, lambda image, tile: (0, 0, 0, 0)), grid),
            (_of_image(value), value),
            (self.of_places(2 * self.pairs), offsets.reshape(batch, geometry.places, -1)),
            (self.of_places(self.pairs), mask.reshape(batch, geometry.places, -1)),
        ]

    def of_places(self, width: int):
        """The places of a program, and so many numbers of each."""
        return pl.BlockSpec(
            (1, LANES, round_up(width, LANES)),
            lambda band, tile: (lax.div(band, self.bands), tile, 0),
        )

    def output(self, batch: int, width: int, dtype):
        """(block spec, shape) of so many numbers of each place; of every band, in float32."""
        dtype = dtype if self.bands == 1 else jnp.float32
        shape = jax.ShapeDtypeStruct((batch * self.bands, self.geometry.places, width), dtype)
        block = (1, LANES, round_up(width, LANES))
        return pl.BlockSpec(block, lambda band, tile: (band, tile, 0)), shape

    def add_bands(self, x, dtype):
        """[B·bands, places, numbers] → [B, places, numbers]"""
        if self.bands == 1:
            return x
        return x.reshape(-1, self.bands, *x.shape[1:]).sum(1).astype(dtype)

    def tent_scratch(self):
        return pltpu.VMEM((self.geometry.points, self.lines, self.columns, LANES), jnp.float32)

    def number_scratch(self):
        """Offsets and masks of a program, with the places in the lanes."""
        return [
            pltpu.VMEM((round_up(count, LANES), LANES), jnp.float32)
            for count in (2 * self.pairs, self.pairs)
        ]


def tent(distance):
    return jnp.maximum(1 - jnp.abs(distance), 0)


def slope(pixel, position):
    """The derivative of the tent by the position, in the cell that its floor picks."""
    step = pixel - jnp.floor(position)
    return jnp.where(step == 0, -1.0, jnp.where(step == 1, 1.0, 0.0))


def _forward_kernel(
    grid, value, offsets, masks, out, turned, moved, weighed, result, tents, *, kernel
):
    geometry, count, tile = kernel.geometry, kernel.geometry.points, pl.program_id(1)
    start = kernel.first_row()

    @pl.when(tile == 0)
    def _():
        def turn(line, carry):  # [columns, C] → [C, columns]
            turned[line] = value[0, line].astype(jnp.float32).T.astype(turned.dtype)
            return carry

        lax.fori_loop(0, kernel.band * kernel.lines, turn, 0)

    moved[...] = offsets[0].astype(jnp.float32).T
    weighed[...] = masks[0].astype(jnp.float32).T

    def per_group(group, carry):
        x, y, mask, (first, end) = kernel.points(moved, weighed, grid, group, tile, start)
        own = kernel.channels_of(group)

        def fill(part, point, column, x):
            tents[point, part] = tent(column - x)

        kernel.for_columns(x, fill)

        def per_step(step, total):
            for line, part, at in kernel.lines_of(step, start):
                down = mask * tent(at - y)
                weights = down[0:1] * tents[0, part]
                for point in range(1, count):
                    weights += down[point : point + 1] * tents[point, part]
                total += kernel.dot(turned[line, own], weights, ((1,), (0,)))
            return total

        zeros = jnp.zeros((kernel.depth, LANES), jnp.float32)
        result[own] = lax.fori_loop(first, end, per_step, zeros)
        return carry

    lax.fori_loop(0, geometry.groups, per_group, 0)
    out[0] = result[...].T.astype(out.dtype)


def _backward_kernel(
    # what comes in
    grid,
    value,
    offsets,
    masks,
    out_grad,
    # what goes out
    value_grad,
    offset_grad,
    mask_grad,
    # scratch
    total,
    moved,
    weighed,
    moved_grad,
    weighed_grad,
    turned_grad,
    tents,
    slopes,
    sums,
    *,
    kernel,
):
    geometry, count, tile = kernel.geometry, kernel.geometry.points, pl.program_id(1)
    start = kernel.first_row()

    @pl.when(tile == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    moved[...] = offsets[0].astype(jnp.float32).T
    weighed[...] = masks[0].astype(jnp.float32).T
    there = kernel.places(tile, out_grad.shape[1:], 0) < geometry.places
    turned_grad[...] = jnp.where(there, out_grad[0], 0).astype(jnp.float32).T

    def per_group(group, carry):
        x, y, mask, (first, end) = kernel.points(moved, weighed, grid, group, tile, start)
        block = kernel.block_of(group)

        def fill(part, point, column, x):
            tents[point, part] = tent(column - x)
            slopes[point, part] = slope(column, x)

        kernel.for_columns(x, fill)
        # Products take whole blocks of channels; those of other groups count as 0.
        of_places, of_channels = out_grad[0, :, block], turned_grad[block]
        there = kernel.places(tile, of_places.shape, 0) < geometry.places
        own = kernel.is_own(group, of_places.shape, 1)
        of_places = jnp.where(own & there, of_places, 0)
        of_channels = jnp.where(kernel.is_own(group, of_channels.shape, 0), of_channels, 0)
        sums[...] = jnp.zeros_like(sums)

        def per_step(step, carry):
            by_mask, by_x, by_y = ([0.0] * count for _ in range(3))
            for line, part, at in kernel.lines_of(step, start):
                down, down_slope = tent(at - y), slope(at, y)
                masked = mask * down
                weight_grads = kernel.dot(value[0, line, :, block], of_channels, ((1,), (0,)))
                weights = jnp.zeros_like(weight_grads)
                for point in range(count):
                    one = slice(point, point + 1)
                    weights += masked[one] * tents[point, part]
                    by_tent = _fold(weight_grads * tents[point, part])
                    by_slope = _fold(weight_grads * slopes[point, part])
                    by_mask[point] += down[one] * by_tent
                    by_x[point] += down[one] * by_slope
                    by_y[point] += down_slope[one] * by_tent
                total[line, :, block] += kernel.dot(weights, of_places, ((1,), (0,)))
            for point, grads in enumerate(zip(by_mask, by_x, by_y, strict=True)):
                for i, grad in enumerate(grads):
                    sums[i, point] += grad
            return carry

        lax.fori_loop(first, end, per_step, 0)
        by_mask, by_x, by_y = (sums[i].sum(1) for i in range(3))
        weighed_grad[pl.ds(count * group, count)] = by_mask
        for axis, grad in enumerate((by_x, by_y)):
            grad = geometry.offset_scale * mask * grad
            moved_grad[pl.ds(2 * count * group + axis, count, 2)] = grad
        return carry

    lax.fori_loop(0, geometry.groups, per_group, 0)
    offset_grad[0] = moved_grad[...].T.astype(offset_grad.dtype)
    mask_grad[0] = weighed_grad[...].T.astype(mask_grad.dtype)

    @pl.when(tile == kernel.tiles - 1)
    def _():
        value_grad[0] = total[...].astype(value_grad.dtype)


def _fold(x):
    """The sum of all registers of [W, 128], [8, 128]; nothing moves between sublanes."""
    gap = -x.shape[0] % SUBLANES
    x = jnp.pad(x, ((0, gap), (0, 0))) if gap else x
    return x.reshape(-1, SUBLANES, LANES).sum(0)


def _of_image(array):
    """A whole band, loaded once for many programs: no need to load while another is used."""
    return pl.BlockSpec(
        (1, *array.shape[1:]),
        lambda image, tile: (image, 0, 0, 0),
        pipeline_mode=pl.Buffered(1),
    )


def _call(body, kernel: Kernel, inputs, outputs, scratch, *, interpret, name: str):
    specs, arrays = zip(*inputs, strict=True)
    out_specs, out_shapes = zip(*outputs, strict=True)
    return pl.pallas_call(
        functools.partial(body, kernel=kernel),
        grid=(len(arrays[1]), kernel.tiles),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=name,
    )(*arrays)


def forward(geometry: Sampling, value, offsets, mask, *, interpret: bool = False):
    """As `reference.deformable_sampling`."""
    kernel, batch = Kernel(geometry), len(value)
    turned = (kernel.band * kernel.lines, kernel.channels, kernel.columns)
    scratch = [
        pltpu.VMEM(turned, value.dtype),
        *kernel.number_scratch(),
        pltpu.VMEM((round_up(kernel.channels, LANES), LANES), jnp.float32),
        kernel.tent_scratch(),
    ]
    (out,) = _call(
        _forward_kernel,
        kernel,
        kernel.inputs(value, offsets, mask),
        [kernel.output(batch, kernel.channels, value.dtype)],
        scratch,
        interpret=interpret,
        name="deformable_sampling_forward",
    )
    out = kernel.unpack(kernel.add_bands(out, value.dtype))
    return out.reshape(batch, geometry.out_height, geometry.out_width, *out.shape[2:])


def backward(geometry: Sampling, value, offsets, mask, out_grad, *, interpret: bool = False):
    """Gradients of (value, offsets, mask) for out_grad [B, Ho, Wo, G, C]."""
    kernel, batch, places = Kernel(geometry), len(value), geometry.places
    inputs = kernel.inputs(value, offsets, mask)
    given = kernel.pack(out_grad).reshape(batch, places, -1)
    whole = pl.BlockSpec(
        (1, LANES, kernel.channels), lambda band, tile: (lax.div(band, kernel.bands), tile, 0)
    )
    packed = jax.ShapeDtypeStruct(inputs[1][1].shape, value.dtype)
    numbers = [
        kernel.output(batch, kernel.pairs * parts, like.dtype)
        for parts, like in ((2, offsets), (1, mask))
    ]
    scratch = [
        pltpu.VMEM(packed.shape[1:], jnp.float32),
        *kernel.number_scratch(),
        *kernel.number_scratch(),
        pltpu.VMEM((kernel.channels, LANES), jnp.float32),
        kernel.tent_scratch(),
        kernel.tent_scratch(),
        pltpu.VMEM((3, geometry.points, SUBLANES, LANES), jnp.float32),
    ]
    value_grad, offset_grad, mask_grad = _call(
        _backward_kernel,
        kernel,
        [*inputs, (whole, given)],
        [(_of_image(packed), packed), *numbers],
        scratch,
        interpret=interpret,
        name="deformable_sampling_backward",
    )
    shape = (batch, geometry.height, kernel.lines * kernel.columns, kernel.channels)
    value_grad = kernel.unpack(value_grad.reshape(shape)[:, :, : geometry.width])
    offset_grad = kernel.add_bands(offset_grad, offsets.dtype).reshape(offsets.shape)
    return value_grad, offset_grad, kernel.add_bands(mask_grad, mask.dtype).reshape(mask.shape)
