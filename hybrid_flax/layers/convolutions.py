"""Convolutions with PyTorch's symmetric padding and default initialisation."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# PyTorch's default for convolutions, kaiming_uniform(a=√5): uniform in ±1/√fan_in.
kernel_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    use_bias: bool = False,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution that pads ⌊kernel_size/2⌋ on every side.

    `"SAME"` would not do: with stride 2 on an even map it pads only right and bottom, which shifts
    the whole map by a pixel against PyTorch.
    """
    bound = 1 / math.sqrt(in_channels * kernel_size**2)
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel_size, kernel_size),
        strides=stride,
        padding=((kernel_size // 2,) * 2,) * 2,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
        rngs=rngs,
    )


class PointwiseConv(nnx.Module):
    """A 1×1 convolution without bias, as the matrix product it is; [..., C] → [..., K]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (1, 1, in_channels, out_channels)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... K"]:
        return x.astype(self.dtype) @ self.kernel[0, 0].astype(self.dtype)


class DepthwiseConv(nnx.Module):
    """One square filter per channel, stride 1, zero padding, no bias; [B, H, W, C] → the same.

    XLA's CPU backend runs grouped convolutions 20 to 30 times slower than a sum of shifted
    products, so the formulation is chosen by the platform that is compiled for.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (kernel_size, kernel_size, 1, channels), jnp.float32)
        )
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return jax.lax.platform_dependent(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            cpu=depthwise_as_shifted_sum,
            default=depthwise_as_grouped_conv,
        )


def depthwise_as_grouped_conv(x, kernel):
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def depthwise_as_shifted_sum(x, kernel):
    size, height, width = kernel.shape[0], x.shape[1], x.shape[2]
    pad = size // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))).astype(jnp.float32)
    total = sum(
        padded[:, i : i + height, j : j + width] * kernel[i : i + 1, j : j + 1].astype(jnp.float32)
        for i in range(size)
        for j in range(size)
    )
    return total.astype(x.dtype)
