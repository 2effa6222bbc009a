"""Attention in windows of a feature map: Swin's, GC ViT's, CSWin's and L2ViT's.

Shifted windows, local and global-query windows, stripes with locally-enhanced position: one
operation. It takes the NHWC map with query, key and value packed side by side, as one projection
makes them, and gives the NHWC map back.

`reference.py` is the definition, `tpu.py` and `gpu.py` are the kernels, `choice.py` says what
"auto" does on each platform. `pallas/README.md` explains how they work.

Shapes: B images of H×W places, h heads of d channels; windows of a×b places hold N = a·b tokens,
numbered row-major.
"""

import jax

from pallas.dispatch import Argument, run
from pallas.window_attention import reference
from pallas.window_attention.choice import KERNELS
from pallas.window_attention.geometry import Windows
from pallas.window_attention.reference import attention

__all__ = ["attention", "window_attention"]


def window_attention(
    qkv: jax.Array,
    bias: jax.Array | None = None,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    query: jax.Array | None = None,
    local_kernel: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention of every place to the places of its window; [B, H, W, h, d].

    Args:
      qkv: [B, H, W, 3, h, d], bfloat16 or float32: query, key and value. With `query`
        [B, H, W, 2, h, d]: key and value.
      bias: [h, N, N] float32, added to the scores d^-0.5·query·key of query i and key j.
      window: height and width (a, b) of the windows, which divide H and W; a number: a square.
      shift: the windows begin at this place (down, right), from 0 to below a window, and go on at
        the opposite border; there tokens see only those that were their neighbours on the map
        (Swin Transformer, arXiv:2103.14030, section 3.2).
      query: [B, a, b, h, d], the queries that all windows of an image share (GC ViT,
        arXiv:2206.09959, section 3.2).
      local_kernel: [3, 3, h, d], a depthwise convolution of the values, with zeros beyond the
        window, that is added to the result (CSWin's locally-enhanced position, arXiv:2107.00652,
        section 3.3).
      implementation: "auto", "pallas" or "xla", see `choice.py`.

    Returns:
      [B, H, W, h, d] in the dtype of `qkv`. Scores and softmax are computed in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, naming the argument and the rule;
        `implementation="pallas"` for a shape that no kernel serves (see `dispatch.run`).
    """
    window, shift = _pair("window", window), _pair("shift", shift)
    geometry = Windows.of(qkv, bias, window, shift, query, local_kernel)

    def plain(qkv, bias, query, local_kernel):
        return reference.window_attention(
            qkv, bias, window=window, shift=shift, query=query, local_kernel=local_kernel
        )

    arguments = (
        Argument(qkv, batch=0, heads=4),
        Argument(bias, heads=0),
        Argument(query, batch=0, heads=3),
        Argument(local_kernel, heads=2),
    )
    return run(implementation, geometry, "heads", KERNELS, plain, arguments)


def _pair(name: str, value) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(x, int) for x in pair):
        raise ValueError(f"{name}={value!r}: expected a whole number or (height, width)")
    return pair
