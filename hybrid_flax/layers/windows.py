"""Making a map fit its windows."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def pad_to_multiple(x: Shaped[Array, "B H W C"], size: int) -> Shaped[Array, "B _H _W C"]:
    """Zeros at the right and at the bottom, up to the next multiples of `size`."""
    bottom, right = -x.shape[1] % size, -x.shape[2] % size
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
