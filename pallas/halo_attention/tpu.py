"""TPU kernels (Mosaic) for halo attention; see `tpu.py` for tiles, groups and stacks.

A program takes one image and a group of heads. Keys and values of a row of blocks, with their halo,
are laid into a strip with zeros beyond the map; neighbouring blocks read overlapping tiles of it.
Their gradients add up in a float32 map that stays on chip until the image is done.

The scores of positions are a matrix product too. With all b·w pairs of query line i and key line a,
X = Q Tᵀ for the table's rows T[(i, a)] = table[a - i + w - 1]; of X only the columns of the query's
own line are kept, and a matrix of zeros and ones brings column (i, a) to all keys of line a.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.halo_attention.geometry import Halo
from pallas.tiles.tpu import MASKED, Plan, Tiles, call, largest_group
from pallas.tpu_core import BUDGETS, LANES, SUBLANES, round_up


def plan(geometry: Halo, batch: int, *, backward: bool, budgets=BUDGETS) -> Plan | None:
    """One image and one group of heads to a program; None if that does not fit."""
    heads, dim, block = geometry.heads, geometry.dim, geometry.block
    group = largest_group(heads, dim)
    groups = 1 if group * dim % LANES == 0 else heads // group
    halves = 1 if batch % 2 else 2
    cut = Plan(
        tall=False,
        lines=block,
        length=block,
        stride=round_up(block, SUBLANES),
        heads=group,
        stacked=group,
        lanes=group * dim,
        groups=groups,
        programs=(halves, heads // group // groups, batch // halves, 1),
        images=1,
        strips=geometry.height // block,
        buffers=2,
    )
    for budget in budgets:
        for buffers in (2, 1):
            option = cut._replace(buffers=buffers)
            if vmem_bytes(geometry, option, backward=backward) <= budget:
                return option
    return None


def vmem_bytes(geometry: Halo, cut: Plan, *, backward: bool) -> int:
    """Bytes of a core's vector memory for a program's blocks and scratch."""
    kernel = HaloKernel(geometry, cut)
    size = kernel.dtype.itemsize
    places = geometry.height * round_up(geometry.width, 32 // size) * size
    one = round_up(cut.groups * cut.lanes, LANES)
    packed = 3 * one if cut.is_split else round_up(3 * cut.groups * cut.lanes, LANES)
    lanes = 4 * round_up(cut.lanes, LANES)
    blocks = places * (packed + one)
    fixed = cut.groups * lanes * geometry.block * kernel.query_length * (1 + backward)
    fixed += 2 * cut.groups * lanes * geometry.window * kernel.key_length
    scores = cut.heads * cut.tokens * round_up(kernel.keys, LANES) * 4
    if backward:
        blocks += places * (one if cut.is_split else packed)
        fixed += places * (packed - one) if cut.is_split else 0
        fixed += 2 * cut.groups * lanes * kernel.padded_height * kernel.key_length
    return cut.buffers * blocks + fixed + (2 + 2 * backward) * scores


class HaloKernel(Tiles[Halo]):
    """The arithmetic of one geometry inside a program."""

    def __init__(self, geometry: Halo, cut: Plan):
        super().__init__(geometry, cut)
        self.rows, self.columns = (
            geometry.height // geometry.block,
            geometry.width // geometry.block,
        )
        self.key_stride = round_up(geometry.window, SUBLANES)
        self.keys = geometry.window * self.key_stride  # of a tile
        self.pairs = geometry.block * self.key_stride  # of a line of queries and one of keys
        self.padded_height = geometry.height + 2 * geometry.halo
        last = (self.columns - 1) * geometry.block
        self.query_length = round_up(last + cut.stride, SUBLANES)
        self.key_length = round_up(last + self.key_stride, SUBLANES)

    # ----------------------------------------------------------------------- between map and strip

    def slabs(self, refs):
        """(slab, block, its lanes) of the groups of all parts, which come in one block or three."""
        groups = self.cut.groups
        for slab in range(groups * (3 if len(refs) == 1 else len(refs))):
            if len(refs) == 1:
                yield slab, refs[0], self.lanes(slab)
            else:
                yield slab, refs[slab // groups], self.lanes(slab % groups)

    def read_lines(self, ref, strip, scratch, slab, lanes):
        """The rows of a row of blocks → float32 scratch."""
        block = self.geometry.block
        for row in range(block):
            x = ref[0, strip * block + row, :, lanes].astype(jnp.float32)
            scratch[slab, row, : self.geometry.width] = x

    def read_keys(self, ref, strip, scratch, slab, lanes):
        """The same with the halo, zeros beyond the map."""
        geometry = self.geometry
        for row in range(geometry.window):
            place = strip * geometry.block - geometry.halo + row
            inside = (place >= 0) & (place < geometry.height)
            x = ref[0, jnp.clip(place, 0, geometry.height - 1), :, lanes].astype(jnp.float32)
            columns = pl.ds(geometry.halo, geometry.width)
            scratch[slab, row, columns] = jnp.where(inside, x, 0)

    def write_lines(self, ref, strip, scratch, slab, lanes):
        """The inverse of `read_lines`."""
        block = self.geometry.block
        for row in range(block):
            x = scratch[slab, row, : self.geometry.width]
            ref[0, strip * block + row, :, lanes] = x.astype(ref.dtype)

    def write_key_grads(self, ref, totals, slab, lanes):
        """A map of summed gradients, without the halo."""
        geometry = self.geometry

        def step(row, carry):
            x = totals[slab, row + geometry.halo, pl.ds(geometry.halo, geometry.width)]
            ref[0, row, :, lanes] = x.astype(ref.dtype)
            return carry

        lax.fori_loop(0, geometry.height, step, 0)

    def queries_at(self, column):
        """Indices of a block's lines in a strip; with padding."""
        return slice(None), pl.ds(column * self.geometry.block, self.cut.stride)

    def keys_at(self, column):
        """Indices of a neighbourhood's lines in a strip with halo; with padding."""
        return slice(None), pl.ds(column * self.geometry.block, self.key_stride)

    def load(self, scratch, slab, indices):
        tile = scratch[(slab, *indices)]
        return tile.reshape(-1, tile.shape[-1])

    def store(self, scratch, slab, column, tile):
        """Writes a block's tile back, without its padding."""
        block = self.geometry.block
        tile = tile.reshape(block, self.cut.stride, -1)[:, :block]
        scratch[slab, :, pl.ds(column * block, block)] = tile

    # ------------------------------------------------------------------------------ inside a block

    def scores(self, queries, key, tables, strip, column):
        """[stacked·tokens, keys] in float32, keys beyond the map masked."""
        geometry = self.geometry
        scores = self.dot(queries, key, ((1,), (1,))) * geometry.dim**-0.5
        for axis, table in enumerate(tables):
            pairs = self.own_line(self.dot(queries, table, ((1,), (1,))), axis)
            scores = scores + self.spread(pairs, axis)
        key_index = lax.broadcasted_iota(jnp.int32, (1, self.keys), 1)
        line, place = lax.div(key_index, self.key_stride), lax.rem(key_index, self.key_stride)
        row = strip * geometry.block - geometry.halo + line
        beside = column * geometry.block - geometry.halo + place
        inside = (row >= 0) & (row < geometry.height) & (place < geometry.window)
        inside &= (beside >= 0) & (beside < geometry.width)
        return jnp.where(inside, scores, MASKED)

    def own_line(self, pairs, axis):
        """Keeps the columns [(i, a)] of the query's own line (axis 0) or column (axis 1) i."""
        own = self.places((pairs.shape[0], 1), 0)[axis]
        line = lax.div(lax.broadcasted_iota(jnp.int32, (1, self.pairs), 1), self.key_stride)
        return jnp.where(own == line, pairs, 0)

    def spread(self, pairs, axis):
        """[rows, (i, a)] → [rows, keys]: the values of a go to all keys of line or column a."""
        rounded = pairs.astype(self.dtype).astype(jnp.float32)
        spread = self.dot(rounded, self.spreader(axis), ((1,), (0,)))
        if self.dtype == jnp.float32:
            return spread
        # Large scores need more digits than bfloat16 has: what rounding lost goes the same way.
        return spread + self.dot(pairs - rounded, self.spreader(axis), ((1,), (0,)))

    def spreader(self, axis):
        """[(i, a), keys]: 1 where the key's line (axis 0) or column (axis 1) is a."""
        pair = lax.broadcasted_iota(jnp.int32, (self.pairs, self.keys), 0)
        key = lax.broadcasted_iota(jnp.int32, (self.pairs, self.keys), 1)
        place = (lax.div, lax.rem)[axis](key, self.key_stride)
        return (lax.rem(pair, self.key_stride) == place).astype(jnp.float32)


def _forward_kernel(*refs, kernel: HaloKernel):
    cut = kernel.cut
    *maps, row_ref, column_ref, out_ref, query_strip, key_strip = refs
    key_strip[...] = jnp.zeros(key_strip.shape, jnp.float32)
    query_strip[...] = jnp.zeros(query_strip.shape, jnp.float32)
    tables = row_ref[...], column_ref[...]

    def do_strip(strip, carry):
        _read(kernel, maps, strip, query_strip, key_strip)

        def do_block(column, carry):
            for group in range(cut.groups):
                key = kernel.load(key_strip, group, kernel.keys_at(column))
                value = kernel.load(key_strip, cut.groups + group, kernel.keys_at(column))
                query = kernel.load(query_strip, group, kernel.queries_at(column))
                scores = kernel.scores(kernel.stack(query, 0), key, tables, strip, column)
                weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
                out = kernel.dot(weights, value, ((1,), (0,)))
                out = kernel.unstack(out / weights.sum(axis=1, keepdims=True), 0)
                kernel.store(query_strip, group, column, out)
            return carry

        unroll = kernel.unroll(kernel.columns, 4 * cut.groups)
        lax.fori_loop(0, kernel.columns, do_block, 0, unroll=unroll)
        for group in range(cut.groups):
            kernel.write_lines(out_ref, strip, query_strip, group, kernel.lanes(group))
        return carry

    lax.fori_loop(0, kernel.rows, do_strip, 0)


def _read(kernel: HaloKernel, maps, strip, query_strip, key_strip):
    for slab, ref, lanes in kernel.slabs(maps):
        if slab < kernel.cut.groups:
            kernel.read_lines(ref, strip, query_strip, slab, lanes)
        else:
            kernel.read_keys(ref, strip, key_strip, slab - kernel.cut.groups, lanes)


def _backward_kernel(*refs, kernel: HaloKernel):
    geometry, cut = kernel.geometry, kernel.cut
    refs = list(refs)
    maps = [refs.pop(0) for _ in range(3 if cut.is_split else 1)]
    row_ref, column_ref, out_grad_ref, map_grad_ref, row_grad_ref, column_grad_ref, *scratch = refs
    query_strip, key_strip, out_grad_strip, totals, *held = scratch
    image_program, part = pl.program_id(2), pl.program_id(4)
    scale = geometry.dim**-0.5

    def do_strip(strip, carry):
        _read(kernel, maps, strip, query_strip, key_strip)
        for group in range(cut.groups):
            kernel.read_lines(out_grad_ref, strip, out_grad_strip, group, kernel.lanes(group))
        tables = row_ref[...], column_ref[...]

        def do_block(column, carry):
            for group in range(cut.groups):
                key = kernel.load(key_strip, group, kernel.keys_at(column))
                value = kernel.load(key_strip, cut.groups + group, kernel.keys_at(column))
                query = kernel.load(query_strip, group, kernel.queries_at(column))
                out_grad = kernel.load(out_grad_strip, group, kernel.queries_at(column))
                out_grad = jnp.where(kernel.is_token(out_grad.shape, 0), out_grad, 0)

                queries, out_grads = kernel.stack(query, 0), kernel.stack(out_grad, 0)
                scores = kernel.scores(queries, key, tables, strip, column)
                weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
                weights = weights / weights.sum(axis=1, keepdims=True)
                score_grads = kernel.softmax_gradient(weights, out_grads, value)

                query_grad = kernel.dot(score_grads, key, ((1,), (0,))) * scale
                for axis, table_grad_ref in enumerate((row_grad_ref, column_grad_ref)):
                    pairs = kernel.dot(score_grads, kernel.spreader(axis), ((1,), (1,)))
                    pairs = kernel.own_line(pairs, axis)
                    query_grad += kernel.dot(pairs, tables[axis], ((1,), (0,)))
                    table_grad_ref[0, 0] += kernel.dot(pairs, queries, ((0,), (0,)))
                kernel.store(query_strip, group, column, kernel.unstack(query_grad, 0))
                key_grad = kernel.dot(score_grads, queries, ((0,), (0,))) * scale
                value_grad = kernel.dot(weights, out_grads, ((0,), (0,)))
                shape = (geometry.window, kernel.key_stride, cut.lanes)
                lines = pl.ds(strip * geometry.block, geometry.window)
                for slab, grad in ((group, key_grad), (cut.groups + group, value_grad)):
                    totals[slab, lines, kernel.keys_at(column)[1]] += grad.reshape(shape)
            return carry

        lax.fori_loop(0, kernel.columns, do_block, 0)
        for group in range(cut.groups):
            kernel.write_lines(map_grad_ref, strip, query_strip, group, kernel.lanes(group))
        return carry

    @pl.when(part == 0)
    def _():
        for ref in (row_grad_ref, column_grad_ref):

            @pl.when(image_program == 0)
            def _(ref=ref):
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        for ref in (key_strip, query_strip, out_grad_strip, totals):
            ref[...] = jnp.zeros(ref.shape, ref.dtype)
        lax.fori_loop(0, kernel.rows, do_strip, 0)
        for slab in range(2 * cut.groups):
            if cut.is_split:
                kernel.write_key_grads(held[0].at[slab], totals, slab, kernel.lanes(0))
            else:
                lanes = kernel.lanes(cut.groups + slab)
                kernel.write_key_grads(map_grad_ref, totals, slab, lanes)

    if cut.is_split:
        # A block of the packed gradient holds one part: the others are held until their turn.
        @pl.when(part > 0)
        def _():
            map_grad_ref[...] = held[0][part - 1]


# ------------------------------------------------------------------------------ what is called


def refusal(geometry: Halo, *, every_core: bool) -> str | None:
    """Why the kernels cannot serve a shape; None if they can.

    `every_core`: on every TPU since v4, not only on those with more vector memory.
    """
    if plan(geometry, 1, backward=True, budgets=BUDGETS[: 1 if every_core else None]):
        return None
    return "its gradient does not fit into a core's vector memory"


def forward(geometry: Halo, qkv, row_table, column_table, *, interpret: bool = False):
    """As `halo_attention`; [B, H, W, 3, h, d] → [B, H, W, h, d]."""
    blocks = _Blocks(geometry, qkv, backward=False)
    inputs = blocks.inputs(qkv, row_table, column_table)
    (out,) = call(
        _forward_kernel,
        blocks.kernel,
        inputs,
        [blocks.map_like(qkv, 1)],
        scratch=blocks.strips(),
        interpret=interpret,
        name="halo_attention_forward",
    )
    return out.reshape(*qkv.shape[:3], geometry.heads, geometry.dim)


def backward(geometry: Halo, qkv, row_table, column_table, out_grad, *, interpret: bool = False):
    """The gradients of the three arrays of `forward`, given that of its result."""
    blocks = _Blocks(geometry, qkv, backward=True)
    kernel, cut = blocks.kernel, blocks.cut
    inputs = blocks.inputs(qkv, row_table, column_table)
    spec, shape = blocks.map_like(qkv, 1)
    inputs.append((spec, out_grad.reshape(shape.shape)))
    table = (kernel.pairs, cut.lanes)
    table_spec = pl.BlockSpec((1, 1, *table), lambda half, channel, *_: (half, channel, 0, 0))
    table_shape = jax.ShapeDtypeStruct((*cut.programs[:2], *table), jnp.float32)
    width = cut.groups * cut.lanes
    scratch = blocks.strips()
    scratch.append(scratch[0])
    slab = (kernel.padded_height, kernel.key_length, cut.lanes)
    scratch.append(pltpu.VMEM((2 * cut.groups, *slab), jnp.float32))
    if cut.is_split:
        block = (2, 1, geometry.height, geometry.width, width)
        scratch.append(pltpu.VMEM(block, qkv.dtype))
    map_grad, *table_grads = call(
        _backward_kernel,
        kernel,
        inputs,
        [blocks.map_like(qkv, 3), (table_spec, table_shape), (table_spec, table_shape)],
        scratch=scratch,
        interpret=interpret,
        name="halo_attention_backward",
        rounds=3 if cut.is_split else 1,
    )
    row_grad, column_grad = (
        jax.linear_transpose(blocks.pack_table, given)(grad.sum((0, 1)))[0]
        for given, grad in zip((row_table, column_table), table_grads, strict=True)
    )
    return map_grad.reshape(qkv.shape), row_grad, column_grad


class _Blocks:
    """The parts of the arrays that each program is given, and their layout."""

    def __init__(self, geometry: Halo, qkv, *, backward: bool):
        self.geometry = geometry
        cut = plan(geometry, qkv.shape[0], backward=backward)
        if cut is None:
            raise ValueError(f"{geometry}: {refusal(geometry, every_core=False)}")
        self.cut = cut
        self.kernel = HaloKernel(geometry, self.cut)

    def map_like(self, qkv, parts):
        """(block spec, shape) of a map of one part, or of three in turn."""
        cut, geometry = self.cut, self.geometry
        width, channels = cut.groups * cut.lanes, geometry.heads * geometry.dim
        turns = cut.is_split and parts > 1

        def index(half, channel, image, strip, part):
            lanes = part * cut.programs[1] + channel if turns else channel
            return half * cut.programs[2] + image, 0, 0, lanes

        lanes = width if turns else parts * width
        spec = pl.BlockSpec((1, geometry.height, geometry.width, lanes), index)
        return spec, jax.ShapeDtypeStruct((*qkv.shape[:3], parts * channels), qkv.dtype)

    def inputs(self, qkv, row_table, column_table):
        cut, geometry = self.cut, self.geometry
        packed = qkv.reshape(*qkv.shape[:3], -1)
        parts = 3 if cut.is_split else 1
        width = 3 // parts * cut.groups * cut.lanes

        def index(half, channel, image, *_, part):
            return half * cut.programs[2] + image, 0, 0, part * cut.programs[1] + channel

        shape = (1, geometry.height, geometry.width, width)
        inputs = [
            (pl.BlockSpec(shape, functools.partial(index, part=part)), packed)
            for part in range(parts)
        ]
        spec = pl.BlockSpec((self.kernel.pairs, cut.lanes), lambda *_: (0, 0))
        return inputs + [(spec, self.pack_table(table)) for table in (row_table, column_table)]

    def strips(self):
        kernel, cut, geometry = self.kernel, self.cut, self.geometry
        return [
            pltpu.VMEM((slabs, lines, length, cut.lanes), jnp.float32)
            for slabs, lines, length in (
                (cut.groups, geometry.block, kernel.query_length),
                (2 * cut.groups, geometry.window, kernel.key_length),
            )
        ]

    def pack_table(self, table):
        """[2w - 1, d] → [(i, a), lanes]: row a - i + w - 1, once for each head of a group."""
        geometry, kernel = self.geometry, self.kernel
        a = np.arange(geometry.window)[None, :] - np.arange(geometry.block)[:, None]
        rows = table[a + geometry.window - 1]  # [b, w, d]
        rows = jnp.pad(rows, ((0, 0), (0, kernel.key_stride - geometry.window), (0, 0)))
        return jnp.tile(rows.reshape(kernel.pairs, geometry.dim), (1, self.cut.heads))
