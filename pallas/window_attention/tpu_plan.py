"""How a shape is cut into programs of the TPU kernels for attention in windows."""

import jax.numpy as jnp

from pallas.tiles.tpu import UNROLLED_TOKENS, Plan, largest_group
from pallas.tpu_core import BUDGETS, LANES, SUBLANES, largest_divisor, round_up
from pallas.window_attention.geometry import Windows

BLOCK_BYTES = 5 * 2**19  # about how much of the packed map one program takes
STACK_BYTES = 2**20  # of the scores of the heads that are computed in one product


def plan(geometry: Windows, batch: int, *, backward: bool, budgets=BUDGETS) -> Plan | None:
    """The largest blocks that fit: whole images where they are small, else rows of windows.

    None if nothing fits.
    """
    (a, b), heads, dim = geometry.window, geometry.heads, geometry.dim
    tall = a > b
    lines, length = (b, a) if tall else (a, b)
    stride = round_up(length, SUBLANES)
    group = largest_group(heads, dim)
    # Blocks are cut along channels only at whole registers.
    groups = 1 if group * dim % LANES == 0 else heads // group
    stacked = largest_divisor(group, STACK_BYTES // (4 * (lines * stride) ** 2))
    rows = geometry.height // a
    cut = Plan(
        tall=tall,
        lines=lines,
        length=length,
        stride=stride,
        heads=group,
        stacked=stacked,
        lanes=group * dim,
        groups=groups,
        programs=(1, heads // group // groups, batch, rows),
        images=1,
        strips=1,
        buffers=2,
    )
    # The rows of shifted windows begin inside others' and end at the other border.
    smallest = rows if geometry.shift[0] else 1
    sizes = [(1, strips) for strips in divisors(rows) if strips >= smallest]
    sizes += [(images, rows) for images in divisors(batch) if images > 1]
    most = BLOCK_BYTES // _strip_bytes(geometry, cut)
    sizes = sizes[:1] + [size for size in sizes[1:] if size[0] * size[1] <= most]
    for budget in budgets:
        for buffers in (2, 1):
            options = [cut._replace(images=i, strips=s, buffers=buffers) for i, s in sizes]
            fitting = [o for o in options if vmem_bytes(geometry, o, backward=backward) <= budget]
            if fitting:
                images, strips = fitting[-1].images, fitting[-1].strips
                halves = 1 if batch // images % 2 else 2  # for chips with two cores
                programs = (halves, cut.programs[1], batch // images // halves, rows // strips)
                return fitting[-1]._replace(programs=programs)
    return None


def vmem_bytes(geometry: Windows, cut: Plan, *, backward: bool) -> int:
    """Bytes of a core's vector memory for a program's blocks and scratch."""
    size = jnp.dtype(geometry.dtype).itemsize
    parts = 2 if geometry.shared_query else 3
    width = cut.groups * cut.lanes
    places = cut.images * cut.strips * geometry.window[0] * round_up(geometry.width, 32 // size)
    packed = parts * round_up(width, LANES) if cut.is_split else round_up(parts * width, LANES)
    one = round_up(width, LANES)
    blocks = places * size * (packed + one)
    fixed = 0
    if backward:
        blocks += places * size * (one if cut.is_split else packed)
        fixed += places * size * (packed - one) if cut.is_split else 0
    lines, line = geometry.window[0], geometry.width
    lines, line = (line, lines) if cut.tall else (lines, line)
    slabs = cut.groups * (parts + backward)
    fixed += slabs * lines * round_up(line + SUBLANES, SUBLANES) * round_up(cut.lanes, LANES) * 4
    scores = cut.tokens * round_up(cut.tokens, LANES) * 4
    if geometry.has_bias:
        blocks += (1 + backward) * cut.groups * cut.heads * scores
    if geometry.shared_query:
        blocks += cut.images * cut.tokens * one * (size + 4 * backward)
    if geometry.has_local:  # the taps' moved tiles, of all windows that are scheduled together
        fixed += 8 * UNROLLED_TOKENS * round_up(cut.lanes, LANES) * 4
    return cut.buffers * blocks + fixed + (2 + 2 * backward) * cut.stacked * scores


def _strip_bytes(geometry: Windows, cut: Plan) -> int:
    """Bytes of the packed map in one row of windows."""
    size = jnp.dtype(geometry.dtype).itemsize
    return geometry.window[0] * geometry.width * 3 * cut.groups * cut.lanes * size


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
