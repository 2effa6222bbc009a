"""TPU kernels (Mosaic) for attention in windows; `pallas/README.md` has the picture.

A program takes a few images, or some rows of windows of one, and one group of heads (see
`tiles/tpu.py`). It walks the windows. Of each it loads a tile of tokens in which every line of the
window begins at a multiple of 8, the hardware's sublanes: a 7×7 window is 7 lines of 8 tokens, the
last of which is padding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tiles.tpu import MASKED, Plan, Tiles, call
from pallas.tpu_core import BUDGETS, SUBLANES, round_up
from pallas.window_attention.geometry import Windows
from pallas.window_attention.tpu_plan import plan

# ----------------------------------------------------------------- what forward and backward share


class WindowKernel(Tiles[Windows]):
    """The kernels' arithmetic for `window_attention` besides that on tiles."""

    def __init__(self, geometry: Windows, cut: Plan):
        super().__init__(geometry, cut)
        a, b = geometry.window
        self.parts = 2 if geometry.shared_query else 3  # of the packed map
        # A strip, one row of windows, lies in float32 as [slabs, lines, places of a line, lanes],
        # one slab for each group of each part: only one register wide can tiles begin anywhere.
        self.strip = (geometry.width, a) if cut.tall else (a, geometry.width)
        self.scratch_length = round_up(self.strip[1] + cut.stride - cut.length, SUBLANES)
        self.columns = geometry.width // b

    # ------------------------------------------------------------------ between map and strip

    def rows(self, strip):
        """Places on the map of the rows of a strip."""
        a, shift = self.geometry.window[0], self.geometry.shift[0]
        height = self.geometry.height
        for row in range(a):
            place = strip * a + row + shift
            yield row, (lax.rem(place, height) if shift else place)

    def turn(self, move):
        """Calls move(row, how many) for the rows of a strip whose rows become columns."""
        rows = self.geometry.window[0]
        whole = rows // SUBLANES * SUBLANES

        def step(index, carry):
            move(pl.multiple_of(index * SUBLANES, SUBLANES), SUBLANES)
            return carry

        lax.fori_loop(0, whole // SUBLANES, step, 0)
        if rows > whole:
            move(whole, rows - whole)

    def read_strip(self, ref, image, strip, scratch, first_slab=0):
        """Rows of the map, in its dtype → float32 scratch."""
        length, slabs = self.strip[1], ref.shape[-1] // self.cut.lanes
        a, shift = self.geometry.window[0], self.geometry.shift[1]
        for slab in range(slabs):
            lanes, slab = self.lanes(slab), first_slab + slab
            if self.cut.tall:

                def read(row, rows, lanes=lanes, slab=slab):
                    x = ref[image, pl.ds(strip * a + row, rows), :, lanes].astype(jnp.float32)
                    scratch[slab, :, pl.ds(row, rows)] = jnp.swapaxes(x, 0, 1)

                self.turn(read)
                continue
            for row, place in self.rows(strip):
                x = ref[image, place, :, lanes].astype(jnp.float32)
                if shift:
                    x = jnp.concatenate([x[shift:], x[:shift]], axis=0)
                scratch[slab, row, :length] = x

    def write_strip(self, ref, image, strip, scratch, first_slab=0):
        """The inverse of `read_strip`."""
        length, slabs = self.strip[1], ref.shape[-1] // self.cut.lanes
        a, shift = self.geometry.window[0], self.geometry.shift[1]
        for slab in range(slabs):
            lanes, slab = self.lanes(slab), first_slab + slab
            if self.cut.tall:

                def write(row, rows, lanes=lanes, slab=slab):
                    x = jnp.swapaxes(scratch[slab, :, pl.ds(row, rows)], 0, 1)
                    ref[image, pl.ds(strip * a + row, rows), :, lanes] = x.astype(ref.dtype)

                self.turn(write)
                continue
            for row, place in self.rows(strip):
                x = scratch[slab, row, :length]
                if shift:
                    x = jnp.concatenate([x[length - shift :], x[: length - shift]], axis=0)
                ref[image, place, :, lanes] = x.astype(ref.dtype)

    def key_slabs(self, group):
        """Slabs of a group's keys and values in the scratch of a strip."""
        return tuple(part * self.cut.groups + group for part in (self.parts - 2, self.parts - 1))

    def clear_padding(self, scratch):
        """Padding takes part with weight 0, which only finite numbers survive."""
        start = self.strip[1] // SUBLANES * SUBLANES
        if start < self.scratch_length:
            slabs, lines, length, lanes = scratch.shape
            scratch[:, :, start:] = jnp.zeros((slabs, lines, length - start, lanes), scratch.dtype)

    def window(self, column, length):
        """Indices of one window, its lines `length` places long, in a slab."""
        if self.cut.tall:
            lines = self.cut.lines
            return pl.ds(column * lines, lines), pl.ds(0, length)
        return slice(None), pl.ds(column * self.cut.length, length)

    def load(self, scratch, slab, column):
        """Float32 tile [tokens, lanes] of one window."""
        tile = scratch[(slab, *self.window(column, self.cut.stride))]
        return tile.reshape(self.cut.tokens, tile.shape[-1])

    def store(self, scratch, slab, column, tile):
        """Writes a tile back, without its padding."""
        cut = self.cut
        tile = tile.reshape(cut.lines, cut.stride, tile.shape[-1])[:, : cut.length]
        scratch[(slab, *self.window(column, cut.length))] = tile

    # ------------------------------------------------------------------------------ inside a window

    def weights(self, queries, key, bias, strip, column):
        """Softmax before its division: (exp(scores - max), sum of it over keys), float32."""
        geometry = self.geometry
        scores = self.dot(queries, key, ((1,), (1,))) * geometry.dim**-0.5
        if bias is None:
            scores = jnp.where(self.is_token(scores.shape, 1), scores, MASKED)
        else:
            scores = scores + bias
        if any(geometry.shift):
            query_region = self.region((scores.shape[0], 1), 0, strip, column)
            key_region = self.region((1, scores.shape[1]), 1, strip, column)
            scores = jnp.where(query_region == key_region, scores, scores - 100.0)
        exponentials = jnp.exp(scores - scores.max(axis=1, keepdims=True))
        return exponentials, exponentials.sum(axis=1, keepdims=True)

    def region(self, shape, axis, strip, column):
        """The side of the map's borders that a token comes from, in the last windows."""
        (a, b), (down, right) = self.geometry.window, self.geometry.shift
        line, place = self.places(shape, axis)
        last_row = (strip == self.geometry.height // a - 1).astype(jnp.int32)
        last_column = (column == self.columns - 1).astype(jnp.int32)
        below = (line >= a - down).astype(jnp.int32) if down else 0
        beyond = (place >= b - right).astype(jnp.int32) if right else 0
        return 2 * last_row * below + last_column * beyond

    def neighbours(self, tile):
        """The tile moved so that every token meets its neighbours in the window, 0 beyond it.

        Yields (index of the tap, tile) for those of the 3×3 taps that any token has.
        """
        line, place = self.places((tile.shape[0], 1), 0)
        for tap in range(9):
            down, right = tap // 3 - 1, tap % 3 - 1
            if abs(down) >= self.cut.lines or abs(right) >= self.cut.length:
                continue
            inside = (line + down >= 0) & (line + down < self.cut.lines)
            inside &= (place + right >= 0) & (place + right < self.cut.length)
            offset = down * self.cut.stride + right
            moved = jnp.roll(tile, -offset, axis=0) if offset else tile
            yield tap, jnp.where(inside, moved, 0)

    def walk(self, body, first):
        """Calls body(image, strip of the block, strip of the map) for a program's rows of windows.

        `first` is the program's first row of windows.
        """

        def step(index, carry):
            image, strip = lax.div(index, self.cut.strips), lax.rem(index, self.cut.strips)
            body(image, strip, first + strip)
            return carry

        steps = self.cut.images * self.cut.strips
        lax.fori_loop(0, steps, step, 0, unroll=self.unroll(steps, self.columns * self.cut.groups))


class _Inputs:
    """The references that both kernels begin with; those that are not given are None."""

    bias: Any
    query: Any
    local: Any

    def __init__(self, kernel: WindowKernel, refs: list):
        """Takes its own from the front of `refs`."""
        geometry, self.kernel = kernel.geometry, kernel
        self.maps = [refs.pop(0) for _ in range(kernel.parts if kernel.cut.is_split else 1)]
        self.bias = refs.pop(0) if geometry.has_bias else None
        self.query = refs.pop(0) if geometry.shared_query else None
        self.local = refs.pop(0) if geometry.has_local else None

    def read_strip(self, image, strip, scratch):
        for part, ref in enumerate(self.maps):
            self.kernel.read_strip(ref, image, strip, scratch, part)

    def load(self, scratch, image, column, group):
        """Query, key and value of one window and group."""
        key, value = (
            self.kernel.load(scratch, slab, column) for slab in self.kernel.key_slabs(group)
        )
        if self.query is not None:
            return self.query[image, :, self.kernel.lanes(group)].astype(jnp.float32), key, value
        return self.kernel.load(scratch, group, column), key, value

    def bias_of(self, group, rows):
        return None if self.bias is None else self.bias[group, rows]


def _forward_kernel(*refs, kernel: WindowKernel):
    geometry, cut = kernel.geometry, kernel.cut
    refs = list(refs)
    inputs = _Inputs(kernel, refs)
    out_ref, strip_scratch = refs
    kernel.clear_padding(strip_scratch)

    def do_strip(image, strip, place):
        inputs.read_strip(image, strip, strip_scratch)

        def do_window(column, carry):
            for group in range(cut.groups):
                query, key, value = inputs.load(strip_scratch, image, column, group)
                out = jnp.zeros(value.shape, jnp.float32)
                for first, rows in kernel.stacks():
                    bias, queries = inputs.bias_of(group, rows), kernel.stack(query, first)
                    weights, total = kernel.weights(queries, key, bias, place, column)
                    out += kernel.unstack(kernel.dot(weights, value, ((1,), (0,))) / total, first)
                if geometry.has_local:
                    for tap, moved in kernel.neighbours(value):
                        out += moved * inputs.local[pl.ds(tap, 1), kernel.lanes(group)]
                # In place: no other window has these places.
                kernel.store(strip_scratch, group, column, out)
            return carry

        lax.fori_loop(
            0, kernel.columns, do_window, 0, unroll=kernel.unroll(kernel.columns, cut.groups)
        )
        kernel.write_strip(out_ref, image, strip, strip_scratch)

    kernel.walk(do_strip, pl.program_id(3) * cut.strips)


def _backward_kernel(*refs, kernel: WindowKernel):
    geometry, cut = kernel.geometry, kernel.cut
    refs = list(refs)
    inputs = _Inputs(kernel, refs)
    out_grad_ref, map_grad_ref = refs.pop(0), refs.pop(0)
    bias_grad_ref: Any = refs.pop(0) if geometry.has_bias else None
    query_grad_ref: Any = refs.pop(0) if geometry.shared_query else None
    local_grad_ref: Any = refs.pop(0) if geometry.has_local else None
    strip_scratch, out_grad_scratch, *held = refs
    scale = geometry.dim**-0.5

    def do_strip(image, strip, place):
        inputs.read_strip(image, strip, strip_scratch)
        kernel.read_strip(out_grad_ref, image, strip, out_grad_scratch)

        def do_window(column, carry):
            for group in range(cut.groups):
                lanes, (key_slab, value_slab) = kernel.lanes(group), kernel.key_slabs(group)
                query, key, value = inputs.load(strip_scratch, image, column, group)
                out_grad = kernel.load(out_grad_scratch, group, column)
                out_grad = jnp.where(kernel.is_token(out_grad.shape, 0), out_grad, 0)

                query_grad = key_grad = value_grad = jnp.zeros(key.shape, jnp.float32)
                for first, rows in kernel.stacks():
                    queries, out_grads = (kernel.stack(x, first) for x in (query, out_grad))
                    bias = inputs.bias_of(group, rows)
                    weights, total = kernel.weights(queries, key, bias, place, column)
                    weights = weights / total
                    score_grads = kernel.softmax_gradient(weights, out_grads, value)
                    if geometry.has_bias:
                        bias_grad_ref[0, group, rows] += score_grads
                    products = kernel.dot(score_grads, key, ((1,), (0,)))
                    query_grad += kernel.unstack(products, first) * scale
                    key_grad += kernel.dot(score_grads, queries, ((0,), (0,))) * scale
                    value_grad += kernel.dot(weights, out_grads, ((0,), (0,)))
                if geometry.has_local:
                    for tap, moved in kernel.neighbours(value):
                        product = (moved * out_grad).sum(axis=0, keepdims=True)
                        local_grad_ref[0, pl.ds(tap, 1), lanes] += product
                    for tap, moved in kernel.neighbours(out_grad):
                        value_grad += moved * inputs.local[pl.ds(8 - tap, 1), lanes]
                if geometry.shared_query:
                    query_grad_ref[image, :, lanes] += query_grad
                else:
                    # In place, as in the forward kernel.
                    kernel.store(strip_scratch, group, column, query_grad)
                kernel.store(strip_scratch, key_slab, column, key_grad)
                kernel.store(strip_scratch, value_slab, column, value_grad)
            return carry

        lax.fori_loop(
            0, kernel.columns, do_window, 0, unroll=kernel.unroll(kernel.columns, cut.groups)
        )
        kernel.write_strip(map_grad_ref, image, strip, strip_scratch)
        for part in range(1, len(inputs.maps)):
            kernel.write_strip(held[0].at[part - 1], image, strip, strip_scratch, part)

    image_program, strip_program, part = (pl.program_id(axis) for axis in (2, 3, 4))

    @pl.when(part == 0)
    def _():
        first_of_image = strip_program == 0
        first = first_of_image & (image_program == 0)
        for ref, start in (
            (bias_grad_ref, first),
            (local_grad_ref, first),
            (query_grad_ref, first_of_image),
        ):
            if ref is not None:

                @pl.when(start)
                def _(ref=ref):
                    ref[...] = jnp.zeros(ref.shape, ref.dtype)

        kernel.clear_padding(strip_scratch)
        kernel.clear_padding(out_grad_scratch)
        kernel.walk(do_strip, strip_program * cut.strips)

    if cut.is_split:
        # A block of the packed gradient holds one part: the others are held until their turn.
        @pl.when(part > 0)
        def _():
            map_grad_ref[...] = held[0][part - 1]


# ------------------------------------------------------------------------------ what is called


def refusal(geometry: Windows, *, every_core: bool) -> str | None:
    """Why the kernels cannot serve a shape; None if they can.

    `every_core`: on every TPU since v4, not only on those with more vector memory.
    """
    if geometry.window[0] > geometry.window[1] and any(geometry.shift):
        return "windows that are shifted and higher than wide are not served"
    if plan(geometry, 1, backward=True, budgets=BUDGETS[: 1 if every_core else None]):
        return None
    return "its gradient does not fit into a core's vector memory"


def forward(geometry: Windows, qkv, bias, query, local_kernel, *, interpret: bool = False):
    """As `window_attention`; [B, H, W, parts, h, d] → [B, H, W, h, d]."""
    blocks = _Blocks(geometry, qkv.shape[0], backward=False)
    (out,) = call(
        _forward_kernel,
        blocks.kernel,
        blocks.inputs(qkv, bias, query, local_kernel),
        [blocks.map_like(qkv, 1)],
        scratch=[blocks.strip_scratch(blocks.kernel.parts)],
        interpret=interpret,
        name="window_attention_forward",
    )
    return out.reshape(*qkv.shape[:3], geometry.heads, geometry.dim)


def backward(
    geometry: Windows, qkv, bias, query, local_kernel, out_grad, *, interpret: bool = False
):
    """The gradients of the four arrays of `forward`, given that of its result."""
    blocks = _Blocks(geometry, qkv.shape[0], backward=True)
    cut, parts = blocks.cut, blocks.kernel.parts
    spec, shape = blocks.map_like(qkv, 1)
    inputs = blocks.inputs(qkv, bias, query, local_kernel)
    inputs.append((spec, out_grad.reshape(shape.shape)))
    scratch = [blocks.strip_scratch(parts), blocks.strip_scratch(1)]
    if cut.is_split:
        scratch.append(pltpu.VMEM((parts - 1, *spec.block_shape), qkv.dtype))
    packs = [
        (given, pack, block)
        for given, pack, block in (
            (bias, blocks.pack_bias, blocks.bias_grad),
            (query, blocks.pack_query, blocks.query_grad),
            (local_kernel, blocks.pack_local, blocks.local_grad),
        )
        if given is not None
    ]
    map_grad, *sums = call(
        _backward_kernel,
        blocks.kernel,
        inputs,
        [blocks.map_like(qkv, parts), *(block() for _, _, block in packs)],
        scratch=scratch,
        interpret=interpret,
        name="window_attention_backward",
        rounds=parts if cut.is_split else 1,
    )
    grads = iter(_unpacked(pack, given, x) for (given, pack, _), x in zip(packs, sums, strict=True))
    shared = [None if given is None else next(grads) for given in (bias, query, local_kernel)]
    return map_grad.reshape(qkv.shape), *shared


def _unpacked(pack, given, grad):
    """The gradient of `given` from that of pack(given), and of each half of the batch."""
    packed, unpack = jax.vjp(pack, given)
    if grad.ndim > packed.ndim:
        grad = grad.sum(0)
    return unpack(grad.astype(packed.dtype))[0]


class _Blocks:
    """The parts of the arrays that each program is given, and their layout."""

    def __init__(self, geometry: Windows, batch: int, *, backward: bool):
        self.geometry, self.batch = geometry, batch
        cut = plan(geometry, batch, backward=backward)
        if cut is None:
            raise ValueError(f"{geometry}: {refusal(geometry, every_core=False)}")
        self.cut = cut
        self.kernel = WindowKernel(geometry, self.cut)
        self.channels = geometry.heads * geometry.dim
        self.width = self.cut.groups * self.cut.lanes

    def map(self, lanes: int, part=None) -> pl.BlockSpec:
        """The block of a map: of `part` of the packed ones; None: of the one whose turn it is."""
        cut, geometry = self.cut, self.geometry

        def index(half, channel, image, strip, turn):
            place = (turn if part is None else part) * cut.programs[1] + channel
            return half * cut.programs[2] + image, strip, 0, place

        rows = cut.strips * geometry.window[0]
        return pl.BlockSpec((cut.images, rows, geometry.width, lanes), index)

    def map_like(self, qkv, parts: int):
        """(block spec, shape) of a map of one part, or of all in turn."""
        shape = jax.ShapeDtypeStruct((*qkv.shape[:3], parts * self.channels), qkv.dtype)
        if self.cut.is_split and parts > 1:
            return self.map(self.width), shape
        return self.map(parts * self.width, 0), shape

    def strip_scratch(self, parts: int):
        slabs, (lines, _) = parts * self.cut.groups, self.kernel.strip
        shape = (slabs, lines, self.kernel.scratch_length, self.cut.lanes)
        return pltpu.VMEM(shape, jnp.float32)

    def inputs(self, qkv, bias, query, local_kernel):
        """[(block spec, array)] of everything that `forward` is given."""
        cut, packed, parts = self.cut, qkv.reshape(*qkv.shape[:3], -1), self.kernel.parts
        if cut.is_split:
            inputs = [(self.map(self.width, part), packed) for part in range(parts)]
        else:
            inputs = [(self.map(parts * self.width, 0), packed)]
        if bias is not None:
            shape = (cut.groups, cut.heads * cut.tokens, cut.tokens)
            spec = pl.BlockSpec(shape, lambda half, channel, *_: (channel, 0, 0))
            inputs.append((spec, self.pack_bias(bias)))
        if query is not None:
            inputs.append((self.query_grad()[0], self.pack_query(query)))
        if local_kernel is not None:
            spec = pl.BlockSpec((9, self.width), lambda half, channel, *_: (0, channel))
            inputs.append((spec, self.pack_local(local_kernel)))
        return inputs

    # (block spec, shape) of the gradients of what windows share, for each half of the batch.

    def bias_grad(self):
        cut = self.cut
        shape = (cut.groups, cut.heads * cut.tokens, cut.tokens)
        spec = pl.BlockSpec((1, *shape), lambda half, channel, *_: (half, channel, 0, 0))
        whole = (cut.programs[0], shape[0] * cut.programs[1], *shape[1:])
        return spec, jax.ShapeDtypeStruct(whole, jnp.float32)

    def query_grad(self):
        cut = self.cut

        def index(half, channel, image, *_):
            return half * cut.programs[2] + image, 0, channel

        spec = pl.BlockSpec((cut.images, cut.tokens, self.width), index)
        return spec, jax.ShapeDtypeStruct((self.batch, cut.tokens, self.channels), jnp.float32)

    def local_grad(self):
        spec = pl.BlockSpec((1, 9, self.width), lambda half, channel, *_: (half, 0, channel))
        shape = (self.cut.programs[0], 9, self.channels)
        return spec, jax.ShapeDtypeStruct(shape, jnp.float32)

    # What windows share, in the order of a tile's tokens.

    def to_tile(self, x, axis, fill=0.0):
        """Axes (a, b) at `axis` → one axis of the tile's tokens."""
        cut = self.cut
        if cut.tall:
            x = jnp.swapaxes(x, axis, axis + 1)
        padding = [(0, 0)] * x.ndim
        padding[axis + 1] = (0, cut.stride - cut.length)
        x = jnp.pad(x, padding, constant_values=fill)
        return x.reshape(*x.shape[:axis], cut.tokens, *x.shape[axis + 2 :])

    def pack_bias(self, bias):
        """[h, N, N] → [groups, heads·tokens, tokens], padded keys masked."""
        window, cut = self.geometry.window, self.cut
        bias = bias.reshape(-1, *window, *window)
        bias = self.to_tile(self.to_tile(bias, 3, MASKED), 1)
        return bias.reshape(-1, cut.heads * cut.tokens, cut.tokens)

    def pack_query(self, query):
        """[B, a, b, h, d] → [B, tokens, C]."""
        return self.to_tile(query.reshape(*query.shape[:3], -1), 1)

    def pack_local(self, local_kernel):
        """[3, 3, h, d] → float32 [9, C]."""
        if self.cut.tall:
            local_kernel = jnp.swapaxes(local_kernel, 0, 1)
        return local_kernel.reshape(9, -1).astype(jnp.float32)
