"""GA-ConvNeXt: Gramian attention heads on ConvNeXt (Liu et al., CVPR 2022, arXiv:2201.03545).

Stage 4 is narrower than ConvNeXt's. All convolutions and linear layers start normal with deviation
0.02 and biases at 0.
"""

import dataclasses
from typing import Annotated, Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    DepthwiseConv,
    Mlp,
    conv,
    drop_path,
    drop_path_rates,
    layer_norm,
    layer_scale,
    normal_init,
    run_blocks,
    scaled,
    split_key,
)
from hybrid_flax.models.backbone import Family, ImageSize
from hybrid_flax.models.gramian.aggregation import Bottleneck, aggregate, tap_places
from hybrid_flax.models.gramian.heads import Head
from hybrid_flax.models.gramian.network import (
    GRAM_DIM,
    STRUCTURE,
    TINY_HEADS,
    GramianNet,
    Trunk,
    check_size,
    published,
)
from hybrid_flax.models.variants import Expected, several, whole

# Heads have a 32nd of its channels, and embed in 8 groups.
LAST_DIM = Expected("a multiple of 8 from 32", lambda x: whole(32).fits(x) and x % 8 == 0)
EPSILON = 1e-6  # of the trunk's and the gram layers' norms; the heads' own have 1e-5


@dataclasses.dataclass(frozen=True)
class Variant:
    """The numbers that define a GA-ConvNeXt."""

    dims: Annotated[tuple[int, int, int, int], several(4, whole(), LAST_DIM)]
    depths: tuple[int, int, int, int]
    taps: Annotated[int, whole(0)]  # outputs inside stage 3 that are aggregated too
    drop_path: float  # of stage 5 and the gram layers; the first block has 0, linear between
    gram_dim: Annotated[int, GRAM_DIM] = 192
    heads: int = 5


class Stem(nnx.Module):
    """Patches of 4×4 pixels to vectors, then a norm; [B, H, W, 3] → [B, ⌊H/4⌋, ⌊W/4⌋, C]."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = _patches(3, dim, 4, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(dim, epsilon=EPSILON, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H4 W4 C"]:
        return self.norm(self.conv(images))


def _patches(dim: int, out_dim: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    """A convolution whose stride is its size: rows and columns that fill no patch are dropped."""
    return conv(
        dim,
        out_dim,
        size,
        stride=size,
        padding=0,
        use_bias=True,
        kernel_init=normal_init,
        dtype=dtype,
        rngs=rngs,
    )


class Block(nnx.Module):
    """x + γ·MLP(norm(7×7 depthwise(x))); [B, H, W, C] → the same. γ starts at 1e-6."""

    def __init__(self, dim: int, drop_path_rate: float, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.depthwise = DepthwiseConv(
            dim, 7, use_bias=True, kernel_init=normal_init, dtype=dtype, rngs=rngs
        )
        self.norm = layer_norm(dim, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, 4 * dim, dtype=dtype, rngs=rngs)
        self.gamma = layer_scale(dim, 1e-6)
        self.drop_path_rate = drop_path_rate

    def __call__(
        self, x: Float[Array, "B H W C"], key: jax.Array | None = None
    ) -> Float[Array, "B H W C"]:
        branch = scaled(self.mlp(self.norm(self.depthwise(x))), self.gamma)
        return x + drop_path(branch, self.drop_path_rate, key)


class Downsampler(nnx.Module):
    """Norm, then patches of 2×2 places; [B, H, W, C] → [B, ⌊H/2⌋, ⌊W/2⌋, D]."""

    def __init__(self, dim: int, out_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = layer_norm(dim, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.conv = _patches(dim, out_dim, 2, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        return self.conv(self.norm(x))


class Stage(nnx.Module):
    """Blocks, one for each drop path rate; a head's gram layer is a stage of one."""

    def __init__(self, dim: int, rates: list[float], *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(dim, rate, dtype=dtype, rngs=rngs) for rate in rates])

    def __call__(
        self, x: Float[Array, "B H W C"], key: jax.Array | None = None
    ) -> Float[Array, "B H W C"]:
        return run_blocks(self.blocks, x, key)[-1]


class ConvNeXt(Trunk):
    """The trunk: stem, four stages, their aggregation, stage 5."""

    slack = (0, 15)

    def __init__(
        self, variant: Variant, image_size: ImageSize, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        check_size(image_size, 32, "GA-ConvNeXt")
        self.taps = tap_places(variant.depths[2], variant.taps)
        dims = variant.dims
        rates = drop_path_rates(variant.drop_path, (*variant.depths, 1))[:4]
        self.stem = Stem(dims[0], dtype=dtype, rngs=rngs)
        self.downsamplers = nnx.List(
            [Downsampler(dims[i], dims[i + 1], dtype=dtype, rngs=rngs) for i in range(3)]
        )
        self.stages = nnx.List([Stage(dims[i], rates[i], dtype=dtype, rngs=rngs) for i in range(4)])
        self.stage5 = Bottleneck(
            sum(dims) + variant.taps * dims[2],
            dims[3],
            dims[3] // 4,
            drop_path_rate=variant.drop_path,
            kernel_init=normal_init,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, images: Float[Array, "B H W 3"], train: bool = False, key: jax.Array | None = None
    ) -> dict[str, Float[Array, "..."]]:
        *stage_keys, last_key = split_key(key, 5)
        maps = {"stem": (x := self.stem(images))}
        taps = []
        for i, stage in enumerate(self.stages):
            x = self.downsamplers[i - 1](x) if i else x
            tapped = self.taps if i == 2 else ()
            outputs = run_blocks(stage.blocks, x, stage_keys[i], taps=tapped)
            maps[f"stage{i + 1}"] = x = outputs[-1]
            if i == 2:
                taps = [outputs[place] for place in self.taps]
        maps["aggregate"] = x = aggregate(maps, taps)
        maps["stage5_se"] = excited = self.stage5.excited(x, train)
        maps["stage5"] = self.stage5.residual(x, excited, train, last_key)
        return maps


class GAConvNeXt(GramianNet):
    """GA-ConvNeXt. Heights and widths from image_size to image_size + 15, each on its own.

    The official code is for 224 (to 239) only: it aggregates on a grid of 14×14 places. Here the
    grid follows `image_size`, a multiple of 32: image_size/16.
    """

    trunk_class = ConvNeXt
    structure = STRUCTURE._replace(
        blocks=r"trunk/stages/(\d+)/blocks/(\d+)/",
        opens_next_stage=r"trunk/downsamplers/(\d+)/",
        head_blocks=r"heads/\d+/gram_layer/blocks/\d+/",
    )

    def make_head(self, variant: Variant, num_classes: int, **options) -> Head:
        return Head(
            variant.dims[3],
            num_classes,
            gram_dim=variant.gram_dim,
            head_channels=variant.dims[3] // 32,
            gram_layer=Stage(variant.gram_dim, [variant.drop_path], **options),
            **options,
        )


def tiny(variant: Variant) -> dict[str, Any]:
    """Arguments of `create_model` for a model of a few small blocks, for tests."""
    return {"image_size": 32, "depths": (1, 1, 2, 1), "dims": (16, 16, 16, 32), **TINY_HEADS}


# ----------------------------------------------------------------------------- the published ones

VARIANTS = {
    "ga_convnext_t": Variant((96, 192, 384, 688), (3, 3, 9, 3), 2, 0.2),
    "ga_convnext_s": Variant((96, 192, 384, 688), (3, 3, 27, 3), 4, 0.4),
    "ga_convnext_b": Variant((128, 256, 512, 976), (3, 3, 27, 3), 4, 0.5),
    "ga_convnext_t_768": Variant((96, 192, 384, 768), (3, 3, 9, 3), 2, 0.2),
    "ga_convnext_s_768": Variant((96, 192, 384, 768), (3, 3, 27, 3), 4, 0.4),
    "ga_convnext_b_1024": Variant((128, 256, 512, 1024), (3, 3, 27, 3), 4, 0.5),
}

# Parameters counted on the official models. Top-1 and FLOPs as the authors' README prints them; it
# does not say for which width, and no width has exactly its parameters (48.7, 70.4 and 124.3
# million). They stand at the nearest; for the other width nothing is published.
PUBLISHED = {
    "ga_convnext_t": published(83.2, 47_821_324, 6.3),
    "ga_convnext_s": published(83.9, 70_116_364, 10.5),
    "ga_convnext_b": published(84.3, 123_688_396, 19.0),
    "ga_convnext_t_768": published(None, 54_354_584, None),
    "ga_convnext_s_768": published(None, 76_726_424, None),
    "ga_convnext_b_1024": published(None, 128_839_176, None),
}

FAMILY = Family(GAConvNeXt, VARIANTS, PUBLISHED, tiny)
