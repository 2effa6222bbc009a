"""Deformable convolution (DCNv3 of InternImage, arXiv:2211.05778) as the token mixer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    DepthwiseConv,
    deformable_sampling,
    layer_norm,
    linear,
    normal_init,
)
from hybrid_flax.models.unified.mixer import Mixer, Place

GROUP_DIM = 16
KERNEL = 3


def refusal(height: int, width: int, image_size: int, detection: bool) -> str | None:
    """Says why a model built for `image_size` cannot take images of this height and width."""
    if height % 32 == width % 32 == 0:
        return None
    return (
        "the deformable convolution takes heights and widths that are multiples of 32. Resize "
        "or pad the images"
    )


class DeformableConv(Mixer):
    """Each group of 16 channels samples nine movable points around a place and adds them weighted.

    Offsets and weights come from a branch of their own: depthwise convolution → norm → GELU → one
    linear layer each; weights are a softmax over the nine points.
    """

    norm_epsilon = 1e-5
    has_kernels = True
    widths = (GROUP_DIM,) * 4

    def __init__(self, dim: int, place: Place, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.groups = dim // GROUP_DIM
        self.implementation = place.implementation
        points = self.groups * KERNEL**2
        self.value_proj = linear(dim, dim, dtype=dtype, rngs=rngs)
        self.depthwise = DepthwiseConv(
            dim, 3, use_bias=True, kernel_init=normal_init, dtype=dtype, rngs=rngs
        )
        self.norm = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.offsets = linear(dim, 2 * points, dtype=dtype, rngs=rngs)
        self.weights = linear(dim, points, dtype=dtype, rngs=rngs)
        self.output_proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        shape = (*x.shape[:3], self.groups)
        around = jax.nn.gelu(self.norm(self.depthwise(x)), approximate=False)
        weights = self.weights(around).reshape(*shape, -1).astype(jnp.float32)
        out = deformable_sampling(
            self.value_proj(x).reshape(*shape, GROUP_DIM),
            self.offsets(around).reshape(*shape, -1, 2),
            jax.nn.softmax(weights, axis=-1),
            kernel_size=KERNEL,
            implementation=self.implementation,
        )
        return self.output_proj(out.reshape(x.shape))
