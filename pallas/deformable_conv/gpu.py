"""Deformable sampling on Hopper GPUs (Mosaic GPU), without atomics.

A GPU gathers well where every lane loads 16 bytes at an address of its own.
- Forward, a lane has 16 bytes of channels of one place and group: it computes the positions of its
  points and adds up four pixels of each.
- Of offsets and masks a lane has the gradient of one place and group, from the same pixels.
- Of the map a lane has the gradient of one pixel and group. It collects, instead of every place
  scattering: it visits the places whose points may have reached it, and weighs their gradients with
  the tents max(0, 1 - |x_s - x_p|)·max(0, 1 - |y_s - y_p|) of their points. XLA computes beforehand
  from how far the points of 128 neighbouring pixels may have come, wherever the offsets lead: a
  point far away costs time, never accuracy.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas.deformable_conv import reference
from pallas.deformable_conv.geometry import Sampling
from pallas.gpu_lanes import LANES, Memory, interpreted, launch

WIDEST = 32  # channels of a group that a lane holds in its registers
BYTES = 16  # that a lane moves at a time
FAR = 2.0**24  # beyond every map
AWAY = -2.0  # where nothing is


def refusal(geometry: Sampling) -> str | None:
    """Why the kernels cannot serve a shape; None if they can."""
    run = Kernel(geometry).run
    if geometry.channels % run or geometry.channels > WIDEST:
        wanted = f"a multiple of {run}, {WIDEST} at most"
        return f"groups of {geometry.channels} channels: expected {wanted}"
    return None


class Kernel:
    """The programs of one geometry."""

    def __init__(self, geometry: Sampling):
        self.geometry = geometry
        self.run = BYTES // jnp.dtype(geometry.dtype).itemsize  # channels moved at a time
        self.runs = max(1, geometry.channels // self.run)  # of a group
        self.pixels = geometry.height * geometry.width
        self.tiles = -(-self.pixels // LANES)  # of an image and group, for the gradient of the map

    # ------------------------------------------------------------------------------ the programs

    def forward(self, count: int, memory: Memory, number):
        """Computes `count` runs of the result."""
        geometry = self.geometry
        index = jnp.minimum(number * LANES + memory.lanes(), count - 1)
        pair, part = split(index, self.runs)
        image, place, group = self.taken_apart(pair)
        total = [memory.zeros()] * self.run
        for point, x, y in self.points(memory, pair, place, group):
            (mask,) = memory.load("mask", pair * geometry.points + point, 1)
            for corner in self.corners(x, y):
                weight = jnp.where(corner.seen, corner.down * corner.across, 0.0) * mask
                pixel = (image * self.pixels + corner.pixel) * geometry.groups + group
                values = memory.load("value", pixel * self.runs + part, self.run)
                total = [t + weight * value for t, value in zip(total, values, strict=True)]
        return [("out", index, total)]

    def backward_of_points(self, count: int, memory: Memory, number):
        """Computes the gradients of offsets and masks, of `count` places and groups."""
        geometry = self.geometry
        pair = jnp.minimum(number * LANES + memory.lanes(), count - 1)
        image, place, group = self.taken_apart(pair)
        out_grad, stored = self.channels(memory, "out_grad", pair), []
        for point, x, y in self.points(memory, pair, place, group):
            index = pair * geometry.points + point
            (mask,) = memory.load("mask", index, 1)
            by_mask = by_x = by_y = memory.zeros()
            for corner in self.corners(x, y):
                pixel = (image * self.pixels + corner.pixel) * geometry.groups + group
                values = self.channels(memory, "value", pixel)
                product = sum(v * grad for v, grad in zip(values, out_grad, strict=True))
                product = jnp.where(corner.seen, product, 0.0)
                by_mask += corner.down * corner.across * product
                by_x += corner.across_slope * corner.down * product
                by_y += corner.down_slope * corner.across * product
            scale = geometry.offset_scale * mask
            stored.append(("offset_grad", index, [scale * by_x, scale * by_y]))
            stored.append(("mask_grad", index, [by_mask]))
        return stored

    def backward_of_map(self, memory: Memory, number):
        """Computes the map's gradient in 128 pixels of an image and group."""
        geometry = self.geometry
        pair, tile = split(number, self.tiles)
        image, group = split(pair, geometry.groups)
        pixel = jnp.minimum(tile * LANES + memory.lanes(), self.pixels - 1)
        row, column = split(pixel, geometry.width)
        left, across, top, down = (memory.scalar("reach", 4 * number + i) for i in range(4))
        last_row, last_column = self.last_place(row - top), self.last_place(column - left)

        def per_column(up, back, total):
            own_row, own_column = last_row - up, last_column - back
            there = (own_row >= 0) & (own_row < geometry.out_height)
            there &= (own_column >= 0) & (own_column < geometry.out_width)
            place = jnp.where(there, own_row * geometry.out_width + own_column, 0)
            x = (column - geometry.stride * own_column).astype(jnp.float32)
            y = (row - geometry.stride * own_row).astype(jnp.float32)
            weight, first = memory.zeros(), 3 * pair * geometry.points * geometry.places + place
            for point in range(geometry.points):
                moved_x, moved_y, mask = (
                    memory.load("moved", first + (3 * point + part) * geometry.places, 1)[0]
                    for part in range(3)
                )
                weight += mask * tent(x - moved_x) * tent(y - moved_y)
            weight = jnp.where(there, weight, 0.0)
            grads = self.channels(
                memory, "out_grad", (image * geometry.places + place) * geometry.groups + group
            )
            return [t + weight * grad for t, grad in zip(total, grads, strict=True)]

        def per_row(up, total):
            return lax.fori_loop(0, across, functools.partial(per_column, up), total)

        total = lax.fori_loop(0, down, per_row, [memory.zeros()] * geometry.channels)
        run = ((image * self.pixels + pixel) * geometry.groups + group) * self.runs
        return [
            ("value_grad", run + part, total[part * self.run : (part + 1) * self.run])
            for part in range(self.runs)
        ]

    # ---------------------------------------------------------------------------- what they share

    def taken_apart(self, pair):
        """(image, place, group) of a place and group, numbered as in the arrays."""
        place, group = split(pair, self.geometry.groups)
        return *split(place, self.geometry.places), group

    def channels(self, memory: Memory, name: str, pair) -> list:
        """All of a group, from [..., G, C]."""
        found = []
        for part in range(self.runs):
            found += memory.load(name, pair * self.runs + part, self.run)
        return found

    def points(self, memory: Memory, pair, place, group):
        """(point, x, y) of all points of a place and group."""
        geometry = self.geometry
        grid, centers = geometry.grid(), geometry.centers()[0, 0]  # [G, P, 2], [G, 2]
        row, column = split(place, geometry.out_width)
        for point in range(geometry.points):
            offsets = memory.load("offsets", pair * geometry.points + point, 2)
            x, y = (
                (geometry.stride * at).astype(jnp.float32)
                + self.of_group(centers[:, axis], group)
                + geometry.offset_scale * (offset + self.of_group(grid[:, point, axis], group))
                for axis, (at, offset) in enumerate(zip((column, row), offsets, strict=True))
            )
            yield point, x, y

    def of_group(self, numbers: np.ndarray, group):
        """The group's of numbers [G] that depend on its dilation alone."""
        period = min(len(self.geometry.dilations), len(numbers))
        found = float(numbers[0])
        for kind in range(1, period):
            found = jnp.where(lax.rem(group, period) == kind, float(numbers[kind]), found)
        return found

    def last_place(self, pixel):
        """The last place whose own pixel is at most this one; either may be off the map."""
        stride = self.geometry.stride
        return split(pixel + int(FAR) * stride, stride)[0] - int(FAR)

    def corners(self, x, y):
        """The four pixels around a position."""
        height, width = self.geometry.height, self.geometry.width
        x, y = (jnp.where((x > -1) & (y > -1), at, AWAY) for at in (x, y))  # also if no number
        for row, down, down_slope in sides(y, height):
            for column, across, across_slope in sides(x, width):
                seen = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                pixel = jnp.where(seen, row * width + column, 0)
                yield Corner(seen, pixel, down, across, down_slope, across_slope)


class Corner(NamedTuple):
    """A pixel next to a sample: its weight is down·across, with derivatives of these by y and x."""

    seen: jax.Array  # otherwise it counts as nothing
    pixel: jax.Array  # of the image
    down: jax.Array
    across: jax.Array
    down_slope: float
    across_slope: float


def sides(position, size: int):
    """(pixel, weight, derivative of the weight) before and after a position along an axis."""
    position = jnp.clip(position, AWAY, size + 1.0)  # an integer must hold it
    whole = position.astype(jnp.int32)  # towards 0
    whole = jnp.where(whole.astype(jnp.float32) > position, whole - 1, whole)
    rest = position - whole.astype(jnp.float32)
    return (whole, 1 - rest, -1.0), (whole + 1, rest, 1.0)


def tent(distance):
    return jnp.maximum(1 - jnp.abs(distance), 0.0)


def split(index, size: int):
    """(index // size, index % size) of numbers from 0 on."""
    whole = lax.div(index, size)
    return whole, index - whole * size


def for_the_map(geometry: Sampling, offsets, mask):
    """Summarises the points of all images for the gradient of the map.

    Returns:
      moved: float32 [B, G, P, 3, Ho·Wo]: x and y of a point, from the pixel that its place begins
        at, and its mask. The points of neighbouring places lie in neighbouring lanes.
      reach: int32 [B, G, tiles, 4]: (left, across, top, down) for 128 pixels. One at column x
        visits `across` places, the last of which begins at x - left at most; and so in rows. Tiles
        of 128 places know how far their points lie from them, and count for those tiles of pixels
        whose rows they may reach.
    """
    height, width, stride = geometry.height, geometry.width, geometry.stride
    first, last = _rows_of_tiles(geometry.height * geometry.width, width)
    own_first, own_last = _rows_of_tiles(geometry.places, geometry.out_width)
    lowest = first[:, None] - stride * own_last  # of pixels from places, [tiles, tiles of places]
    highest = last[:, None] - stride * own_first
    begins = np.meshgrid(np.arange(geometry.out_width), np.arange(geometry.out_height))
    begins = [stride * place.astype(np.float32)[:, :, None, None] for place in begins]

    def of_image(offsets, mask):
        position = reference.positions(geometry, offsets)  # [Ho, Wo, G, P, 2]
        x, y = position[..., 0], position[..., 1]
        reached = (x > -1) & (x < width) & (y > -1) & (y < height)
        x, y = x - begins[0], y - begins[1]
        bounds = []
        for moved in (x, y):
            low = _of_tiles(jnp.where(reached, jnp.floor(moved), FAR).min(3), jnp.min, FAR)
            high = _of_tiles(jnp.where(reached, jnp.floor(moved) + 1, -FAR).max(3), jnp.max, -FAR)
            bounds.append((low, high))  # [G, 1, tiles of places]
        (left, right), (top, bottom) = bounds
        top, bottom = jnp.maximum(top, lowest[None]), jnp.minimum(bottom, highest[None])
        serves = (left <= right) & (top <= bottom)
        reach = []
        for low, high in ((left, right), (top, bottom)):
            low = jnp.where(serves, low, FAR).min(-1).astype(jnp.int32)
            high = jnp.where(serves, high, -FAR).max(-1).astype(jnp.int32)
            reach += [low, jnp.maximum((high - low) // stride + 1, 0)]
        moved = [jnp.where(reached, x, FAR), jnp.where(reached, y, FAR), mask.astype(jnp.float32)]
        moved = jnp.stack(moved, axis=-1).reshape(geometry.places, geometry.groups, -1)
        return jnp.moveaxis(moved, 0, -1), jnp.stack(reach, axis=-1)

    return jax.vmap(of_image)(offsets, mask)


def _rows_of_tiles(places: int, width: int):
    """The first and the last row that tiles of so many places in a row lie in."""
    first = np.arange(0, places, LANES)
    last = np.minimum(first + LANES, places) - 1
    return np.float32(first // width), np.float32(last // width)


def _of_tiles(x, best, otherwise: float):
    """The best of each tile: [Ho, Wo, G] → [G, 1, tiles]."""
    x = x.reshape(-1, x.shape[2])
    x = jnp.pad(x, ((0, -len(x) % LANES), (0, 0)), constant_values=otherwise)
    return best(x.reshape(-1, LANES, x.shape[1]), axis=1).T[:, None]


def forward(geometry: Sampling, value, offsets, mask, *, interpret: bool = False):
    """As `reference.deformable_sampling`."""
    kernel, execute = Kernel(geometry), interpreted if interpret else launch
    shape = (*offsets.shape[:4], geometry.channels)
    runs = math.prod(shape) // kernel.run
    return execute(
        functools.partial(kernel.forward, runs),
        pl.cdiv(runs, LANES),
        {"value": value, "offsets": offsets, "mask": mask},
        {"out": jax.ShapeDtypeStruct(shape, value.dtype)},
    )["out"]


def backward(geometry: Sampling, value, offsets, mask, out_grad, *, interpret: bool = False):
    """Gradients of (value, offsets, mask) for out_grad [B, Ho, Wo, G, C]."""
    kernel, execute = Kernel(geometry), interpreted if interpret else launch

    def like(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype)

    of_points = execute(
        functools.partial(kernel.backward_of_points, pairs := math.prod(mask.shape[:4])),
        pl.cdiv(pairs, LANES),
        {"value": value, "offsets": offsets, "mask": mask, "out_grad": out_grad},
        {"offset_grad": like(offsets), "mask_grad": like(mask)},
    )

    moved, reach = for_the_map(geometry, offsets, mask)
    of_map = execute(
        kernel.backward_of_map,
        len(value) * geometry.groups * kernel.tiles,
        {"moved": moved, "out_grad": out_grad, "reach": reach.reshape(-1)},
        {"value_grad": like(value)},
    )
    return of_map["value_grad"], of_points["offset_grad"], of_points["mask_grad"]
