"""The unified models of "Demystify Transformers & Convolutions in Modern Image Deep Networks".

(Hu et al., TPAMI 2025, arXiv:2211.05781.) One frame for everything but the operation that moves
information between places, the token mixer, so that models differ in nothing else. An image meets,
in this order: `Stem`, four times a `Stage` (its `Downsampler`, its `Block`s, its norm), `ConvHead`,
the mean over the map, the classifier. The mixers are in the files beside this one; a new one is
one file and one line of `MIXERS`.

What is unusual: every stage ends in a norm whose output is what the next stage receives. Without a
classifier, as the trunk of a detector (`detection=True`), there are no norms between stages; each
stage's output goes on as it is, and a normed copy of it is what the detector gets.

Shapes: B images, H×W map, C channels.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.errors import InputError
from hybrid_flax.layers import (
    BatchNorm,
    BiasedOptions,
    Mlp,
    PointwiseConv,
    conv,
    drop_path,
    drop_path_rates,
    layer_norm,
    layer_scale,
    linear,
    normal_init,
    run_blocks,
    scaled,
    split_key,
)
from hybrid_flax.models.backbone import Backbone, Family, ImageSize, Maps, sides, square
from hybrid_flax.models.info import EvalTransform, ModelInfo
from hybrid_flax.models.structure import Structure
from hybrid_flax.models.unified import deformable, halo, pvt, swin
from hybrid_flax.models.unified.deformable import DeformableConv
from hybrid_flax.models.unified.depthwise import DepthwiseMixer
from hybrid_flax.models.unified.halo import HaloAttention
from hybrid_flax.models.unified.mixer import Mixer, Place
from hybrid_flax.models.unified.pvt import SpatialReductionAttention
from hybrid_flax.models.unified.swin import ShiftedWindowAttention
from hybrid_flax.models.variants import key_of

MIXERS: dict[str, type[Mixer]] = {
    "halonet": HaloAttention,
    "pvt": SpatialReductionAttention,
    "swin": ShiftedWindowAttention,
    "convnext": DepthwiseMixer,
    "internimage": DeformableConv,
}
# Why images of some size cannot be taken, where a mixer does not take all.
REFUSALS: dict[str, Callable[[int, int, int, bool], str | None]] = {
    "halonet": halo.refusal,
    "pvt": pvt.refusal,
    "swin": swin.refusal,
    "internimage": deformable.refusal,
}
EPSILON = 1e-6  # of the norms between blocks
LAYER_SCALE = 1e-6  # initial γ


@dataclasses.dataclass(frozen=True)
class Variant:
    """The numbers that define a unified model."""

    mixer: Annotated[str, key_of(MIXERS)]
    dims: tuple[int, int, int, int]  # channels of each stage
    depths: tuple[int, int, int, int]  # blocks of each stage
    drop_path: float  # rate of the last block; the first has 0, linear between
    mlp_ratios: tuple[int, int, int, int] = (4, 4, 4, 4)
    # The trunk of a detector. The authors train it with a drop path of 0.1 (micro), 0.2 (tiny,
    # small) or 0.3 (base).
    detection: bool = False


class Stem(nnx.Module):
    """Two strided convolutions with norms; [B, H, W, 3] → [B, ⌈H/4⌉, ⌈W/4⌉, C]."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        options: BiasedOptions = {
            "use_bias": True,
            "kernel_init": normal_init,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.conv1 = conv(3, dim // 2, 3, stride=2, **options)
        self.norm1 = layer_norm(dim // 2, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.conv2 = conv(dim // 2, dim, 3, stride=2, **options)
        self.norm2 = layer_norm(dim, epsilon=EPSILON, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H4 W4 C"]:
        x = jax.nn.gelu(self.norm1(self.conv1(images)), approximate=False)
        return self.norm2(self.conv2(x))


class Downsampler(nnx.Module):
    """Strided convolution → norm; [B, H, W, C] → [B, ⌈H/2⌉, ⌈W/2⌉, K]."""

    def __init__(self, dim: int, out_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = conv(dim, out_dim, 3, stride=2, kernel_init=normal_init, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(out_dim, epsilon=EPSILON, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 K"]:
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """x + γ1·mixer(norm(x)), then x + γ2·MLP(norm(x)); [B, H, W, C] → the same.

    Positions that the mixer adds to x stay in x; in a detector's trunk only the mixer sees them.
    """

    def __init__(
        self,
        mixer: type[Mixer],
        dim: int,
        place: Place,
        *,
        mlp_ratio: int,
        drop_path_rate: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(dim, epsilon=mixer.norm_epsilon, dtype=dtype, rngs=rngs)
        self.mixer = mixer(dim, place, dtype=dtype, rngs=rngs)
        self.gamma1 = layer_scale(dim, LAYER_SCALE)
        self.norm2 = layer_norm(dim, epsilon=mixer.norm_epsilon, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, dim * mlp_ratio, dtype=dtype, rngs=rngs)
        self.gamma2 = layer_scale(dim, LAYER_SCALE)
        self.keeps_positions = not place.detection
        self.drop_path_rate = drop_path_rate

    def __call__(
        self, x: Float[Array, "B H W C"], key: jax.Array | None = None
    ) -> Float[Array, "B H W C"]:
        keys = split_key(key, 2)
        placed = self.mixer.add_positions(x)
        x = placed if self.keeps_positions else x
        mixed = self.mixer(self.norm1(placed)).astype(x.dtype)  # some of JAX's poolings widen it
        branch = scaled(mixed, self.gamma1)
        x = x + drop_path(branch, self.drop_path_rate, keys[0])
        branch = scaled(self.mlp(self.norm2(x)), self.gamma2)
        return x + drop_path(branch, self.drop_path_rate, keys[1])


class Stage(nnx.Module):
    """Downsampler (not in the first stage), blocks, norm."""

    def __init__(
        self,
        variant: Variant,
        stage: int,
        side: int,
        drop_path_rates: list[float],
        *,
        implementation: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        dim = variant.dims[stage]
        self.is_first = stage == 0
        if not self.is_first:
            self.downsample = Downsampler(variant.dims[stage - 1], dim, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [
                Block(
                    MIXERS[variant.mixer],
                    dim,
                    Place(stage, index, side, variant.detection, implementation),
                    mlp_ratio=variant.mlp_ratios[stage],
                    drop_path_rate=rate,
                    dtype=dtype,
                    rngs=rngs,
                )
                for index, rate in enumerate(drop_path_rates)
            ]
        )
        self.norm = layer_norm(dim, epsilon=EPSILON, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"], key: jax.Array | None = None):
        """Returns (blocks' output, the same after the norm), both [B, H', W', C']."""
        if not self.is_first:
            x = self.downsample(x)
        *_, x = run_blocks(self.blocks, x, key)
        return x, self.norm(x)


class ConvHead(nnx.Module):
    """1×1 convolution → batch norm → GELU; [B, H, W, C] → [B, H, W, K]."""

    def __init__(self, dim: int, out_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = PointwiseConv(dim, out_dim, kernel_init=normal_init, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(out_dim, dtype=dtype)

    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W K"]:
        return jax.nn.gelu(self.norm(self.conv(x), train), approximate=False)


class Unified(Backbone):
    """Images [B, H, W, 3], normalised, to logits [B, num_classes] in float32.

    Which image sizes a classifier takes depends on its mixer: convnext any, internimage multiples
    of 32, pvt the size it is built for, halonet and swin multiples of 224 (these three also up to 3
    pixels less). With `detection=True` there is no classifier, and images may have any size, with
    internimage multiples of 32. The maps of `features` are normed.
    """

    structure = Structure(
        stem=r"stem/",
        opens_stage=r"stages/(\d+)/downsample/",
        blocks=r"stages/(\d+)/blocks/(\d+)/",
        closes_stage=r"stages/(\d+)/norm/",
        end=r"conv_head/|head/",
    )
    has_kernels = True
    dense_map = "conv_head"

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int,
        image_size: ImageSize,
        dtype: DTypeLike,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ):
        mixer = MIXERS[variant.mixer]
        _check_dims(variant, mixer)
        if mixer.needs_square:
            image_size = square(image_size, f"a unified model with the mixer {variant.mixer}")
        if implementation != "auto" and not mixer.has_kernels:
            raise InputError(
                f"implementation={implementation!r}: the mixer {variant.mixer} has no operation "
                "with kernels to choose for; leave it 'auto'"
            )
        self.variant = variant
        self.detection = variant.detection
        if variant.detection:
            self.feature_maps = ("out1", "out2", "out3", "out4")
        self.image_size = image_size
        self.dtype = dtype
        if reason := self.refusal(*sides(image_size)):
            raise InputError(f"image_size={image_size}: {reason}")

        self.stem = Stem(variant.dims[0], dtype=dtype, rngs=rngs)
        rates = drop_path_rates(variant.drop_path, variant.depths)
        self.stages = nnx.List(
            [
                Stage(
                    variant,
                    i,
                    min(sides(image_size)) // (4 * 2**i),
                    rates[i],
                    implementation=implementation,
                    dtype=dtype,
                    rngs=rngs,
                )
                for i in range(4)
            ]
        )
        if not variant.detection:
            last, wide = variant.dims[-1], variant.dims[-1] * 3 // 2
            self.conv_head = ConvHead(last, wide, dtype=dtype, rngs=rngs)
        self.num_classes = 0 if variant.detection else num_classes
        if self.num_classes:
            self.head = linear(wide, num_classes, dtype=jnp.float32, rngs=rngs)

    def classify(self, x: Float[Array, "*B C"]) -> Float[Array, "*B classes"]:
        return self.head(x)

    def maps(self, x: Float[Array, "B H W 3"], train: bool, key: jax.Array | None) -> Maps:
        """Computes every named map on the way, in order; NHWC.

        `stem`; for stage 1 to 4 `stageN_blocks` and `stageN`, before and after its norm;
        `conv_head`; `pooled` [B, 1.5C]; `logits` [B, num_classes]. With `detection=True` `stem`;
        for stage 1 to 4 `stageN` and `outN`, before and after its norm.
        """
        keys = split_key(key, 4)
        maps = {"stem": (x := self.stem(x))}
        for i, stage in enumerate(self.stages, start=1):
            blocks, normed = stage(x, keys[i - 1])
            if self.detection:
                x = maps[f"stage{i}"] = blocks
                maps[f"out{i}"] = normed
            else:
                maps[f"stage{i}_blocks"] = blocks
                x = maps[f"stage{i}"] = normed
        if not self.detection:
            maps["conv_head"] = self.conv_head(x, train)
            maps["pooled"] = maps["conv_head"].mean((1, 2), dtype=jnp.float32)
        if self.num_classes:
            maps["logits"] = self.head(maps["pooled"])
        return maps

    def refusal(self, height: int, width: int) -> str | None:
        variant = self.variant
        if min(height, width) < 1:
            return "images have at least one pixel"
        refusal = REFUSALS.get(variant.mixer)
        if refusal is None:
            return None
        return refusal(height, width, min(sides(self.image_size)), variant.detection)


def _check_dims(variant: Variant, mixer: type[Mixer]) -> None:
    units = tuple(math.lcm(unit, 2) if i == 0 else unit for i, unit in enumerate(mixer.widths))
    if any(dim % unit for dim, unit in zip(variant.dims, units, strict=True)):
        raise InputError(
            f"dims={variant.dims}: expected multiples of {units}, stage by stage: the heads or "
            f"groups of the mixer {variant.mixer}, and half of the first in the stem"
        )


def tiny(variant: Variant) -> dict[str, Any]:
    """Arguments of `create_model` for a model of a few small blocks, for tests."""
    if variant.mixer in ("halonet", "swin"):  # whose windows need 7×7 places in every stage
        return {"image_size": 224, "depths": (1, 1, 1, 1), "dims": (32, 32, 32, 32)}
    return {
        "image_size": 32,
        "depths": (1, 1, 1, 1),
        "dims": (32, 32, 80, 64),
        "mlp_ratios": (2, 2, 2, 2),
    }


# ------------------------------------------------------------------------------- the released ones

_MICRO, _TINY, _BASE = (32, 64, 128, 256), (96, 192, 384, 768), (128, 256, 512, 1024)
_PVT = (64, 128, 320, 512)

VARIANTS = {
    "unified_halonet_micro": Variant("halonet", _MICRO, (2, 2, 9, 2), 0.0),
    "unified_halonet_tiny": Variant("halonet", _TINY, (2, 2, 6, 2), 0.2),
    "unified_halonet_small": Variant("halonet", _TINY, (2, 2, 18, 2), 0.3),
    "unified_halonet_base": Variant("halonet", _BASE, (2, 2, 18, 2), 0.5),
    "unified_pvt_micro": Variant("pvt", (32, 64, 160, 256), (2, 2, 3, 2), 0.0, (8, 8, 4, 4)),
    "unified_pvt_tiny": Variant("pvt", _PVT, (3, 4, 9, 3), 0.1, (8, 8, 4, 4)),
    "unified_pvt_small": Variant("pvt", _PVT, (3, 4, 21, 3), 0.3, (8, 8, 4, 4)),
    "unified_pvt_base": Variant("pvt", _PVT, (3, 8, 45, 3), 0.5),
    "unified_swin_micro": Variant("swin", _MICRO, (2, 2, 9, 2), 0.0),
    "unified_swin_tiny": Variant("swin", _TINY, (2, 2, 6, 2), 0.2),
    "unified_swin_small": Variant("swin", _TINY, (2, 2, 18, 2), 0.3),
    "unified_swin_base": Variant("swin", _BASE, (2, 2, 18, 2), 0.5),
    "unified_convnext_micro": Variant("convnext", _MICRO, (3, 3, 8, 3), 0.0),
    "unified_convnext_tiny": Variant("convnext", _TINY, (2, 2, 9, 2), 0.1),
    "unified_convnext_small": Variant("convnext", _TINY, (2, 2, 24, 2), 0.4),
    "unified_convnext_base": Variant("convnext", _BASE, (2, 2, 24, 2), 0.5),
    "unified_internimage_micro": Variant("internimage", _MICRO, (2, 2, 9, 2), 0.0),
    "unified_internimage_tiny": Variant("internimage", (64, 128, 256, 512), (4, 4, 18, 4), 0.1),
    "unified_internimage_small": Variant("internimage", (80, 160, 320, 640), (4, 4, 21, 4), 0.3),
    "unified_internimage_base": Variant("internimage", (112, 224, 448, 896), (4, 4, 21, 4), 0.5),
}

_RELEASES = "https://github.com/OpenGVLab/STM-Evaluation/releases"

# Top-1 as the authors' README prints it. It prints no FLOPs for most of them; these, like the
# parameters, were counted on the official models. The deformable sampling itself is not in them.
PUBLISHED = {
    name: ModelInfo(
        paper="Demystify Transformers & Convolutions, arXiv:2211.05781",
        top1=top1,
        parameters=parameters,
        gflops=gflops,
        image_size=224,
        eval_transform=EvalTransform(0.875, "center", "bicubic"),
        trained_on="ImageNet-1k",
        release_file=f"{name}.pth",
        release_page=f"{_RELEASES}/tag/cls-ckpt",
        licence="MIT",
        download_url=f"{_RELEASES}/download/cls-ckpt/{name}.pth",
        weights_entry="model",
    )
    for name, top1, parameters, gflops in (
        ("unified_halonet_micro", 75.8, 4_389_672, 0.861),
        ("unified_halonet_tiny", 83.0, 31_523_176, 5.298),
        ("unified_halonet_small", 84.0, 52_831_336, 9.810),
        ("unified_halonet_base", 84.6, 93_327_336, 17.030),
        ("unified_pvt_micro", 72.8, 4_454_056, 0.612),
        ("unified_pvt_tiny", 82.1, 31_157_736, 4.708),
        ("unified_pvt_small", 83.2, 50_887_656, 7.551),
        ("unified_pvt_base", 83.4, 91_566_312, 13.130),
        ("unified_swin_micro", 74.4, 4_381_042, 0.701),
        ("unified_swin_tiny", 82.3, 31_540_546, 4.883),
        ("unified_swin_small", 83.3, 52_867_666, 9.133),
        ("unified_swin_base", 83.7, 93_388_576, 16.128),
        ("unified_convnext_micro", 75.1, 4_439_624, 0.648),
        ("unified_convnext_tiny", 82.2, 31_912_360, 4.997),
        ("unified_convnext_small", 83.1, 54_393_640, 9.388),
        ("unified_convnext_base", 83.7, 95_865_576, 16.621),
        ("unified_internimage_micro", 75.3, 4_302_692, 0.636),
        ("unified_internimage_tiny", 83.3, 29_933_272, 4.786),
        ("unified_internimage_small", 84.1, 50_082_280, 8.173),
        ("unified_internimage_base", 84.5, 97_465_192, 15.997),
    )
}

FAMILY = Family(Unified, VARIANTS, PUBLISHED, tiny)
