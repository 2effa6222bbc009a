"""GA-ResNet50: Gramian attention heads on ResNet-50 (He et al., CVPR 2016, arXiv:1512.03385).

A reconstruction: the authors published results for it, but no code and no weights. Known are its
rounded counts: 22.4 million parameters with one head, 41.3 with five, 5.2 GFLOPs; this model has
22.385 and 41.345 million, 5.19 GFLOPs. All of the following is inferred from them: a last stage of
200 planes (800 channels) in place of 512; three taps of stage 3, and the aggregation as in
GA-ConvNeXt; stage 5 without squeeze-excite; heads without a gram layer, otherwise GA-ConvNeXt's.
Other settings may meet them too. Strides are in the 3×3 convolutions, as is usual today.

The trunk's convolutions start normal with deviation √(2/fan-out), as He et al. have it; stage 5 and
heads as in GA-ConvNeXt.
"""

import dataclasses
from typing import Annotated, Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    BatchNorm,
    Options,
    conv,
    drop_path_rates,
    normal_init,
    run_blocks,
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
from hybrid_flax.models.variants import multiple_of, several, whole

he_init = jax.nn.initializers.variance_scaling(2, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class Variant:
    """The numbers that define a GA-ResNet."""

    # Planes of the bottlenecks; stages have four times as many. Heads have a 32nd of the last's.
    widths: Annotated[tuple[int, int, int, int], several(4, whole(), multiple_of(8))]
    depths: tuple[int, int, int, int]
    taps: Annotated[int, whole(0)]  # outputs inside stage 3 that are aggregated too
    drop_path: float  # of the last block and stage 5; the first block has 0, linear between
    gram_dim: Annotated[int, GRAM_DIM] = 192
    heads: int = 5


class Stem(nnx.Module):
    """7×7 convolution, batch norm, ReLU, max-pool; [B, H, W, 3] → [B, ⌈H/4⌉, ⌈W/4⌉, 64]."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = conv(3, dim, 7, stride=2, kernel_init=he_init, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(dim, dtype=dtype)

    def __call__(
        self, images: Float[Array, "B H W 3"], train: bool = False
    ) -> Float[Array, "B H4 W4 C"]:
        x = jax.nn.relu(self.norm(self.conv(images), train))
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class ResNet(Trunk):
    """The trunk: stem, four stages of bottlenecks, their aggregation, stage 5."""

    slack = (15, 0)

    def __init__(
        self, variant: Variant, image_size: ImageSize, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        check_size(image_size, 32, "GA-ResNet")
        self.taps = tap_places(variant.depths[2], variant.taps)
        options: Options = {"dtype": dtype, "rngs": rngs}
        dim = variant.widths[0]
        self.stem = Stem(dim, **options)
        stages: list[nnx.List] = []
        rates = drop_path_rates(variant.drop_path, variant.depths)
        for stage_rates, width in zip(rates, variant.widths, strict=True):
            blocks = []
            for place, rate in enumerate(stage_rates):
                block = Bottleneck(
                    dim,
                    4 * width,
                    width,
                    stride=2 if stages and place == 0 else 1,
                    squeeze_excite=False,
                    shortcut_bias=False,
                    drop_path_rate=rate,
                    kernel_init=he_init,
                    **options,
                )
                blocks.append(block)
                dim = 4 * width
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.stage5 = Bottleneck(
            4 * sum(variant.widths) + variant.taps * 4 * variant.widths[2],
            dim,
            dim // 4,
            squeeze_excite=False,
            drop_path_rate=variant.drop_path,
            kernel_init=normal_init,
            **options,
        )

    def __call__(
        self, images: Float[Array, "B H W 3"], train: bool = False, key: jax.Array | None = None
    ) -> dict[str, Float[Array, "..."]]:
        *stage_keys, last_key = split_key(key, 5)
        maps = {"stem": (x := self.stem(images, train))}
        taps = []
        for i, blocks in enumerate(self.stages):
            tapped = self.taps if i == 2 else ()
            outputs = run_blocks(blocks, x, stage_keys[i], train, taps=tapped)
            if i == 2:
                taps = [outputs[place] for place in self.taps]
            maps[f"stage{i + 1}"] = x = outputs[-1]
        maps["aggregate"] = x = aggregate(maps, taps)
        maps["stage5"] = self.stage5(x, train, last_key)
        return maps


class GAResNet(GramianNet):
    """GA-ResNet50, a reconstruction. Heights and widths from image_size - 15 to image_size."""

    trunk_class = ResNet
    structure = STRUCTURE

    def make_head(self, variant: Variant, num_classes: int, **options) -> Head:
        dim = 4 * variant.widths[3]
        return Head(dim, num_classes, gram_dim=variant.gram_dim, head_channels=dim // 32, **options)


def tiny(variant: Variant) -> dict[str, Any]:
    """Arguments of `create_model` for a model of a few small blocks, for tests."""
    return {"image_size": 32, "depths": (1, 1, 2, 1), "widths": (8, 8, 8, 8), **TINY_HEADS}


# ----------------------------------------------------------------------------- the published one

VARIANTS = {"ga_resnet50": Variant((64, 128, 256, 200), (3, 4, 6, 3), 3, 0.1)}

# Parameters of this reconstruction (published: 41.3 million); top-1 and FLOPs as the authors'
# README prints them. Drop path is our choice.
PUBLISHED = {"ga_resnet50": published(82.5, 41_344_776, 5.2)}

FAMILY = Family(GAResNet, VARIANTS, PUBLISHED, tiny)
