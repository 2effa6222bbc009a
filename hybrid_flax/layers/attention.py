"""Softmax attention, the one way it is computed here."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention(
    query: Float[Array, "*B N h d"],
    key: Float[Array, "*B M h d"],
    value: Float[Array, "*B M h e"],
    bias: Float[Array, "..."] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "*B N h e"]:
    """softmax(scale · query keyᵀ + bias) value, for each head; scores and softmax in float32.

    Args:
      query: [..., N, h, d], N queries of h heads with d channels.
      key: [..., M, h, d].
      value: [..., M, h, e].
      bias: added to the scores; broadcastable to [..., h, N, M].
      scale: d^-0.5 by default.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * scale
    if bias is not None:
        scores = scores + bias.reshape((1,) * (scores.ndim - bias.ndim) + bias.shape)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("...hqk,...khe->...qhe", weights, value)
