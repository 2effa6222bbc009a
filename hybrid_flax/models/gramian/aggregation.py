"""Between the stages and the heads: all stages on one grid, and the bottleneck that mixes them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.errors import InputError
from hybrid_flax.layers import (
    BatchNorm,
    BiasedOptions,
    KernelOptions,
    PointwiseConv,
    adaptive_average_pool,
    conv,
    drop_path,
)


def tap_places(depth: int, taps: int) -> tuple[int, ...]:
    """The blocks of stage 3 (from 0) whose outputs are aggregated, besides the last one's.

    With n blocks and t taps: after every ⌊n/(t + 1)⌋-th block, until there are t.
    """
    step = depth // (taps + 1)
    if not step:
        raise InputError(
            f"depths[2]={depth}: {taps} taps of stage 3 need at least {taps + 1} blocks. "
            "Use more blocks or fewer taps"
        )
    return tuple(step * tap - 1 for tap in range(1, taps + 1))


def aggregate(
    maps: Mapping[str, Array], taps: list[Float[Array, "B H W _"]]
) -> Float[Array, "B H W _D"]:
    """`stage1` to `stage4` and the taps of stage 3 side by side, on the grid of stage 3.

    Stages 1 and 2 are averaged down, the taps and stage 3 stay, stage 4 is doubled bilinearly
    with half-pixel centres (PyTorch's align_corners=False: outside the map its edge goes on).
    """
    batch, height, width, channels = maps["stage4"].shape
    height, width = 2 * height, 2 * width
    pooled = [adaptive_average_pool(maps[name], height, width) for name in ("stage1", "stage2")]
    doubled = jax.image.resize(maps["stage4"], (batch, height, width, channels), "bilinear")
    return jnp.concatenate([*pooled, *taps, maps["stage3"], doubled], axis=-1)


class SqueezeExcite(nnx.Module):
    """Scales every channel of a map by a gate computed from the map's mean (with ReLU inside).

    Inside the gate are C/4 channels, rounded to a multiple of 8: 172 → 40.
    """

    def __init__(self, dim: int, *, kernel_init: Initializer, dtype: DTypeLike, rngs: nnx.Rngs):
        inner = max(8, (dim // 4 + 4) // 8 * 8)
        options: BiasedOptions = {
            "use_bias": True,
            "kernel_init": kernel_init,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.reduce = PointwiseConv(dim, inner, **options)
        self.expand = PointwiseConv(inner, dim, **options)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        mean = x.mean((1, 2), keepdims=True, dtype=jnp.float32)
        return x * jax.nn.sigmoid(self.expand(jax.nn.relu(self.reduce(mean))))


class Bottleneck(nnx.Module):
    """1×1, 3×3 (with the stride), 1×1 convolutions with batch norms, plus a shortcut, then ReLU.

    [B, H, W, C] → [B, ⌈H/stride⌉, ⌈W/stride⌉, D]. The shortcut is the identity where the shape
    allows it, else a 1×1 convolution and a batch norm. As stage 5 it has squeeze-excite and a bias
    in the shortcut's convolution, as a ResNet's block neither.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        width: int,
        *,
        stride: int = 1,
        squeeze_excite: bool = True,
        shortcut_bias: bool = True,
        drop_path_rate: float,
        kernel_init: Initializer,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: KernelOptions = {"kernel_init": kernel_init, "dtype": dtype, "rngs": rngs}
        self.conv1 = PointwiseConv(dim, width, **options)
        self.norm1 = BatchNorm(width, dtype=dtype)
        self.conv2 = conv(width, width, 3, stride=stride, **options)
        self.norm2 = BatchNorm(width, dtype=dtype)
        self.se = SqueezeExcite(width, **options) if squeeze_excite else None
        self.conv3 = PointwiseConv(width, out_dim, **options)
        self.norm3 = BatchNorm(out_dim, dtype=dtype)
        self.has_shortcut = stride > 1 or dim != out_dim
        if self.has_shortcut:
            self.shortcut = PointwiseConv(dim, out_dim, use_bias=shortcut_bias, **options)
            self.shortcut_norm = BatchNorm(out_dim, dtype=dtype)
        self.stride = stride
        self.drop_path_rate = drop_path_rate

    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False, key: jax.Array | None = None
    ) -> Float[Array, "B H2 W2 D"]:
        return self.residual(x, self.excited(x, train), train, key)

    def excited(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B H2 W2 w"]:
        """The first half: up to squeeze-excite."""
        branch = jax.nn.relu(self.norm1(self.conv1(x), train))
        branch = jax.nn.relu(self.norm2(self.conv2(branch), train))
        return branch if self.se is None else self.se(branch)

    def residual(
        self,
        x: Float[Array, "B H W C"],
        excited: Float[Array, "B H2 W2 w"],
        train: bool = False,
        key: jax.Array | None = None,
    ) -> Float[Array, "B H2 W2 D"]:
        """The second half: the last convolution, drop path, the shortcut."""
        branch = drop_path(self.norm3(self.conv3(excited), train), self.drop_path_rate, key)
        if self.has_shortcut:
            x = self.shortcut_norm(self.shortcut(x[:, :: self.stride, :: self.stride]), train)
        return jax.nn.relu(x + branch)
