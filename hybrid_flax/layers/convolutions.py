"""Convolutions with PyTorch's symmetric padding and default initialisation."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# PyTorch's default for convolutions, kaiming_uniform(a=√5): uniform in ±1/√fan_in, for the kernel
# and for the bias.
pytorch_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def matching_bias_init(kernel_init: Initializer, fan_in: int) -> Initializer:
    """PyTorch's beside PyTorch's own kernels; zeros beside the others, as the authors have it."""
    if kernel_init is not pytorch_init:
        return jax.nn.initializers.zeros
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32, out_sharding=None) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    use_bias: bool = False,
    kernel_init: Initializer = pytorch_init,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution that pads `padding` (default ⌊kernel_size/2⌋) zeros on every side.

    `"SAME"` would not do: with stride 2 on an even map it pads only right and bottom, which shifts
    the whole map by a pixel against PyTorch.
    """
    padding = kernel_size // 2 if padding is None else padding
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel_size, kernel_size),
        strides=stride,
        padding=((padding, padding), (padding, padding)),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        bias_init=matching_bias_init(kernel_init, in_channels * kernel_size**2),
        rngs=rngs,
    )


class PointwiseConv(nnx.Module):
    """A 1×1 convolution, in groups or not, as the matrix product it is; [..., C] → [..., K].

    With G groups, output channels k·K/G to (k+1)·K/G - 1 see input channels k·C/G to
    (k+1)·C/G - 1.
    """

    bias: nnx.Param | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int = 1,
        use_bias: bool = False,
        kernel_init: Initializer = pytorch_init,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        fan_in = in_channels // groups
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (1, 1, fan_in, out_channels), jnp.float32)
        )
        if use_bias:
            bias_init = matching_bias_init(kernel_init, fan_in)
            self.bias = nnx.Param(bias_init(rngs.params(), (out_channels,), jnp.float32))
        else:
            self.bias = None
        self.groups = groups
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... K"]:
        x, kernel = x.astype(self.dtype), self.kernel[0, 0].astype(self.dtype)
        if self.groups == 1:
            x = x @ kernel
        else:
            x = x.reshape(*x.shape[:-1], self.groups, -1)
            kernel = kernel.reshape(kernel.shape[0], self.groups, -1)
            x = jnp.einsum("...gi,igo->...go", x, kernel)
            x = x.reshape(*x.shape[:-2], -1)
        return x if self.bias is None else x + _as_last(self.bias, x)


class DepthwiseConv(nnx.Module):
    """One square filter per channel, stride 1, zero padding; [B, H, W, C] → the same.

    XLA's CPU backend runs grouped convolutions 4 to 30 times slower than a sum of shifted products,
    so the formulation is chosen by the platform that is compiled for.
    """

    bias: nnx.Param | None

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        use_bias: bool = False,
        kernel_init: Initializer = pytorch_init,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (kernel_size, kernel_size, 1, channels), jnp.float32)
        )
        if use_bias:
            bias_init = matching_bias_init(kernel_init, kernel_size**2)
            self.bias = nnx.Param(bias_init(rngs.params(), (channels,), jnp.float32))
        else:
            self.bias = None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = jax.lax.platform_dependent(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            cpu=depthwise_as_shifted_sum,
            default=depthwise_as_grouped_conv,
        )
        return x if self.bias is None else x + _as_last(self.bias, x)


def _as_last(bias: nnx.Param, x: Array) -> Array:
    """The bias, ready to be added to x: rank promotion is an error in our tests."""
    return bias[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


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


@jax.custom_vjp
def depthwise_as_shifted_sum(x, kernel):
    """A sum of float32 products, for CPUs.

    It is computed in bands of rows, in a loop: XLA would otherwise fuse it into whatever follows
    (a norm, a mean), where it runs ten times slower. It has a gradient of its own because JAX's, of
    so many slices, is five times slower.
    """
    size, (_, height, width, _) = kernel.shape[0], x.shape
    bands = next((count for count in range(2, height + 1) if height % count == 0), 1)
    band = height // bands
    padded, kernel = _padded(x, size), kernel.astype(jnp.float32)

    def fill(index, total):
        rows = jax.lax.dynamic_slice_in_dim(padded, index * band, band + size - 1, axis=1)
        part = sum(
            rows[:, i : i + band, j : j + width] * kernel[i : i + 1, j : j + 1]
            for i in range(size)
            for j in range(size)
        )
        return jax.lax.dynamic_update_slice_in_dim(
            total, part.astype(x.dtype), index * band, axis=1
        )

    return jax.lax.fori_loop(0, bands, fill, jnp.zeros_like(x))


def _padded(x, size):
    pad = size // 2
    return jnp.pad(x.astype(jnp.float32), ((0, 0), (pad, pad), (pad, pad), (0, 0)))


def _shifted_sum_forward(x, kernel):
    return depthwise_as_shifted_sum(x, kernel), (x, kernel)


def _shifted_sum_backward(residuals, grad):
    """The map's gradient is the same sum with the filter turned round; the filter's goes by rows.

    It is summed over the images last, so that a batch split over devices stays split.
    """
    x, kernel = residuals
    size, width = kernel.shape[0], x.shape[2]
    padded, grad_rows = _padded(x, size), grad.astype(jnp.float32)

    def add_row(total, row):
        grad_row = jax.lax.dynamic_slice_in_dim(grad_rows, row, 1, axis=1)
        rows = jax.lax.dynamic_slice_in_dim(padded, row, size, axis=1)
        shifts = [(rows[:, :, j : j + width] * grad_row).sum(2) for j in range(size)]
        return total + jnp.stack(shifts, axis=2), None

    zeros = jnp.zeros((x.shape[0], size, size, x.shape[-1]), jnp.float32)
    total, _ = jax.lax.scan(add_row, zeros, jnp.arange(x.shape[1]))
    grad_kernel = total.sum(0)[:, :, None].astype(kernel.dtype)
    return depthwise_as_shifted_sum(grad, kernel[::-1, ::-1]).astype(x.dtype), grad_kernel


depthwise_as_shifted_sum.defvjp(_shifted_sum_forward, _shifted_sum_backward)
