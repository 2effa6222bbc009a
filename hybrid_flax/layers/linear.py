"""Linear layers as all five papers initialise them, and the perceptron made of two."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers.convolutions import matching_bias_init

# The authors' truncated normal cuts at ±2, which is ±100 standard deviations: nothing is cut.
normal_init = jax.nn.initializers.normal(0.02)


def linear(
    in_dim: int,
    out_dim: int,
    *,
    use_bias: bool = True,
    kernel_init: Initializer = normal_init,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """[..., in_dim] → [..., out_dim]; weights start normal with deviation 0.02, biases at 0.

    With `kernel_init=pytorch_init` both start as PyTorch's default has it.
    """
    return nnx.Linear(
        in_dim,
        out_dim,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=matching_bias_init(kernel_init, in_dim),
        dtype=dtype,
        rngs=rngs,
    )


class Mlp(nnx.Module):
    """Linear → exact GELU → Linear over the last axis; [..., C] → [..., C]."""

    def __init__(
        self, dim: int, hidden_dim: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        self.fc1 = linear(dim, hidden_dim, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden_dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
