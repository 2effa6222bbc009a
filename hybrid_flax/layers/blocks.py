"""The blocks of a stage, one after the other: written out, or equal ones as one `lax.scan`.

Written out, a program has every block of the model, and compiling takes the longer the more there
are. In a loop one body stands for all equal blocks. Their weights are stacked inside the program,
so that parameters, checkpoints and everything that knows paths stay as they are.
"""

import contextlib
import contextvars
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_flax.layers.drop_path import split_key
from pallas.dispatch import repeated

FEWEST = 3  # repeats that are worth a loop
_UNITS = (1, 2)  # blocks that repeat together: GC ViT, Swin and L2ViT alternate two kinds


class _Loops(NamedTuple):
    policy: Callable[..., bool] | None  # of `jax.checkpoint`, around each block in a loop


_loops: contextvars.ContextVar[_Loops | None] = contextvars.ContextVar("_loops", default=None)


@contextlib.contextmanager
def scanned_blocks(policy: Callable[..., bool] | None = None) -> Iterator[None]:
    """Inside it, `run_blocks` runs equal blocks in loops.

    Args:
      policy: of `jax.checkpoint`, around each of these blocks; None: nothing is computed again.
    """
    token = _loops.set(_Loops(policy))
    try:
        yield
    finally:
        _loops.reset(token)


def run_blocks(
    blocks: Sequence[Any],
    x: jax.Array,
    key: jax.Array | None,
    *shared: Any,
    taps: Collection[int] = (),
) -> list[Any]:
    """Calls `block(x, *shared, key)` one after the other, each on what the one before gave.

    Args:
      blocks: modules with a `drop_path_rate`.
      x: [B, ...], what the first block is given.
      key: PRNG key, of which every block gets another part; None in evaluation.
      shared: further arguments, the same for all.
      taps: places of blocks, besides the last, whose results are used in any case: loops end there,
        for a loop keeps the results of all its blocks or of none but the last.

    Returns:
      What each block gave: [B, ...] for the next, or a tuple that begins with that.
    """
    keys, options = split_key(key, len(blocks)), _loops.get()
    if options is None:
        return _in_turn(blocks, range(len(blocks)), x, shared, keys)
    outputs: list[Any] = []
    for loop in find_loops(blocks, taps):
        outputs += _in_turn(blocks, range(len(outputs), loop.begin), x, shared, keys)
        x = _handed_on(outputs[-1]) if outputs else x
        outputs += _in_loop(blocks, loop, x, shared, keys, options)
        x = _handed_on(outputs[-1])
    return outputs + _in_turn(blocks, range(len(outputs), len(blocks)), x, shared, keys)


class Loop(NamedTuple):
    """`blocks[begin:end]` are equal units of so many blocks."""

    begin: int
    end: int
    unit: int

    @property
    def turns(self) -> int:
        return (self.end - self.begin) // self.unit


def find_loops(blocks: Sequence[Any], taps: Collection[int] = ()) -> list[Loop]:
    """Finds stretches of equal units, at most one between two taps: that which saves most.

    Blocks are equal if they differ in nothing but the values of their weights and drop path rates.
    """
    each = [_kind(block) for block in blocks]
    kinds = [each.index(kind) for kind in each]
    ends = sorted({place + 1 for place in taps} | {len(blocks)})
    found = []
    for begin, end in zip([0, *ends], ends, strict=False):
        loops = [
            Loop(first, first + unit * _repeats(kinds[first:end], unit), unit)
            for unit in _UNITS
            for first in range(begin, end)
        ]
        loops = [loop for loop in loops if loop.turns >= FEWEST]
        if loops:
            found.append(max(loops, key=lambda loop: loop.end - loop.begin - loop.unit))
    return found


def _repeats(kinds: list[int], unit: int) -> int:
    """Counts how often the first `unit` kinds come one after the other."""
    count = 0
    while kinds[unit * count : unit * (count + 1)] == kinds[:unit]:
        count += 1
    return count


def _kind(block: Any) -> Any:
    graph, state = _split(block)
    leaves, tree = jax.tree.flatten(state)
    return graph, tree, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _split(block: Any) -> tuple[Any, Any]:
    """`nnx.split` of a block without its drop path rate."""
    rate, vars(block)["drop_path_rate"] = block.drop_path_rate, 0.0
    try:
        return nnx.split(block)
    finally:
        vars(block)["drop_path_rate"] = rate


def _handed_on(output: Any) -> jax.Array:
    return output[0] if isinstance(output, tuple) else output


def _in_turn(blocks, places: range, x, shared, keys) -> list[Any]:
    outputs = []
    for place in places:
        outputs.append(blocks[place](x, *shared, keys[place]))
        x = _handed_on(outputs[-1])
    return outputs


def _in_loop(blocks, loop: Loop, x, shared, keys, options: _Loops) -> list[Any]:
    members = blocks[loop.begin : loop.end]
    graphs = [_split(block)[0] for block in members[: loop.unit]]
    inputs = [
        (_weights(block), _rate(block), key)
        for block, key in zip(members, keys[loop.begin : loop.end], strict=True)
    ]
    units = [inputs[first : first + loop.unit] for first in range(0, len(inputs), loop.unit)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *units)

    def call(graph, inputs, x):
        weights, rate, key = inputs
        block = nnx.merge(graph, weights)
        vars(block)["drop_path_rate"] = rate  # past Flax, which would take the array for a weight
        output = block(x, *shared, key)
        return output, nnx.state(block, nnx.BatchStat)

    if options.policy:
        call = jax.checkpoint(call, policy=options.policy, static_argnums=0)

    def body(x, unit):
        found = []
        for graph, inputs in zip(graphs, unit, strict=True):
            found.append(call(graph, inputs, x))
            x = _handed_on(found[-1][0])
        return x, found

    with repeated(loop.turns):
        last, found = jax.lax.scan(body, x, stacked)
    outputs = []
    for index, block in enumerate(members):
        output, statistics = jax.tree.map(
            lambda leaf, turn=index // loop.unit: leaf[turn], found[index % loop.unit]
        )
        nnx.update(block, statistics)
        outputs.append(output)
    # Where nobody asks for the others, nothing is kept of them.
    outputs[-1] = (last, *outputs[-1][1:]) if isinstance(outputs[-1], tuple) else last
    return outputs


def _weights(block: Any) -> Any:
    """The state of a block, its kernels in the dtype in which they are used: less to stack."""
    _, state = _split(block)
    parts: dict[Any, Any] = dict(nnx.iter_modules(block))
    dtypes = {path: part.dtype for path, part in parts.items() if hasattr(part, "kernel")}
    flat = [
        (path, leaf.replace(leaf[...].astype(dtypes[path[:-1]])) if path[-1] == "kernel" else leaf)
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(flat)


def _rate(block: Any) -> np.float32:
    """The drop path rate such that 1 less it is, in float32, what it is to the others."""
    return np.float32(1 - np.float32(1 - block.drop_path_rate))
