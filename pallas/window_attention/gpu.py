"""Attention in windows on NVIDIA Hopper (sm_90a): Pallas kernels for Mosaic GPU.

The operation is bound by memory, so each kernel reads the packed NHWC map once and writes an NHWC
map once; partition, shift and reverse are addresses of the tensor memory accelerator (TMA).

* One CTA is one warpgroup. It serves one head and walks windows; the loads of the next windows run
  while it computes, and several CTAs share an SM.
* Windows of a shifted map are not rolled together. The grid of windows begins above and left of the
  map instead: tokens beyond the border are masked, the TMA reads them as zeros and does not write
  them. This is the same function, because the two sides of a wrapped window do not see each other.
* A window lies in shared memory row by row. TMA moves multiples of 128 bytes and WGMMA multiplies
  64 tokens at a time, so rows are padded where that makes the sizes fit: the extra tokens belong to
  the neighbour on the right (read again, from the L2 cache) and are masked.
* Windows of more than 64 tokens are cut into tiles of whole rows. A CTA serves one tile: as queries
  in the forward pass and for dQ, as keys for dK, dV and the gradient of the bias.
* The gradient of the bias stays in registers while a CTA walks its windows. Each CTA writes one
  partial sum, XLA adds them: no atomics, the same bits in every run.
"""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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
    foreign,
    launch,
    opaque,
    operands,
    round_up,
    shares,
    softmax,
    split_refs,
    store_query,
    with_parts,
)
from pallas.window_attention.geometry import Windows


def refusal(geometry: Windows) -> str | None:
    """Why these kernels cannot serve the shape, in one sentence; None if they can."""
    if geometry.dtype != "bfloat16":
        return f"the GPU kernels compute from bfloat16, not {geometry.dtype}"
    if geometry.dim != 32:
        return f"the GPU kernels serve 32 channels per head, not {geometry.dim}"
    if geometry.has_local and any(geometry.shift):
        return "the GPU kernels do not add a local convolution in shifted windows"
    tile = Tile.of(geometry.window)
    if tile.tokens > 256 or tile.pitch > 64:
        return (
            f"windows of {geometry.window} take {tile.tokens} tokens on the GPU, at most 256 fit "
            "the registers of one product"
        )
    return None


def _hidden(tile: Tile, geometry: Windows, token, place):
    """The term added to the scores of a key: 0 if it is in the window and on the map, or None."""
    row, column = lax.div(token, tile.pitch), lax.rem(token, tile.pitch)
    seen = []
    if tile.pitch > tile.columns:
        seen.append(column < tile.columns)
    if tile.tokens > tile.rows * tile.pitch:
        seen.append(row < tile.rows)
    _, top, left = place
    for shift, at, size in (
        (geometry.shift[0], top + row, geometry.height),
        (geometry.shift[1], left + column, geometry.width),
    ):
        if shift:
            seen += [at >= 0, at < size]
    return jnp.where(functools.reduce(jnp.logical_and, seen), 0.0, NEVER) if seen else None


def _weights(machine, geometry, query, key, bias, place):
    """exp2 of the scores less their maximum, by blocks [64, count]; the sums and maxima [64]."""
    tile, scores = machine.tile, []
    products = machine.products(
        *([(query, Transposed(machine.part(key, *block)))] for block in tile.blocks())
    )
    for block, product in zip(tile.blocks(), products, strict=True):
        product = product * (geometry.dim**-0.5 * LOG2E)
        if bias.given:
            product = product + bias(*block)
        if not bias.given or any(geometry.shift):
            token = machine.numbers(*block, reduced=0)
            hidden = _hidden(tile, geometry, token, place)
            product = product if hidden is None else product + along_columns(hidden, product)
        scores.append(product)
    return softmax(scores)


class _Bias:
    """The bias of a head and tile, in registers if a window is one tile, else in shared memory."""

    def __init__(self, machine, table, resident):
        self.machine, self.resident, self.given = machine, resident, table is not None
        if not self.given:
            return
        read = functools.partial(machine.read, optimized=False)
        if resident is None:
            self.values = read(table)
            return
        for first, count in machine.tile.blocks():
            columns = pl.ds(first, count)
            resident.at[0, :, columns][...] = read(table.at[:, columns])

    def __call__(self, first: int, count: int):
        if self.resident is None:
            return self.values
        return self.machine.read(self.resident.at[opaque(), :, pl.ds(first, count)])


class _Local:
    """The depthwise 3×3 convolution of the values, for the tokens of a tile.

    WGMMA's layout of a buffer cannot be read from any token on; a plain copy can. It is surrounded
    by zeros, and its rows are 80 bytes apart so that eight of them lie in different banks.
    """

    def __init__(self, machine, geometry, taps, scratch, head):
        self.machine, self.given = machine, taps is not None
        if not self.given:
            return
        self.plain, self.taps, ready = scratch
        plgpu.copy_gmem_to_smem(taps.at[head], self.taps, ready)
        self.plain[...] = jnp.zeros(self.plain.shape, jnp.bfloat16)
        plgpu.barrier_wait(ready)

    @staticmethod
    def scratch(machine, geometry):
        if not geometry.has_local:
            return None
        rows = round_up(64 * machine.tile.count + 2 * _Local._margin(machine.tile), 64)
        return (
            plgpu.SMEM((rows, machine.dim + 8), jnp.bfloat16),
            plgpu.SMEM((9, machine.dim), jnp.float32),
            plgpu.Barrier(),
        )

    @staticmethod
    def _margin(tile):
        return round_up(tile.pitch + 1, 8)

    def __call__(self, buffer, index, *, transposed=False):
        """The convolution of a buffer with a window, or its transpose, [64, d]; 0 if not given."""
        if not self.given:
            return 0.0
        machine, tile = self.machine, self.machine.tile
        margin, channels = self._margin(tile), pl.ds(0, machine.dim)
        for first in tile.whole_blocks():
            values = machine.matrix(machine.part(buffer, first, 64))[...]
            self.plain.at[pl.ds(margin + first, 64), channels][...] = values
        column = lax.rem(machine.numbers(0, 64, reduced=1), tile.pitch)
        total = 0.0
        for right in range(-1, 2) if tile.columns > 1 else (0,):
            sums = []
            for down in range(-1, 2):
                tap = 4 + (-1 if transposed else 1) * (3 * down + right)
                start = margin + index * 64 + down * tile.pitch + right
                place = self.plain.at[pl.ds(start, 64), channels]
                values = machine.read(place, optimized=False).astype(jnp.float32)
                sums.append(values * along_columns(machine.read_row(self.taps.at[tap]), values))
            seen = (column + right >= 0) & (column + right < tile.columns)
            factor = jnp.where(seen, 1.0, 0.0)
            total = total + functools.reduce(operator.add, sums) * along_rows(factor, sums[0])
        return total


def _taps(local_kernel):
    """[3, 3, h, d] to float32 [h, 9, d], for each head in one piece."""
    if local_kernel is None:
        return []
    heads, dim = local_kernel.shape[2:]
    return [local_kernel.astype(jnp.float32).reshape(9, heads, dim).swapaxes(0, 1)]


def _local_gradient(geometry, value, dout):
    """[3, 3, h, d] in float32, from maps [B, H, W, h, d]; by XLA."""
    (a, b), heads = geometry.window, (geometry.heads, geometry.dim)
    shape = (len(value), geometry.height // a, a, geometry.width // b, b, *heads)
    value, dout = (x.reshape(shape).astype(jnp.float32) for x in (value, dout))

    def overlap(size, offset):
        return slice(max(0, -offset), size - max(0, offset)), slice(
            max(0, offset), size + min(0, offset)
        )

    taps = []
    for down, right in itertools.product(range(-1, 2), repeat=2):
        (to_row, row), (to_column, column) = overlap(a, down), overlap(b, right)
        products = dout[:, :, to_row, :, to_column] * value[:, :, row, :, column]
        taps.append(products.sum((0, 1, 2, 3, 4)))
    return jnp.stack(taps).reshape(3, 3, *heads)


def _bias_of(machine, tables, head, tile, resident=None):
    return _Bias(machine, tables[0].at[head, pl.ds(tile * 64, 64)] if tables else None, resident)


def forward(geometry: Windows, qkv, bias=None, query=None, local_kernel=None, *, interpret=False):
    """Attention in windows; the arguments and the result of `window_attention`.

    `interpret`: False to compile, or the parameters of the interpreter of Mosaic GPU.
    """
    machine = Machine.of(geometry.window, geometry.dim, bool(interpret))
    shape, several = machine.tile, machine.tile.count > 1
    walk = Walk(len(qkv), geometry, per_multiprocessor=2 if several and bias is not None else 4)
    stages = 1 if several else 3
    maps = operands(machine, qkv, query)
    tables = [] if bias is None else [shape.spread(bias, NEVER)]
    taps = _taps(local_kernel)
    out = jax.ShapeDtypeStruct((*maps[0].shape[:3], geometry.heads * geometry.dim), qkv.dtype)

    def kernel(*refs):
        maps, tables, taps, (target, *scratch) = split_refs(refs, *counts, None)
        resident, local, staging, loads = scratch
        (head, tile, _), (first, last) = walk.here()
        bias = _bias_of(machine, tables, head, tile, resident)
        local = _Local(machine, geometry, taps[0] if taps else None, local, head)
        loads = Loads(machine, walk, maps, head, tile, loads, "tww")
        loads.start_first(first, last)

        def step(index, carry):
            slot, place = lax.rem(index - first, stages), walk.place(index)
            more = functools.partial(pl.when, index + stages < last)
            query, key = loads.wait(0, 1, slot=slot)
            weights, sums, _ = _weights(machine, geometry, query, key, bias, place)
            more()(lambda: loads.restart(0, 1, index=index + stages, slot=slot))
            (value,) = loads.wait(2, slot=slot)
            (result,) = machine.products(with_parts(machine, weights, value))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            machine.write(staging, result * along_rows(1 / sums, result) + local(value, tile))
            plgpu.commit_smem()
            machine.store(staging, target, place, head * geometry.dim, tile)
            more()(lambda: loads.start(2, index + stages, slot))
            return carry

        lax.fori_loop(first, last, step, ())
        plgpu.wait_smem_to_gmem(0)

    counts = len(maps), len(tables), len(taps)
    scratch = [
        machine.table(64, shape.tokens) if several and tables else None,
        _Local.scratch(machine, geometry),
        machine.buffer(rows=64),
        Loads.scratch(machine, stages, "tww"),
    ]
    out = launch(kernel, walk, out, scratch, interpret)(*maps, *tables, *taps)
    return machine.narrow(out).reshape(*qkv.shape[:3], geometry.heads, geometry.dim)


def backward(geometry: Windows, qkv, bias, query, local_kernel, dout, *, interpret=False):
    """Gradients of (qkv, bias, query, local_kernel) for dout [B, H, W, h, d]; None where None.

    With P the softmax and S the scores: dV = PᵀdO, dP = dO Vᵀ, dS = P (dP - sum(P dP)),
    dQ = dS K and dK = dSᵀQ, both times d^-0.5.
    """
    machine = Machine.of(geometry.window, geometry.dim, bool(interpret))
    maps = operands(machine, qkv, query, dout)
    run = _backward_of_one_tile if machine.tile.count == 1 else _backward_of_tiles
    dqkv, dquery, dbias = run(machine, geometry, maps, bias, _taps(local_kernel), interpret)
    if bias is not None:
        dbias = machine.tile.gather(dbias)
        dbias = dbias if machine.tile.count == 1 else dbias.swapaxes(1, 2)
    if query is not None:
        dquery = machine.narrow(dquery).reshape(query.shape)
    dlocal = None
    if local_kernel is not None:
        dlocal = _local_gradient(geometry, qkv[..., -1, :, :], dout).astype(local_kernel.dtype)
    return machine.narrow(dqkv).reshape(qkv.shape), dbias, dquery, dlocal


def _backward_of_one_tile(machine, geometry, maps, bias, taps, interpret):
    """dqkv and dquery as maps, and dbias [h, 64, 64].

    P and dS pass through shared memory, where WGMMA reads them transposed.
    """
    walk = Walk(len(maps[0]), geometry, per_multiprocessor=3 if bias is None else 2)
    stages, scale, shared = 2, geometry.dim**-0.5, geometry.shared_query
    tables = [] if bias is None else [machine.tile.spread(bias, NEVER)]
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in maps[:-1]]
    if tables:
        partial = (walk.walkers, geometry.heads, 64, 64)
        outs.append(jax.ShapeDtypeStruct(partial, jnp.float32))

    def kernel(*refs):
        maps, biases, taps, targets, scratch = split_refs(refs, *counts, len(outs), None)
        squares, local, staging, loads = scratch
        (head, tile, walker), (first, last) = walk.here()
        bias = _bias_of(machine, biases, head, tile)
        local = _Local(machine, geometry, taps[0] if taps else None, local, head)
        loads = Loads(machine, walk, maps, head, tile, loads, "tttt")
        loads.start_first(first, last)

        def step(index, carry):
            dbias, dquery = carry
            slot, place = lax.rem(index - first, stages), walk.place(index)
            query, key, value, dout = loads.wait(0, 1, 2, 3, slot=slot)
            (weights,), sums, _ = _weights(machine, geometry, query, key, bias, place)
            (dweights,) = machine.products([(dout, Transposed(value))])
            weights = weights * along_rows(shares(machine, sums, tile), weights)
            mean = (weights * dweights).sum(axis=1)
            dscores = weights * (dweights - along_rows(mean, dweights))
            machine.write(squares.at[0], weights)
            machine.write(squares.at[1], dscores)
            plgpu.commit_smem()
            dq, dk, dv = machine.products(
                [(dscores.astype(jnp.bfloat16), key)],
                [(Transposed(squares.at[1]), query)],
                [(Transposed(squares.at[0]), dout)],
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dv = dv + local(dout, tile, transposed=True)
            gradients = [dk * scale, dv] if shared else [dq * scale, dk * scale, dv]
            for part, gradient in enumerate(gradients):
                machine.write(staging.at[part], gradient)
            if shared:
                dquery = jnp.where(lax.rem(index, walk.per_image) == 0, 0.0, dquery) + dq
                machine.write(staging.at[2], dquery * scale)
            plgpu.commit_smem()
            for part in range(len(gradients)):
                channel = (part * geometry.heads + head) * geometry.dim
                machine.store(staging.at[part], targets[0], place, channel, tile)
            if shared:
                store_query(machine, walk, staging.at[2], targets[1], index, head, tile)
            pl.when(index + stages < last)(lambda: loads.start_all(index + stages, slot))
            return dbias + dscores if biases else (), dquery

        zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
        dbias = machine.registers(zeros((64, 64))) if biases else ()
        dquery = machine.registers(zeros((64, geometry.dim))) if shared else ()
        dbias, _ = lax.fori_loop(first, last, step, (dbias, dquery))
        if biases:
            targets[-1].at[walker, head][...] = dbias
        plgpu.wait_smem_to_gmem(0)

    counts = len(maps), len(tables), len(taps)
    scratch = [
        machine.buffer(2, rows=64, columns=64),
        _Local.scratch(machine, geometry),
        machine.buffer(3, rows=64),
        Loads.scratch(machine, stages, "tttt"),
    ]
    dqkv, *others = launch(kernel, walk, outs, scratch, interpret)(*maps, *tables, *taps)
    dbias = others.pop().sum(0) if tables else None
    return dqkv, others[0] if shared else None, dbias


def _backward_of_tiles(machine, geometry, maps, bias, taps, interpret):
    """dqkv and dquery as maps, and dbias [h, 64 · count, tokens], by two kernels.

    The first, for queries, leaves what the second, for keys, needs to know about each query: the
    logarithm of the sum of its weights and the mean of dP.
    """
    several = machine.tile.count * 64
    walk = Walk(len(maps[0]), geometry, per_multiprocessor=3 if bias is None else 2)
    facts = (2, walk.batch * walk.per_image, geometry.heads, several)
    dquery, facts = _backward_of_queries(machine, walk, maps, bias, facts, interpret)
    shared = geometry.shared_query
    dqkv, dbias = _backward_of_keys(
        machine, walk, maps, bias, taps, facts, None if shared else dquery, interpret
    )
    return dqkv, dquery if shared else None, dbias


def _backward_of_queries(machine, walk, maps, bias, facts, interpret):
    """dQ as a map, and the facts about each query [2, windows, h, 64 · count]."""
    geometry, shape, scale = walk.geometry, machine.tile, walk.geometry.dim**-0.5
    shared = geometry.shared_query
    tables = [] if bias is None else [shape.spread(bias, NEVER)]
    outs = [
        jax.ShapeDtypeStruct(maps[1 if shared else -1].shape, jnp.bfloat16),
        jax.ShapeDtypeStruct(facts, jnp.float32),
    ]
    counts = len(maps), len(tables), len(outs), None

    def kernel(*refs):
        maps, biases, targets, (resident, staging, loads) = split_refs(refs, *counts)
        (head, tile, _), (first, last) = walk.here()
        bias = _bias_of(machine, biases, head, tile, resident)
        loads = Loads(machine, walk, maps, head, tile, loads, "twwt")
        loads.start_first(first, last)

        def step(index, dquery):
            place = walk.place(index)
            more = functools.partial(pl.when, index + 1 < last)
            query, key = loads.wait(0, 1, slot=0)
            weights, sums, highest = _weights(machine, geometry, query, key, bias, place)
            more()(lambda: loads.restart(0, index=index + 1, slot=0))
            value, dout = loads.wait(2, 3, slot=0)
            share = shares(machine, sums, tile)
            weights = [block * along_rows(share, block) for block in weights]
            weights = lax.optimization_barrier([block.astype(jnp.bfloat16) for block in weights])
            (out,) = machine.products(with_parts(machine, weights, value))
            mean = (out * machine.matrix(dout)[...].astype(jnp.float32)).sum(axis=1)
            dscores = []
            for part, block in zip(shape.blocks(), weights, strict=True):
                (dblock,) = machine.products([(dout, Transposed(machine.part(value, *part)))])
                dblock = block.astype(jnp.float32) * (dblock - along_rows(mean, dblock))
                dscores.append(lax.optimization_barrier(dblock.astype(jnp.bfloat16)))
            more()(lambda: loads.restart(2, index=index + 1, slot=0))
            (dq,) = machine.products(with_parts(machine, dscores, key))
            if shared:
                dq = dquery = jnp.where(lax.rem(index, walk.per_image) == 0, 0.0, dquery) + dq
            known = highest + jnp.log(sums) * LOG2E
            hidden = foreign(machine, tile)
            known = known if hidden is None else jnp.where(hidden, -NEVER, known)
            for i, fact in enumerate((known, mean)):
                targets[1].at[i, index, head, pl.ds(tile * 64, 64)][...] = fact
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            machine.write(staging, dq * scale)
            plgpu.commit_smem()
            if shared:
                store_query(machine, walk, staging, targets[0], index, head, tile)
            else:
                machine.store(staging, targets[0], place, head * geometry.dim, tile)
            more()(lambda: loads.restart(1, 3, index=index + 1, slot=0))
            return dquery

        zeros = jnp.zeros((64, geometry.dim), jnp.float32)
        lax.fori_loop(first, last, step, machine.registers(zeros) if shared else ())
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        machine.table(64, shape.tokens) if tables else None,
        machine.buffer(rows=64),
        Loads.scratch(machine, 1, "twwt"),
    ]
    return launch(kernel, walk, outs, scratch, interpret)(*maps, *tables)


def _backward_of_keys(machine, walk, maps, bias, taps, facts, dquery, interpret):
    """dqkv as a map, with dquery copied into it if given, and dbias [h, 64 · count, tokens].

    Here scores are transposed: rows are the keys of a tile, columns all queries of the window.
    """
    geometry, shape, scale = walk.geometry, machine.tile, walk.geometry.dim**-0.5
    tables = [] if bias is None else [shape.spread(bias.swapaxes(1, 2), 0.0)]
    outs = [jax.ShapeDtypeStruct(maps[0].shape, jnp.bfloat16)]
    if tables:
        partial = (walk.walkers, geometry.heads, 64 * shape.count, shape.tokens)
        outs.append(jax.ShapeDtypeStruct(partial, jnp.float32))
    extents = "wttw" if dquery is None else "wttwt"
    maps = maps if dquery is None else [*maps, dquery]
    counts = len(maps), 1, len(tables), len(taps), len(outs), None
    operands = *maps, facts, *tables, *taps

    def kernel(*refs):
        maps, (facts,), biases, taps, targets, scratch = split_refs(refs, *counts)
        resident, local, staging, known, ready, loads = scratch
        (head, tile, walker), (first, last) = walk.here()
        bias = _bias_of(machine, biases, head, tile, resident)
        local = _Local(machine, geometry, taps[0] if taps else None, local, head)
        loads = Loads(machine, walk, maps, head, tile, loads, extents)

        def learn(index):
            for i in range(2):
                vector = facts.at[i, index, head, pl.ds(0, shape.tokens)]
                plgpu.copy_gmem_to_smem(vector, known.at[i], ready)

        loads.start_first(first, last)
        learn(first)

        def step(index, dbias):
            place = walk.place(index)
            plgpu.barrier_wait(ready)
            query, key, value, dout, *copied = loads.wait(*range(len(extents)), slot=0)
            token = machine.numbers(0, 64, reduced=1) + tile * (shape.lines * shape.pitch)
            hidden = _hidden(shape, geometry, token, place) if any(geometry.shift) else None
            dbiases, sums = [], [machine.registers(jnp.zeros((64, geometry.dim), jnp.float32))] * 2
            for i, (start, count) in enumerate(shape.blocks(32)):
                query_part, dout_part = (machine.part(x, start, count) for x in (query, dout))
                weights, dweights = machine.products(
                    [(key, Transposed(query_part))], [(value, Transposed(dout_part))]
                )
                highest, mean = (machine.read_row(known.at[i, pl.ds(start, count)]) for i in (0, 1))
                weights = weights * (scale * LOG2E) - along_columns(highest, weights)
                if bias.given:
                    weights = weights + bias(start, count)
                if hidden is not None:
                    weights = weights + along_rows(hidden, weights)
                weights = jnp.exp2(weights)
                dscores = weights * (dweights - along_columns(mean, dweights))
                sums = machine.add_products(
                    sums,
                    (dscores.astype(jnp.bfloat16), query_part),
                    (weights.astype(jnp.bfloat16), dout_part),
                )
                if bias.given:
                    dbiases.append(dbias[i] + dscores)
                sums, dbiases = lax.optimization_barrier((sums, dbiases))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            machine.write(staging.at[0], sums[0] * scale)
            machine.write(staging.at[1], sums[1] + local(dout, tile, transposed=True))
            plgpu.commit_smem()
            for part, source in enumerate([*copied, staging.at[0], staging.at[1]]):
                channel = (part * geometry.heads + head) * geometry.dim
                machine.store(source, targets[0], place, channel, tile)
            if copied:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(index + 1 < last)
            def _():
                loads.start_all(index + 1, 0)
                learn(index + 1)

            return tuple(dbiases)

        dbias = ()
        if biases:
            blocks = (jnp.zeros((64, count), jnp.float32) for _, count in shape.blocks(32))
            dbias = tuple(machine.registers(block) for block in blocks)
        dbias = lax.fori_loop(first, last, step, dbias)
        for (start, count), block in zip(shape.blocks(32), dbias, strict=bool(biases)):
            target = targets[1].at[walker, head, pl.ds(tile * 64, 64), pl.ds(start, count)]
            target[...] = block
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        machine.table(64, shape.tokens) if tables else None,
        _Local.scratch(machine, geometry),
        machine.buffer(2, rows=64),
        plgpu.SMEM((2, shape.tokens), jnp.float32),
        plgpu.Barrier(num_arrivals=2),
        Loads.scratch(machine, 1, extents),
    ]
    outs = launch(kernel, walk, outs, scratch, interpret)(*operands)
    return outs[0], outs[1].sum(0) if tables else None
