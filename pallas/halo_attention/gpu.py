"""Kernels for Hopper (Mosaic GPU) for halo attention; see `gpu.py` for CTAs, tiles and the TMA.

A CTA walks blocks of queries. Keys and values come with their halo as one larger window, of which
the TMA reads zeros beyond the map.

The scores of positions are products too, and so is the mask. For each query line i, Q Uᵢᵀ with 32
rows Uᵢ gives what its queries score with key lines (16) and, for the queries of column i, with key
columns (16). Of these each query keeps its own, the logits [64, 32]; lines and columns beyond the
map get a score that hides them. A matrix E of zeros and ones brings them to the keys, in two
halves, because bfloat16 alone would round them too coarsely.

Neighbourhoods overlap, and a CTA cannot add to what another one wrote without atomics. Each block
writes the gradients of all its keys and values, and XLA adds them up.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.halo_attention.geometry import Halo
from pallas.tiles.gpu import (
    LOG2E,
    NEVER,
    Loads,
    Machine,
    Tile,
    Transposed,
    Walk,
    along_columns,
    along_rows,
    launch,
    opaque,
    operands,
    shares,
    softmax,
    with_parts,
)
from pallas.window_attention.geometry import Windows

HALF = 16  # key lines, and key columns, that a row of logits has place for


def refusal(geometry: Halo) -> str | None:
    """Why these kernels cannot serve the shape, in one sentence; None if they can."""
    if geometry.dtype != "bfloat16":
        return f"the GPU kernels compute from bfloat16, not {geometry.dtype}"
    if geometry.dim != 32:
        return f"the GPU kernels serve 32 channels per head, not {geometry.dim}"
    if Tile.of((geometry.block, geometry.block)).count > 1 or geometry.window > HALF:
        return (
            f"blocks of {geometry.block} with a halo of {geometry.halo} see {geometry.window} "
            f"lines of keys, the GPU kernels serve blocks of at most 8 and {HALF} lines"
        )
    return None


def _setup(geometry: Halo, batch: int, interpret):
    """The machine for blocks, with that for neighbourhoods in it, and who walks what."""
    near = Machine.of((geometry.window,) * 2, geometry.dim, bool(interpret))
    tile = Tile.of((geometry.block, geometry.block))
    machine = Machine(tile, geometry.dim, near.interpret, near.margin, around=near)
    blocks = Windows(
        geometry.height, geometry.width, geometry.heads, geometry.dim, (tile.rows,) * 2, "bfloat16"
    )
    return machine, Walk(batch, blocks, per_multiprocessor=2, halo=geometry.halo)


def _lines(geometry: Halo) -> int:
    """Lines of queries in the tables, enough for a product."""
    return max(2, geometry.block)


def _pack(geometry: Halo, row_table, column_table):
    """[lines, 32, d]: for each query line, and column, the vectors of its key lines and columns."""
    span, lines = geometry.window, _lines(geometry)
    offset = np.arange(span) - np.arange(geometry.block)[:, None] + span - 1
    chosen = np.zeros((lines, HALF, 2 * span - 1), np.float32)  # a product: its transpose is one
    chosen[: geometry.block, :span] = np.eye(2 * span - 1)[offset]
    tables = [
        jnp.einsum("iar,rd->iad", chosen, table, precision="highest")
        for table in (row_table, column_table)
    ]
    return jnp.concatenate(tables, axis=1)


class _Positions:
    """The logits of positions, between a query and 16 key lines and 16 key columns."""

    def __init__(self, machine, walk, table, scratch):
        self.machine, self.walk = machine, walk
        self._table, self._spread = scratch
        self.lines = table.shape[0] // (2 * HALF)
        for first in range(0, table.shape[0], 64):
            first = min(first, table.shape[0] - 64)
            values = machine.read(table.at[pl.ds(first, 64)], optimized=False)
            machine.write(machine.part(self.table, first, 64), values)
        key = machine.numbers(0, 2 * HALF, reduced=0)
        for first in machine.around.tile.whole_blocks():
            # Tokens of padding beyond line 15 take its place, which is then hidden.
            own = self._own(machine.around.tile, machine.numbers(first, 64, reduced=1))
            ones = jnp.where(own == along_columns(lax.rem(key, HALF), own), 1.0, 0.0)
            machine.write(machine.part(self.spread, first, 64), ones)
        plgpu.commit_smem()

    @staticmethod
    def scratch(machine, geometry):
        rows = 2 * HALF * _lines(geometry), machine.around.tile.tokens
        return tuple(machine.buffer(1, rows=count) for count in rows)

    def _own(self, tile, token):
        """[64, 32]: the line of a token in the first half of columns, its column in the other."""
        line = jnp.minimum(lax.div(token, tile.pitch), HALF - 1)
        column = lax.rem(token, tile.pitch)
        like = jax.ShapeDtypeStruct((64, 2 * HALF), jnp.int32)
        half = along_columns(lax.div(self.machine.numbers(0, 2 * HALF, reduced=0), HALF), like)
        line, column = along_rows(line, like), along_rows(column, like)
        return line + half * (column - line)

    # The compiler would keep the addresses of what lies at an index that it knows.
    @property
    def table(self):
        return self._table.at[opaque()]

    @property
    def spread(self):
        return self._spread.at[opaque()]

    def of_line(self, i: int):
        """The table of query line i, as a buffer [32, d]."""
        return self.machine.part(self.table, 2 * HALF * i, 2 * HALF)

    def keep(self, logits, i: int):
        """Those of a query line in the first half, of a query column in the other."""
        own = self._own(self.machine.tile, self.machine.numbers(0, 64, reduced=1))
        return jnp.where(own == i, logits, 0.0)

    def logits(self, query, place):
        """[64, 32] in two halves of bfloat16, times d^0.5; NEVER where there is no key."""
        logits = self.machine.registers(jnp.zeros((64, 2 * HALF), jnp.float32))
        for i in range(self.lines):
            (of_all,) = self.machine.products([(query, Transposed(self.of_line(i)))])
            logits = logits + self.keep(of_all, i)
        logits = logits * self.machine.dim**0.5 + along_columns(self._hidden(place), logits)
        high = logits.astype(jnp.bfloat16)
        return high, (logits - high.astype(jnp.float32)).astype(jnp.bfloat16)

    def _hidden(self, place):
        """[32]: what is added for key lines and columns that do not exist."""
        geometry, halo, span = self.walk.geometry, self.walk.halo, self.machine.around.tile.rows
        key = self.machine.numbers(0, 2 * HALF, reduced=0)
        half, key = lax.div(key, HALF), lax.rem(key, HALF)
        _, top, left = place
        at = key + (top - halo) + half * (left - top)
        size = geometry.height + half * (geometry.width - geometry.height)
        return jnp.where((key < span) & (at >= 0) & (at < size), 0.0, NEVER)

    def scores(self, query, key, place):
        """Blocks [64, count] of the scores of all keys, in units of log2."""
        machine, near = self.machine, self.machine.around
        high, low = self.logits(query, place)

        def pairs(block):
            keys, spread = (Transposed(near.part(x, *block)) for x in (key, self.spread))
            return (query, keys), (high, spread), (low, spread)

        products = machine.products(*map(pairs, near.tile.blocks()))
        return [product * (machine.dim**-0.5 * LOG2E) for product in products]


def forward(geometry: Halo, qkv, row_table, column_table, *, interpret=False):
    """Halo attention; the arguments and the result of `halo_attention`.

    `interpret`: False to compile, or the parameters of the interpreter of Mosaic GPU.
    """
    machine, walk = _setup(geometry, len(qkv), interpret)
    maps = operands(machine, qkv)
    table = _pack(geometry, row_table, column_table).reshape(-1, geometry.dim)
    out = jax.ShapeDtypeStruct((*maps[0].shape[:3], geometry.heads * geometry.dim), qkv.dtype)

    def kernel(qkv, table, target, positions, staging, loads):
        (head, tile, _), (first, last) = walk.here()
        positions = _Positions(machine, walk, table, positions)
        loads = Loads(machine, walk, [qkv], head, tile, loads, "tnn")
        loads.start_first(first, last)

        def step(index, carry):
            place, more = walk.place(index), functools.partial(pl.when, index + 1 < last)
            query, key = loads.wait(0, 1, slot=0)
            weights, sums, _ = softmax(positions.scores(query, key, place))
            more()(lambda: loads.restart(0, 1, index=index + 1, slot=0))
            (value,) = loads.wait(2, slot=0)
            (result,) = machine.products(with_parts(machine.around, weights, value))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            machine.write(staging, result * along_rows(1 / sums, result))
            plgpu.commit_smem()
            machine.store(staging, target, place, head * geometry.dim, tile)
            more()(lambda: loads.start(2, index + 1, 0))
            return carry

        lax.fori_loop(first, last, step, ())
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        _Positions.scratch(machine, geometry),
        machine.buffer(rows=64),
        Loads.scratch(machine, 1, "tnn"),
    ]
    out = launch(kernel, walk, out, scratch, interpret)(*maps, table)
    return machine.narrow(out).reshape(*qkv.shape[:3], geometry.heads, geometry.dim)


def backward(geometry: Halo, qkv, row_table, column_table, dout, *, interpret=False):
    """Gradients of (qkv, row_table, column_table) for dout [B, H, W, h, d]; see `gpu.backward`."""
    machine, walk = _setup(geometry, len(qkv), interpret)
    maps = operands(machine, qkv, dout)
    packed = _pack(geometry, row_table, column_table)
    near, channels, scale = machine.around, geometry.heads * geometry.dim, geometry.dim**-0.5
    pairs = -(-len(packed) // 2)  # of query lines: WGMMA makes 64 rows at a time
    blocks = len(qkv) * walk.per_image
    padded = tuple(geometry.window + 2 * size for size in near.margin)
    outs = [
        jax.ShapeDtypeStruct(maps[1].shape, jnp.bfloat16),
        jax.ShapeDtypeStruct((blocks, *padded, 2 * channels), jnp.bfloat16),
        jax.ShapeDtypeStruct((walk.walkers, geometry.heads, pairs, 64, machine.dim), jnp.float32),
    ]

    def kernel(qkv, dout, table, dquery, dnear, dtable, positions, squares, staging, loads):
        (head, tile, walker), (first, last) = walk.here()
        positions = _Positions(machine, walk, table, positions)
        loads = Loads(machine, walk, [qkv, dout], head, tile, loads, "tnnt")
        loads.start_first(first, last)

        def store_near(index, part, grads):
            """Starts writing the gradients of a block's keys (part 0) or values (1)."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, rows in enumerate(grads):
                machine.write(staging.at[opaque(i)], rows)
            plgpu.commit_smem()
            for i in range(len(grads)):
                channel = (part * geometry.heads + head) * geometry.dim
                near.store(staging.at[opaque(i)], dnear, (index, 0, 0), channel, i)

        def write_square(i, first, values):
            square = squares.at[opaque(i)]
            machine.write(machine.columns(square, first, values.shape[1]), values)

        def with_squares(count, factor):
            """The pairs of the first squares, transposed, and a factor."""
            plgpu.commit_smem()
            return [(Transposed(squares.at[opaque(i)]), factor) for i in range(count)]

        def transposed(blocks, factor):
            """blocksᵀ · factor, for 64 keys at a time."""
            for i, block in enumerate(blocks):
                write_square(i, 0, block)
            return machine.products(*([pair] for pair in with_squares(len(blocks), factor)))

        def step(index, dtables):
            place = walk.place(index)
            query, key, value, dout = loads.wait(0, 1, 2, 3, slot=0)
            weights, sums, _ = softmax(positions.scores(query, key, place))
            share = shares(machine, sums, tile)
            weights = [(block * along_rows(share, block)).astype(jnp.bfloat16) for block in weights]
            weights = lax.optimization_barrier(weights)
            store_near(index, 1, transposed(weights, dout))
            (out,) = machine.products(with_parts(near, weights, value))
            mean = (out * machine.matrix(dout)[...].astype(jnp.float32)).sum(axis=1)
            dscores = []
            for part, block in zip(near.tile.blocks(), weights, strict=True):
                (dblock,) = machine.products([(dout, Transposed(near.part(value, *part)))])
                dblock = block.astype(jnp.float32) * (dblock - along_rows(mean, dblock))
                dscores.append(lax.optimization_barrier(dblock.astype(jnp.bfloat16)))
            dkey = transposed(dscores, query)
            store_near(index, 0, [rows * scale for rows in dkey])
            dq, dlogits = machine.products(
                with_parts(near, dscores, key), with_parts(near, dscores, positions.spread)
            )
            kept = [positions.keep(dlogits, i).astype(jnp.bfloat16) for i in range(positions.lines)]
            (dq_of_positions,) = machine.products(
                [(part, positions.of_line(i)) for i, part in enumerate(kept)]
            )
            dq = dq * scale + dq_of_positions
            for i, part in enumerate(kept):
                write_square(i // 2, i % 2 * 2 * HALF, part)
            dtables = machine.add_products(dtables, *with_squares(pairs, query))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            machine.write(staging.at[0], dq)
            plgpu.commit_smem()
            machine.store(staging.at[0], dquery, place, head * geometry.dim, tile)
            pl.when(index + 1 < last)(lambda: loads.start_all(index + 1, 0))
            return tuple(dtables)

        zeros = jnp.zeros((64, machine.dim), jnp.float32)
        dtables = lax.fori_loop(first, last, step, (machine.registers(zeros),) * pairs)
        for i, rows in enumerate(dtables):
            dtable.at[walker, head, i][...] = rows
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        _Positions.scratch(machine, geometry),
        machine.buffer(4, rows=64, columns=64),
        machine.buffer(4, rows=64),
        Loads.scratch(machine, 1, "tnnt"),
    ]
    flat = packed.reshape(-1, geometry.dim)
    dquery, dnear, dtable = launch(kernel, walk, outs, scratch, interpret)(*maps, flat)
    dquery = machine.narrow(dquery).reshape(*qkv.shape[:3], 1, *qkv.shape[4:])
    dkey_value = _add_overlaps(geometry, near.narrow(dnear), len(qkv))
    dqkv = jnp.concatenate([dquery, dkey_value], axis=3)
    dtable = dtable.sum((0, 1)).reshape(-1, 2 * HALF, geometry.dim)[: len(packed)]
    unpack = jax.linear_transpose(functools.partial(_pack, geometry), row_table, column_table)
    return dqkv, *unpack(dtable)


def _add_overlaps(geometry: Halo, near, batch: int):
    """[blocks, w, w, 2·C], what each block gives to its neighbourhood, to [B, H, W, 2, h, d]."""
    block, halo, span = geometry.block, geometry.halo, geometry.window
    down, across = geometry.height // block, geometry.width // block
    near = near.reshape(batch, down, across, span, span, -1)
    reach = -(-halo // block)
    total: Any = 0.0
    for cells in itertools.product(range(-reach, reach + 1), repeat=2):
        # The part of a neighbourhood that lies on the block so many cells further.
        lines, gaps = zip(*(_overlap(geometry, cell) for cell in cells), strict=True)
        part = near[:, :, :, slice(*lines[0]), slice(*lines[1])].astype(jnp.float32)
        moved = [(cell, -cell, 0) for cell in cells]
        pads = [(0, 0, 0), *moved, *((*gap, 0) for gap in gaps), (0, 0, 0)]
        total += lax.pad(part, 0.0, pads)
    total = total.reshape(batch, down, across, block, block, 2, geometry.heads, geometry.dim)
    total = total.swapaxes(2, 3)
    return total.reshape(batch, geometry.height, geometry.width, *total.shape[5:]).astype(
        near.dtype
    )


def _overlap(geometry: Halo, cell: int):
    """Lines (first, end) of a neighbourhood on the block so many cells further, the gaps around."""
    start = geometry.halo + cell * geometry.block
    first, end = max(0, start), min(geometry.window, start + geometry.block)
    return (first, end), (first - start, start + geometry.block - end)
