"""What a kernel must know of its arguments, and their checks."""

import dataclasses
import math

import jax.numpy as jnp

DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Windows:
    """All that a kernel for `window_attention` must know beforehand, but for the batch."""

    height: int
    width: int
    heads: int
    dim: int
    window: tuple[int, int]
    dtype: str
    shift: tuple[int, int] = (0, 0)
    has_bias: bool = False
    shared_query: bool = False
    has_local: bool = False

    @classmethod
    def of(cls, qkv, bias, window, shift, query, local_kernel) -> "Windows":
        """Checks the arguments; raises ValueError naming the one that does not fit."""
        height, width, heads, dim = check_map(qkv, 3 if query is None else 2)
        if query is not None:
            expect("query", query, (qkv.shape[0], *window, heads, dim), qkv.dtype.name)
        if bias is not None:
            tokens = math.prod(window)
            expect("bias", bias, (heads, tokens, tokens), "float32")
        if local_kernel is not None:
            expect("local_kernel", local_kernel, (3, 3, heads, dim), *DTYPES)
        for side, span, offset in zip((height, width), window, shift, strict=True):
            if span < 1 or side % span:
                raise ValueError(
                    f"window={window} does not divide the map of qkv {qkv.shape}: {side} is no "
                    f"multiple of {span}. Pad the map before the projection, as the models do"
                )
            if not 0 <= offset < span:
                raise ValueError(f"shift={shift}: expected from 0 to below window={window}")
        return cls(
            height,
            width,
            heads,
            dim,
            window,
            qkv.dtype.name,
            shift,
            has_bias=bias is not None,
            shared_query=query is not None,
            has_local=local_kernel is not None,
        )


def check_map(qkv, parts: int) -> tuple[int, int, int, int]:
    """(H, W, h, d) of a packed map."""
    what = "query, key and value" if parts == 3 else "key and value, as the query is given"
    if qkv.ndim != 6 or qkv.shape[3] != parts:
        raise ValueError(f"qkv has shape {qkv.shape}: expected [B, H, W, {parts}, h, d], {what}")
    if qkv.dtype.name not in DTYPES:
        raise ValueError(f"qkv is {qkv.dtype.name}: expected {' or '.join(DTYPES)}")
    return (*qkv.shape[1:3], *qkv.shape[4:])


def expect(name: str, array, shape: tuple[int, ...], *dtypes: str):
    if array.shape != shape or jnp.dtype(array.dtype).name not in dtypes:
        raise ValueError(
            f"{name} is {jnp.dtype(array.dtype).name}{list(array.shape)}: expected "
            f"{' or '.join(dtypes)} {list(shape)}, to fit qkv, window and heads"
        )
