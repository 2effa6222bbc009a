"""Layer scale: a learned factor for each channel of a residual branch (CaiT, arXiv:2103.17239)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def layer_scale(dim: int, initial: float | None) -> nnx.Param | None:
    """γ [dim], float32, one number per channel; None for a model without."""
    return None if initial is None else nnx.Param(jnp.full(dim, initial, jnp.float32))


def scaled(branch: Float[Array, "*B C"], gamma: nnx.Param | None) -> Float[Array, "*B C"]:
    """The branch times γ, in the branch's dtype; as it is without γ."""
    if gamma is None:
        return branch
    return branch * jnp.expand_dims(gamma[...], range(branch.ndim - 1)).astype(branch.dtype)
