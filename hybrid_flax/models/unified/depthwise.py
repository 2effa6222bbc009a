"""A 7×7 depthwise convolution as the token mixer: what the study takes from ConvNeXt."""

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import BiasedOptions, DepthwiseConv, PointwiseConv, normal_init
from hybrid_flax.models.unified.mixer import Mixer, Place


class DepthwiseMixer(Mixer):
    """1×1 → 7×7 depthwise → 1×1 convolution, without any activation between them.

    Not ConvNeXt's own block (arXiv:2201.03545), which has no projection before the depthwise
    convolution and whose MLP is what follows it. Takes images of any size.
    """

    def __init__(self, dim: int, place: Place, *, dtype: DTypeLike, rngs: nnx.Rngs):
        options: BiasedOptions = {
            "use_bias": True,
            "kernel_init": normal_init,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.input_proj = PointwiseConv(dim, dim, **options)
        self.depthwise = DepthwiseConv(dim, 7, **options)
        self.output_proj = PointwiseConv(dim, dim, **options)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.output_proj(self.depthwise(self.input_proj(x)))
