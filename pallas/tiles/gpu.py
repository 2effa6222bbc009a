"""Windows of a map on a Hopper GPU: how they lie in shared memory, who walks them, how they move.

`window_attention/gpu.py` and `halo_attention/gpu.py` have the kernels made of these.
"""

import dataclasses
import functools
import inspect
import itertools
import math
import operator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

if TYPE_CHECKING:
    from pallas.window_attention.geometry import Windows

# JAX before 0.12 wants to be told which part of a reference to load.
_ALL = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
MULTIPROCESSORS = 132  # of an H100 and an H200
LOG2E = math.log2(math.e)
NEVER = -1e30  # added to scores that must not count


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the tokens of a window lie in shared memory: `rows` times `pitch`, then padding.

    Tiles of 64 tokens hold `lines` of the rows each; in the last one the rest belongs to the window
    below.
    """

    rows: int
    columns: int
    pitch: int
    lines: int

    @classmethod
    def of(cls, window: tuple[int, int]) -> "Tile":
        rows, columns = window
        if rows * columns <= 64 and rows * columns % 2 == 0:
            return cls(rows, columns, columns, rows)
        pitch = max(8, 1 << (columns - 1).bit_length())
        return cls(rows, columns, pitch, min(rows, max(1, 64 // pitch)))

    @property
    def count(self) -> int:
        """Tiles of a window."""
        return -(-self.rows // self.lines)

    @property
    def tokens(self) -> int:
        """Tokens of the whole window in shared memory, a multiple of what WGMMA contracts."""
        return 64 if self.count == 1 else round_up(self.rows * self.pitch, 32)

    def blocks(self, size: int = 64) -> list[tuple[int, int]]:
        """First token and number of tokens of what is multiplied at a time."""
        return [(first, min(size, self.tokens - first)) for first in range(0, self.tokens, size)]

    def whole_blocks(self) -> list[int]:
        """The first tokens of blocks of 64 that cover all, the last of which may overlap."""
        return [min(first, self.tokens - 64) for first in range(0, self.tokens, 64)]

    def spread(self, bias, padding: float):
        """[h, N, N] to [h, 64 · count, tokens] in units of log2; `padding` for padding keys."""
        rows, columns = self.rows, self.columns
        bias = (bias * LOG2E).reshape(-1, rows, columns, rows, columns)
        gap, keep = (0, self.pitch - columns), (0, 0)
        bias = jnp.pad(bias, (keep, keep, gap, keep, keep))
        bias = jnp.pad(bias, (keep, keep, keep, keep, gap), constant_values=padding)
        used = rows * self.pitch
        bias = bias.reshape(-1, used, used)
        bias = jnp.pad(bias, (keep, (0, 64 * self.count - used), keep))
        return jnp.pad(bias, (keep, keep, (0, self.tokens - used)), constant_values=padding)

    def gather(self, bias):
        """[h, 64 · count, tokens] to [h, N, N]."""
        used = self.rows * self.pitch
        bias = bias[:, :used, :used].reshape(-1, self.rows, self.pitch, self.rows, self.pitch)
        bias = bias[:, :, : self.columns, :, : self.columns]
        return bias.reshape(len(bias), self.rows * self.columns, self.rows * self.columns)


@dataclasses.dataclass(frozen=True)
class Walk:
    """Which windows a CTA walks: contiguous ones, and whole images if they share a query."""

    batch: int
    geometry: "Windows"
    per_multiprocessor: int
    halo: int = 0  # how many places the keys reach over a window on each side

    @property
    def tile(self) -> Tile:
        return Tile.of(self.geometry.window)

    @property
    def down(self) -> int:
        return self.geometry.height // self.geometry.window[0] + bool(self.geometry.shift[0])

    @property
    def across(self) -> int:
        return self.geometry.width // self.geometry.window[1] + bool(self.geometry.shift[1])

    @property
    def per_image(self) -> int:
        return self.down * self.across

    @property
    def unit(self) -> int:
        return self.per_image if self.geometry.shared_query else 1

    @property
    def units(self) -> int:
        return self.batch * self.per_image // self.unit

    @property
    def columns(self) -> int:
        """CTAs that walk the same windows: one for each tile of each head."""
        return self.geometry.heads * self.tile.count

    @property
    def walkers(self) -> int:
        """CTAs for each tile of each head."""
        wanted = MULTIPROCESSORS * self.per_multiprocessor // self.columns
        return max(1, min(self.units, wanted))

    def here(self):
        """(head, tile, walker) of this CTA, and its windows: the first and the one after the last.

        Neighbouring CTAs read the same windows at the same time, so that the L2 cache serves them.
        """
        block, count = lax.axis_index("block"), self.tile.count
        walker, column = lax.div(block, self.columns), lax.rem(block, self.columns)
        ends = (lax.div(w * self.units, self.walkers) * self.unit for w in (walker, walker + 1))
        return (lax.div(column, count), lax.rem(column, count), walker), tuple(ends)

    def place(self, index):
        """Image, top row and left column of a window; negative where it begins off the map."""
        image, index = lax.div(index, self.per_image), lax.rem(index, self.per_image)
        corner = []
        cells = (lax.div(index, self.across), lax.rem(index, self.across))
        for cell, span, shift in zip(cells, self.geometry.window, self.geometry.shift, strict=True):
            corner.append(cell * span + (shift - span if shift else 0))
        return image, *corner


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A buffer that takes part in a product transposed."""

    buffer: jax.Array


@dataclasses.dataclass(frozen=True)
class Machine:
    """The operations that the interpreter of Mosaic GPU lacks, in a form for it and one for Hopper.

    The interpreter knows neither accesses beyond an array, nor reshaped or transposed references:
    there maps come with a margin, windows are copied row by row, and products are taken by XLA.
    """

    tile: Tile
    dim: int
    interpret: bool
    margin: tuple[int, int]  # rows and columns around the map
    around: "Machine | None" = None  # for the neighbourhoods of halo attention

    @classmethod
    def of(cls, window: tuple[int, int], dim: int, interpret: bool) -> "Machine":
        tile = Tile.of(window)
        margin = (tile.rows + tile.lines, tile.pitch) if interpret else (0, 0)
        return cls(tile, dim, interpret, margin)

    def widen(self, x):
        (down, across), rest = self.margin, ((0, 0),) * (x.ndim - 3)
        return jnp.pad(x, ((0, 0), (down, down), (across, across), *rest)) if down else x

    def narrow(self, x):
        down, across = self.margin
        return x[:, down:-down, across:-across] if down else x

    def buffer(self, *leading: int, rows: int, columns: int | None = None):
        """Shared memory for [*leading, rows, columns] in the layout that WGMMA reads."""
        columns = columns or self.dim
        if self.interpret:
            return plgpu.SMEM((*leading, rows, columns), jnp.bfloat16)
        # The tiling is spelled out in the shape, so that a window can be seen in its two
        # dimensions by TMA and as a matrix by WGMMA.
        return plgpu.SMEM(
            (*leading, rows // 8, columns // self.dim, 8, self.dim),
            jnp.bfloat16,
            transforms=(plgpu.SwizzleTransform(2 * self.dim),),
        )

    def matrix(self, ref):
        """A buffer as a matrix [rows, columns]."""
        if self.interpret:
            return ref
        tiled = plgpu.TilingTransform((8, self.dim)).undo(None)  # type: ignore[arg-type]  # reads no type
        return dataclasses.replace(ref, transforms=(*ref.transforms, tiled))

    def table(self, rows: int, columns: int):
        """Shared memory for a float32 matrix."""
        tiling = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(
            (1, rows, columns), jnp.float32, transforms=() if self.interpret else tiling
        )

    def barrier(self, lines: int, stages: int):
        """One for each stage, for the copy of so many rows of a window."""
        return plgpu.Barrier(num_arrivals=lines if self.interpret else 1, num_barriers=stages)

    def load(self, source, place, channel, buffer, lines: int, barrier):
        """Starts copying rows of a window of source [B, H, W, C] into a buffer."""
        pitch, (image, row, column) = self.tile.pitch, place
        row, column = row + self.margin[0], column + self.margin[1]
        columns, channels = pl.ds(column, pitch), pl.ds(channel, self.dim)
        if not self.interpret:
            window = source.at[image, pl.ds(row, lines), columns, channels]
            buffer = self._tokens(buffer, 0, lines * pitch).reshape(lines, pitch, self.dim)
            plgpu.copy_gmem_to_smem(window, buffer, barrier)
            return

        @pl.loop(0, lines)
        def _(i):
            line = buffer.at[pl.ds(i * pitch, pitch)]
            plgpu.copy_gmem_to_smem(source.at[image, row + i, columns, channels], line, barrier)

    def store(self, buffer, target, place, channel, tile):
        """Starts copying a tile of a window into target [B, H, W, C], without the padding."""
        lines, pitch, columns = self.tile.lines, self.tile.pitch, self.tile.columns
        image, row, column = place
        row, column = row + self.margin[0] + tile * lines, column + self.margin[1]
        across, channels = pl.ds(column, columns), pl.ds(channel, self.dim)
        if not self.interpret and pitch == columns and self.tile.rows % lines == 0:
            window = target.at[image, pl.ds(row, lines), across, channels]
            buffer = self._tokens(buffer, 0, lines * pitch).reshape(lines, pitch, self.dim)
            plgpu.copy_smem_to_gmem(buffer, window)
            return

        def line(i):
            tokens = self._tokens(buffer, i * pitch, columns)
            plgpu.copy_smem_to_gmem(tokens, target.at[image, row + i, across, channels])

        always = self.tile.rows - (self.tile.count - 1) * lines  # rows of the last tile
        for i in range(lines):
            inside = i < always or tile * lines + i < self.tile.rows
            line(i) if inside is True else pl.when(inside)(functools.partial(line, i))

    def _tokens(self, buffer, first: int, count: int):
        if self.interpret:
            return buffer.at[pl.ds(first, count)]
        if first % 8 == 0 and count % 8 == 0:
            buffer = buffer.at[pl.ds(first // 8, count // 8)]
            return buffer.reshape(count, self.dim)
        rows = buffer.shape[0] * 8
        return buffer.reshape(rows, self.dim).at[pl.ds(first, count)]

    def products(self, *sums):
        """For each list of pairs (a, b) the float32 sum of a·b; b and perhaps a are buffers."""
        if self.interpret:
            return [sum(self._interpreted_product(*pair) for pair in pairs) for pairs in sums]
        sums = [[[self._operand(x) for x in pair] for pair in pairs] for pairs in sums]

        def multiply(*totals):
            for total, pairs in zip(totals, sums, strict=True):
                for a, b in pairs:
                    plgpu.wgmma(total, a, b)
            return [total[...] for total in totals]

        shapes = ((a.shape[0], b.shape[1]) for ((a, b), *_) in sums)
        return pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def add_products(self, totals, *pairs):
        """total + a·b for each total and pair."""
        if self.interpret:
            sums = zip(totals, pairs, strict=True)
            return [total + self._interpreted_product(*pair) for total, pair in sums]
        pairs = [[self._operand(x) for x in pair] for pair in pairs]

        def multiply(refs):
            for ref, (a, b) in zip(refs, pairs, strict=True):
                plgpu.wgmma(ref, a, b)

        return pl.run_state(multiply)(tuple(plgpu.ACC.init(total) for total in totals))

    def _operand(self, x):
        if isinstance(x, Transposed):
            return self.matrix(x.buffer).transpose((1, 0))
        return x if isinstance(x, jax.Array) else self.matrix(x)

    def _interpreted_product(self, a, b):
        swapped = [int(isinstance(x, Transposed)) for x in (a, b)]
        a, b = (x.buffer if isinstance(x, Transposed) else x for x in (a, b))
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
        numbers = (((1 - swapped[0],), (swapped[1],)), ((), ()))
        return lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)

    def part(self, buffer, first: int, count: int):
        """So many tokens of a buffer, as a buffer."""
        if self.interpret:
            return buffer.at[pl.ds(first, count)]
        return buffer.at[pl.ds(first // 8, count // 8)]

    def columns(self, buffer, first: int, count: int):
        """So many columns of a buffer, as a buffer."""
        if self.interpret:
            return buffer.at[:, pl.ds(first, count)]
        return buffer.at[:, pl.ds(first // self.dim, count // self.dim)]

    def write(self, buffer, values):
        self.matrix(buffer)[...] = values.astype(jnp.bfloat16)

    def registers(self, x):
        """Gives an array the layout of the results of WGMMA."""
        return x if self.interpret else plgpu.layout_cast(x, plgpu.Layout.WGMMA)

    def read(self, ref, **options):
        """A matrix of float32."""
        if self.interpret:
            return ref[...]
        return plgpu.load(ref, *_ALL, layout=plgpu.Layout.WGMMA, **options)

    def read_row(self, ref):
        """A vector that runs along the columns of a matrix."""
        if self.interpret:
            return ref[...]
        return plgpu.load(ref, *_ALL, layout=plgpu.Layout.WGMMA.reduce(0))

    def numbers(self, first: int, count: int, *, reduced: int):
        """first, first + 1, ...: along the rows of a matrix (`reduced` 1) or its columns (0)."""
        if self.interpret:
            return first + lax.iota(jnp.int32, count)
        layout = plgpu.Layout.WGMMA.reduce(reduced)
        return first + plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)


class Loads:
    """Query, key, value and dout of one head in shared memory, in `stages` copies each.

    `extents` tells of each whether a CTA needs a tile of the window, "t", the whole, "w", or the
    neighbourhood, "n".
    """

    @staticmethod
    def scratch(machine, stages: int, extents: str):
        sizes = [_extent(machine, extent) for extent in extents]
        buffers = [machine.buffer(stages, rows=rows) for _, rows, _ in sizes]
        return buffers, [machine.barrier(lines, stages) for _, _, lines in sizes]

    def __init__(self, machine, walk, maps, head, tile, scratch, extents: str):
        self.machine, self.walk, self.maps, self.extents = machine, walk, maps, extents
        self.head, self.tile = head, tile
        self.buffers, self.ready = scratch
        for buffer, extent in zip(self.buffers, extents, strict=True):
            _clear(buffer, *_extent(machine, extent))

    def start(self, part: int, index, slot):
        """Starts the copy of one of them for a window."""
        heads, place, extent = self.walk.geometry.heads, self.walk.place(index), self.extents[part]
        qkv, *others = self.maps
        sources = [(qkv, place, part * heads) for part in range(3)]
        if self.walk.geometry.shared_query:
            query, *others = others
            # JAX refuses a slice that it sees to reach beyond the array, as the padding does.
            corner = (place[0], opaque(), opaque())
            sources = [(query, corner, 0), *sources[:2]]
        sources += [(other, place, 0) for other in others]
        source, (image, row, column), channel = sources[part]
        machine, _, lines = _extent(self.machine, extent)
        if extent == "t":
            row += self.tile * lines
        elif extent == "n":
            row, column = row - self.walk.halo, column - self.walk.halo
        channel = (channel + self.head) * machine.dim
        buffer, barrier = self.buffers[part].at[slot], self.ready[part].at[slot]
        machine.load(source, (image, row, column), channel, buffer, lines, barrier)

    def restart(self, *parts: int, index, slot):
        """Starts copies into buffers that only products have read since the last commit_smem."""
        if self.machine.interpret:  # where they were read not by WGMMA, but as registers are loaded
            plgpu.commit_smem()
        for part in parts:
            self.start(part, index, slot)

    def start_all(self, index, slot):
        for part in range(len(self.buffers)):
            self.start(part, index, slot)

    def start_first(self, first, last):
        """Fills all stages."""
        for stage in range(self.buffers[0].shape[0]):
            pl.when(first + stage < last)(functools.partial(self.start_all, first + stage, stage))

    def wait(self, *parts: int, slot):
        """Waits for some of them and gives their buffers."""
        for part in parts:
            plgpu.barrier_wait(self.ready[part].at[slot])
        if self.buffers[0].shape[0] == 1:
            slot = opaque()
        return [self.buffers[part].at[slot] for part in parts]


def _extent(machine, extent: str):
    """(the machine that loads it, rows of its buffer, lines of tokens)"""
    if extent == "t":
        return machine, 64, machine.tile.lines
    machine = machine.around if extent == "n" else machine
    return machine, machine.tile.tokens, machine.tile.rows


def _clear(buffer, machine, rows: int, lines: int):
    """Zeros where no window will be written: products with them must be finite."""
    if lines * machine.tile.pitch == rows:
        return
    zeros = machine.registers(jnp.zeros((64, machine.dim), jnp.bfloat16))
    firsts = machine.tile.whole_blocks() if rows > 64 else [0]
    for stage, first in itertools.product(range(buffer.shape[0]), firsts):
        machine.write(machine.part(buffer.at[stage], first, 64), zeros)
    plgpu.commit_smem()


def store_query(machine, walk, staging, target, index, head, tile):
    """Writes the gradient of the shared query after the last window of an image."""

    @pl.when(lax.rem(index, walk.per_image) == walk.per_image - 1)
    def _():
        corner = (walk.place(index)[0], 0, 0)
        machine.store(staging, target, corner, head * machine.dim, tile)


def with_parts(machine, blocks, buffer):
    """The pairs of blocks and what they multiply."""
    return [
        (block.astype(jnp.bfloat16), machine.part(buffer, *place))
        for block, place in zip(blocks, machine.tile.blocks(), strict=True)
    ]


def operands(machine, *maps):
    """Maps as the kernels take them, with the channels of all heads side by side."""
    return [machine.widen(x.reshape(*x.shape[:3], -1)) for x in maps if x is not None]


def split_refs(refs, *counts: int | None):
    """Lists of so many references; None: all the rest."""
    refs = iter(refs)
    return [list(itertools.islice(refs, count)) for count in counts]


def launch(kernel, walk, out, scratch, interpret):
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(walk.walkers * walk.columns,),
        grid_names=("block",),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret or None,
    )


def along_rows(vector, like):
    return lax.broadcast_in_dim(vector, like.shape, (0,))


def along_columns(vector, like):
    return lax.broadcast_in_dim(vector, like.shape, (1,))


def softmax(scores):
    """exp2 of blocks [64, count] of scores, less their maximum; the sums and maxima [64]."""
    highest = functools.reduce(jnp.maximum, (block.max(axis=1) for block in scores))
    weights = [jnp.exp2(block - along_rows(highest, block)) for block in scores]
    sums = functools.reduce(operator.add, (block.sum(axis=1) for block in weights))
    return weights, sums, highest


def shares(machine, sums, index):
    """The factor of a query's weights: nothing if it belongs to another window."""
    hidden = foreign(machine, index)
    return 1 / sums if hidden is None else jnp.where(hidden, 0.0, 1 / sums)


def foreign(machine, index):
    """Whether a query of a tile belongs to another window, or None if that cannot be."""
    tile, token, reasons = machine.tile, machine.numbers(0, 64, reduced=1), []
    if tile.pitch > tile.columns:
        reasons.append(lax.rem(token, tile.pitch) >= tile.columns)
    if tile.count * tile.lines > tile.rows:
        reasons.append(lax.div(token, tile.pitch) + index * tile.lines >= tile.rows)
    return functools.reduce(jnp.logical_or, reasons) if reasons else None


def opaque(number: int = 0):
    """A number that the compiler does not know, to find a buffer by.

    It would compute all addresses before the loop over windows and keep them in registers.
    """
    return lax.optimization_barrier(jnp.int32(number))


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
