"""Attention of blocks of a feature map to the larger neighbourhoods around them: HaloNet's.

The files are those of `window_attention/`. Shapes: B images of H×W places, h heads of d channels.
"""

import functools

import jax

from pallas.dispatch import Argument, run
from pallas.halo_attention import reference
from pallas.halo_attention.choice import KERNELS
from pallas.halo_attention.geometry import Halo

__all__ = ["halo_attention"]


def halo_attention(
    qkv: jax.Array,
    row_table: jax.Array,
    column_table: jax.Array,
    *,
    block: int,
    halo: int,
    implementation: str = "auto",
) -> jax.Array:
    """Each block of b×b queries attends to the w×w places around it, w = b + 2·halo.

    (HaloNet, arXiv:2103.12731, section 2.2.) The score of query (i, j) of a block and key (a, c) of
    its neighbourhood is d^-0.5·q·k + q·row_table[a - i + w - 1] + q·column_table[c - j + w - 1]. As
    i does not count the halo, the first w - b rows of the tables are never read. Keys outside the
    map do not take part.

    Args:
      qkv: [B, H, W, 3, h, d], bfloat16 or float32.
      row_table, column_table: [2w - 1, d] float32, shared by all heads.
      block: b, which divides H and W.
      halo: how many places the keys reach over the block on each side.
      implementation: "auto", "pallas" or "xla", see `choice.py`.

    Returns:
      [B, H, W, h, d] in the dtype of `qkv`. Scores and softmax are computed in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, naming the argument and the rule;
        `implementation="pallas"` for a shape that no kernel serves (see `dispatch.run`).
    """
    geometry = Halo.of(qkv, row_table, column_table, block, halo)
    plain = functools.partial(reference.halo_attention, block=block, halo=halo)
    arguments = (Argument(qkv, batch=0, heads=4), Argument(row_table), Argument(column_table))
    return run(implementation, geometry, "heads", KERNELS, plain, arguments)
