"""Norms whose statistics are float32 whatever the dtype of the computation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.errors import InputError


def layer_norm(
    dim: int, *, epsilon: float = 1e-5, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """Over the last axis; the two-pass variance, as PyTorch computes it."""
    return nnx.LayerNorm(dim, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last, as PyTorch's BatchNorm; [..., C] → the same.

    In training the batch's own mean and variance are used, and the running ones move a tenth of the
    way towards them; the running variance takes the unbiased estimate (n/(n - 1)). Under `jit` over
    several devices the batch is the global one.
    """

    def __init__(self, dim: int, *, epsilon: float = 1e-5, dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(dim, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(dim, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(dim, jnp.float32))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))  # of batches seen
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... C"], train: bool = False) -> Float[Array, "... C"]:
        values = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if train:
            count = x.size // x.shape[-1]
            if count < 2:
                raise InputError(
                    f"batch norm cannot train on shape {x.shape}: it needs two values of each "
                    "channel. Use a larger batch"
                )
            axes = tuple(range(x.ndim - 1))
            mean = values.mean(axes)
            var = values.var(axes)
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * jax.lax.stop_gradient(mean)
            unbiased = jax.lax.stop_gradient(var) * (count / (count - 1))
            self.var[...] = 0.9 * self.var[...] + 0.1 * unbiased
            self.count[...] = self.count[...] + 1
        ones = (1,) * (x.ndim - 1)
        scale = (self.scale[...] * jax.lax.rsqrt(var + self.epsilon)).reshape(*ones, -1)
        shifted = (values - mean.reshape(*ones, -1)) * scale
        return (shifted + self.bias[...].reshape(*ones, -1)).astype(self.dtype)
