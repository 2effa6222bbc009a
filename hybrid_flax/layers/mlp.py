"""The two-layer perceptron of transformer blocks."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Mlp(nnx.Module):
    """Linear → exact GELU → Linear over the last axis; [..., C] → [..., C]."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        kernel_init: jax.nn.initializers.Initializer,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.fc1 = nnx.Linear(dim, hidden_dim, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden_dim, dim, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
