"""GA-CSWin: Gramian attention heads on CSWin (Dong et al., CVPR 2022, arXiv:2107.00652).

Attention inside stripes of the map: half of the channels see vertical stripes, the other half
horizontal ones. The official code has the class but none of its models: depths are those in the
names it mentions, heads and stripes those of the public CSWin-T and -S, all else its defaults.

Convolutions start as PyTorch's do, linear layers normal with deviation 0.02 and biases at 0.
"""

import dataclasses
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    DepthwiseConv,
    Mlp,
    Options,
    PointwiseConv,
    conv,
    drop_path,
    drop_path_rates,
    layer_norm,
    linear,
    run_blocks,
    split_key,
    window_attention,
)
from hybrid_flax.layers.convolutions import pytorch_init
from hybrid_flax.models.backbone import Family, ImageSize
from hybrid_flax.models.gramian.aggregation import Bottleneck, aggregate, tap_places
from hybrid_flax.models.gramian.heads import Head
from hybrid_flax.models.gramian.network import (
    STRUCTURE,
    TINY_HEADS,
    GramianNet,
    Trunk,
    check_size,
    published,
)
from hybrid_flax.models.variants import multiple_of, one_of, whole

HEAD_DIM = 32


@dataclasses.dataclass(frozen=True)
class Variant:
    """The numbers that define a GA-CSWin. Heads are 32 channels wide in all of them."""

    depths: tuple[int, int, int, int]
    drop_path: float  # of the last block, stage 5 and the gram layers; linear from 0
    dim: Annotated[int, multiple_of(2 * HEAD_DIM)] = (
        64  # channels of stage 1; each stage doubles them
    )
    splits: tuple[int, int, int] = (1, 2, 7)  # stripe widths; stage 5 and the heads as stage 3
    taps: Annotated[int, whole(0)] = 4  # outputs inside stage 3 that are aggregated too
    stage5: Annotated[str, one_of("block", "bottleneck")] = "block"  # the other: GA-ConvNeXt's
    gram_dim: Annotated[int, multiple_of(2 * HEAD_DIM)] = 192
    heads: int = 5


class Stem(nnx.Module):
    """Three 3×3 convolutions with norms, GELU between; [B, H, W, 3] → [B, H/4, W/4, C]."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.convs = nnx.List(
            [
                conv(channels, dim, 3, stride=stride, dtype=dtype, rngs=rngs)
                for channels, stride in ((3, 2), (dim, 1), (dim, 2))
            ]
        )
        self.norms = nnx.List([layer_norm(dim, dtype=dtype, rngs=rngs) for _ in range(3)])

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H4 W4 C"]:
        x = self.norms[0](self.convs[0](images))
        x = self.norms[1](self.convs[1](jax.nn.gelu(x, approximate=False)))
        return self.norms[2](self.convs[2](jax.nn.gelu(x, approximate=False)))


class ConvNorm(nnx.Module):
    """Convolution, then norm. Between stages 3×3 with stride 2, before stage 5 1×1."""

    def __init__(self, convolution: nnx.Module, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = convolution
        self.norm = layer_norm(dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); [B, H, W, C] → the same.

    `split` is the width of the stripes; None: no stripes, the whole map is one window. To every
    stripe's attention LePE is added: a 3×3 depthwise convolution of its values that sees zeros
    beyond its border.
    """

    def __init__(
        self,
        dim: int,
        split: int | None,
        drop_path_rate: float,
        implementation: str,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.branches = 1 if split is None else 2
        self.split = split
        self.implementation = implementation
        self.dtype = dtype
        self.norm1 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.qkv = linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.lepe = nnx.List(
            [
                DepthwiseConv(dim // self.branches, 3, use_bias=True, dtype=dtype, rngs=rngs)
                for _ in range(self.branches)
            ]
        )
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, 4 * dim, dtype=dtype, rngs=rngs)
        self.drop_path_rate = drop_path_rate

    def __call__(
        self, x: Float[Array, "B H W C"], key: jax.Array | None = None
    ) -> Float[Array, "B H W C"]:
        keys = split_key(key, 2)
        branch = self.proj(jnp.concatenate(self.attend(x), axis=-1))
        x = x + drop_path(branch, self.drop_path_rate, keys[0])
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, keys[1])

    def attend(self, x: Float[Array, "B H W C"]) -> list[Float[Array, "B H W half"]]:
        """Attention of the vertical stripes, then of the horizontal ones; or of the whole map."""
        _, height, width, dim = x.shape
        if self.split is None:
            windows = [(height, width)]
        else:
            windows = [(height, self.split), (self.split, width)]
        x, heads, maps = self.norm1(x), dim // HEAD_DIM // self.branches, []
        for i, window in enumerate(windows):
            # Each branch projects for itself: its query, key and value come packed, uncopied.
            kernel = self.branch(self.qkv.kernel[...], i)
            bias = self.branch(self.qkv.bias[...], i)  # type: ignore[index]  # it has one
            qkv = x @ kernel + bias.reshape(1, 1, 1, -1)
            out = window_attention(
                qkv.reshape(*x.shape[:3], 3, heads, HEAD_DIM),
                window=window,
                local_kernel=self.lepe[i].kernel[...].reshape(3, 3, heads, HEAD_DIM),
                implementation=self.implementation,
            )
            lepe_bias = self.lepe[i].bias[...].astype(out.dtype)  # type: ignore[index]  # it has one
            maps.append(out.reshape(*x.shape[:3], -1) + lepe_bias.reshape(1, 1, 1, -1))
        return maps

    def branch(self, parameter: Float[Array, "..."], index: int) -> Float[Array, "..."]:
        """Cuts out what one branch has of `qkv`'s kernel or bias, along the last axis."""
        parts = parameter.reshape(*parameter.shape[:-1], 3, self.branches, -1)[..., index, :]
        return parts.reshape(*parameter.shape[:-1], -1).astype(self.dtype)


class AggregatedBlock(nnx.Module):
    """Stage 5, "block": 1×1 convolution, norm, a block with the stripes of stage 3."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        split: int,
        drop_path_rate: float,
        implementation: str,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        mix = PointwiseConv(dim, out_dim, use_bias=True, dtype=dtype, rngs=rngs)
        self.mix = ConvNorm(mix, out_dim, dtype=dtype, rngs=rngs)
        self.block = Block(out_dim, split, drop_path_rate, implementation, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False, key: jax.Array | None = None
    ) -> Float[Array, "B H W D"]:
        return self.block(self.mix(x), key)


class CSWin(Trunk):
    """The trunk: stem, four stages, their aggregation, stage 5."""

    def __init__(
        self,
        variant: Variant,
        image_size: ImageSize,
        *,
        implementation: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        splits = variant.splits
        step = math.lcm(32, 4 * splits[0], 8 * splits[1], 16 * splits[2])
        check_size(
            image_size,
            step,
            f"GA-CSWin with stripes of {splits[0]}, {splits[1]} and {splits[2]} places (splits)",
        )
        self.taps = tap_places(variant.depths[2], variant.taps)
        options: Options = {"dtype": dtype, "rngs": rngs}
        dims = [variant.dim * 2**i for i in range(4)]
        rates = drop_path_rates(variant.drop_path, variant.depths)
        self.stem = Stem(dims[0], **options)
        self.merges = nnx.List(
            [
                ConvNorm(
                    conv(dim, 2 * dim, 3, stride=2, use_bias=True, **options), 2 * dim, **options
                )
                for dim in dims[:3]
            ]
        )
        self.stages = nnx.List(
            [
                nnx.List(
                    [Block(dim, split, rate, implementation, **options) for rate in stage_rates]
                )
                for dim, split, stage_rates in zip(dims, (*splits, None), rates, strict=True)
            ]
        )
        aggregated = sum(dims) + variant.taps * dims[2]
        self.stage5: AggregatedBlock | Bottleneck
        if variant.stage5 == "block":
            self.stage5 = AggregatedBlock(
                aggregated, dims[3], splits[2], variant.drop_path, implementation, **options
            )
        else:
            self.stage5 = Bottleneck(
                aggregated,
                dims[3],
                dims[3] // 4,
                drop_path_rate=variant.drop_path,
                kernel_init=pytorch_init,
                **options,
            )

    def __call__(
        self, images: Float[Array, "B H W 3"], train: bool = False, key: jax.Array | None = None
    ) -> dict[str, Float[Array, "..."]]:
        """Also `mergeN`, between stages, and `s1b0_stripesI`, the first block's branches."""
        *stage_keys, last_key = split_key(key, 5)
        maps = {"stem": (x := self.stem(images))}
        for i, branch in enumerate(self.stages[0][0].attend(x)):
            maps[f"s1b0_stripes{i}"] = branch
        taps = []
        for i, blocks in enumerate(self.stages):
            if i:
                maps[f"merge{i}"] = x = self.merges[i - 1](x)
            outputs = run_blocks(blocks, x, stage_keys[i], taps=self.taps if i == 2 else ())
            if i == 2:
                taps = [outputs[place] for place in self.taps]
            maps[f"stage{i + 1}"] = x = outputs[-1]
        maps["aggregate"] = aggregate(maps, taps)
        maps["stage5"] = self.stage5(maps["aggregate"], train, last_key)
        return maps


class GACSWin(GramianNet):
    """GA-CSWin. Heights and widths of image_size only.

    The official code is for 224 only: it aggregates on a grid of 14×14 places. Here the grid
    follows `image_size`, which must let the stripes divide every map: a multiple of 224, or less
    with narrower stripes (`splits`).
    """

    trunk_class = CSWin
    structure = STRUCTURE._replace(opens_next_stage=r"trunk/merges/(\d+)/")
    has_kernels = True

    def make_head(
        self, variant: Variant, num_classes: int, *, implementation: str = "auto", **options: Any
    ) -> Head:
        dim = 8 * variant.dim
        return Head(
            dim,
            num_classes,
            gram_dim=variant.gram_dim,
            head_channels=dim // 32,
            contraction_groups=8,
            mlp_groups=2,
            gram_layer=Block(
                variant.gram_dim,
                variant.splits[2],
                variant.drop_path,
                implementation,
                **options,
            ),
            kernel_init=pytorch_init,
            **options,
        )


def tiny(variant: Variant) -> dict[str, Any]:
    """Arguments of `create_model` for a model of a few small blocks, for tests."""
    return {
        "image_size": 64,
        "depths": (1, 1, 2, 1),
        "splits": (1, 2, 2),
        **TINY_HEADS,
        "gram_dim": 64,
    }


# ----------------------------------------------------------------------------- the published ones

VARIANTS = {
    "ga_cswin_t": Variant((1, 2, 21, 1), 0.2),
    "ga_cswin_s": Variant((2, 4, 32, 2), 0.4),
}

# Parameters counted on the official class as above; the published counts, 42.0 and 54.3 million,
# lie between its two stages 5. Top-1 and FLOPs as the authors' README prints them.
PUBLISHED = {
    "ga_cswin_t": published(84.1, 43_431_816, 6.1),
    "ga_cswin_s": published(84.7, 55_754_568, 8.7),
}

FAMILY = Family(GACSWin, VARIANTS, PUBLISHED, tiny)
