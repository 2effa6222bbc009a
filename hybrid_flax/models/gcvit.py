"""GC ViT: Global Context Vision Transformers (Hatamizadeh et al., ICML 2023, arXiv:2206.09959).

An image meets, in this order: `Stem`, four times a `Stage` (its `QueryGenerator`, its `Block`s, its
`Downsampler`), the final norm, the mean over the map, the classifier. Blocks alternate between
attention inside local windows and attention whose query is one small map of the whole image, made
once per stage and shared by all windows: the global query.

Shapes: B images, H×W map, C channels, w×w window, N = w² tokens, h heads of d = 32 channels.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.errors import InputError
from hybrid_flax.layers import (
    DepthwiseConv,
    Mlp,
    PointwiseConv,
    conv,
    drop_path,
    drop_path_rates,
    layer_norm,
    layer_scale,
    linear,
    normal_init,
    relative_position_bias,
    run_blocks,
    scaled,
    split_key,
    window_attention,
)
from hybrid_flax.models.backbone import Backbone, Family, ImageSize, Maps, square
from hybrid_flax.models.info import EvalTransform, ModelInfo
from hybrid_flax.models.structure import Structure
from hybrid_flax.models.variants import multiple_of

HEAD_DIM = 32


@dataclasses.dataclass(frozen=True)
class Variant:
    """The numbers that define a GC ViT. Heads are 32 channels wide in all of them."""

    dim: Annotated[int, multiple_of(HEAD_DIM)]  # channels of stage 1; each stage doubles them
    depths: tuple[int, int, int, int]
    mlp_ratio: int
    layer_scale: float | None  # initial γ
    drop_path: float  # rate of the last block; the first has 0, linear between


class SqueezeExcite(nnx.Module):
    """Scales every channel of a map by a gate computed from the map's mean (with GELU inside)."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.reduce = linear(dim, dim // 4, use_bias=False, dtype=dtype, rngs=rngs)
        self.expand = linear(dim // 4, dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        gate = x.mean((1, 2), keepdims=True, dtype=jnp.float32)
        gate = self.expand(jax.nn.gelu(self.reduce(gate), approximate=False))
        return x * jax.nn.sigmoid(gate)


class FusedMBConv(nnx.Module):
    """x + pointwise(squeeze-excite(GELU(depthwise(x)))), without any norm; [B, H, W, C] → same."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.depthwise = DepthwiseConv(dim, 3, dtype=dtype, rngs=rngs)
        self.se = SqueezeExcite(dim, dtype=dtype, rngs=rngs)
        self.pointwise = PointwiseConv(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return x + self.pointwise(self.se(jax.nn.gelu(self.depthwise(x), approximate=False)))


class Downsampler(nnx.Module):
    """Norm → FusedMBConv → strided convolution → norm; [B, H, W, C] → [B, ⌈H/2⌉, ⌈W/2⌉, K]."""

    def __init__(self, dim: int, out_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.fuse = FusedMBConv(dim, dtype=dtype, rngs=rngs)
        self.reduction = conv(dim, out_dim, 3, stride=2, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(out_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 K"]:
        return self.norm2(self.reduction(self.fuse(self.norm1(x))))


class Stem(nnx.Module):
    """Image to a map of a quarter of its size; [B, H, W, 3] → [B, ⌈H/4⌉, ⌈W/4⌉, C]."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = conv(3, dim, 3, stride=2, use_bias=True, dtype=dtype, rngs=rngs)
        self.downsample = Downsampler(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H4 W4 C"]:
        return self.downsample(self.conv(images))


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """3×3, stride 2, one place of -inf around the map, so that padding never wins."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class QueryGenerator(nnx.Module):
    """Shrinks a stage's input to the size of one window; [B, H, W, C] → [B, w, w, C].

    `pools[i]` says whether a max-pool follows the i-th FusedMBConv. Stages 3 and 4, whose map is
    one window already, still have one FusedMBConv.
    """

    def __init__(self, dim: int, pools: tuple[bool, ...], *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fuse = nnx.List([FusedMBConv(dim, dtype=dtype, rngs=rngs) for _ in pools])
        self.pools = pools

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B w w C"]:
        for fuse, pool in zip(self.fuse, self.pools, strict=True):
            x = max_pool(fuse(x)) if pool else fuse(x)
        return x


class WindowAttention(nnx.Module):
    """Multi-head attention inside w×w windows with a relative position bias.

    Local: query, key and value come from the window. Global: the query is the stage's query map,
    the same for all windows of an image, and `qkv` (the release's name) makes only key and value.
    """

    def __init__(
        self,
        dim: int,
        window: int,
        *,
        is_global: bool,
        implementation: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.heads = dim // HEAD_DIM
        self.window = window
        self.is_global = is_global
        self.implementation = implementation
        self.qkv = linear(dim, dim * (2 if is_global else 3), dtype=dtype, rngs=rngs)
        self.position_bias = nnx.Param(
            normal_init(rngs.params(), ((2 * window - 1) ** 2, self.heads), jnp.float32)
        )
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], query_map: Float[Array, "B w w C"]
    ) -> Float[Array, "B H W C"]:
        split_heads = (self.heads, HEAD_DIM)
        out = window_attention(
            self.qkv(x).reshape(*x.shape[:3], -1, *split_heads),
            relative_position_bias(self.position_bias[...], self.window),
            window=self.window,
            query=query_map.reshape(*query_map.shape[:3], *split_heads) if self.is_global else None,
            implementation=self.implementation,
        )
        return self.proj(out.reshape(x.shape))


class Block(nnx.Module):
    """x + γ1·attention(norm(x)), then x + γ2·MLP(norm(x)); [B, H, W, C] → the same.

    γ1 and γ2, vectors over channels, exist only where the variant has layer scale.
    """

    def __init__(
        self,
        dim: int,
        window: int,
        *,
        is_global: bool,
        mlp_ratio: int,
        initial_scale: float | None,
        drop_path_rate: float,
        implementation: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.attn = WindowAttention(
            dim, window, is_global=is_global, implementation=implementation, dtype=dtype, rngs=rngs
        )
        self.norm2 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, dim * mlp_ratio, dtype=dtype, rngs=rngs)
        self.gamma1 = layer_scale(dim, initial_scale)
        self.gamma2 = layer_scale(dim, initial_scale)
        self.drop_path_rate = drop_path_rate

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        query_map: Float[Array, "B w w C"],
        key: jax.Array | None = None,
    ) -> Float[Array, "B H W C"]:
        keys = split_key(key, 2)
        branch = scaled(self.attn(self.norm1(x), query_map), self.gamma1)
        x = x + drop_path(branch, self.drop_path_rate, keys[0])
        branch = scaled(self.mlp(self.norm2(x)), self.gamma2)
        return x + drop_path(branch, self.drop_path_rate, keys[1])


class Stage(nnx.Module):
    """Query generator, blocks (even ones local, odd ones global), and the way to the next stage."""

    def __init__(
        self,
        dim: int,
        window: int,
        pools: tuple[bool, ...],
        drop_path_rates: list[float],
        variant: Variant,
        *,
        is_last: bool,
        implementation: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.query = QueryGenerator(dim, pools, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [
                Block(
                    dim,
                    window,
                    is_global=index % 2 == 1,
                    mlp_ratio=variant.mlp_ratio,
                    initial_scale=variant.layer_scale,
                    drop_path_rate=rate,
                    implementation=implementation,
                    dtype=dtype,
                    rngs=rngs,
                )
                for index, rate in enumerate(drop_path_rates)
            ]
        )
        self.is_last = is_last
        if not is_last:
            self.downsample = Downsampler(dim, 2 * dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"], key: jax.Array | None = None):
        """Returns (query map [B, w, w, C], blocks' output [B, H, W, C], stage's output)."""
        query_map = self.query(x)
        *_, x = run_blocks(self.blocks, x, key, query_map)
        return query_map, x, x if self.is_last else self.downsample(x)


class GCViT(Backbone):
    """Images [B, H, W, 3], normalised, to logits [B, num_classes] in float32.

    The windows follow from `image_size` as in the official variants: image_size/32, /32, /16, /32.
    A model therefore takes only images whose stem map has the size it was built for: heights and
    widths from image_size - 3 to image_size. The maps of `features` are those of the blocks, before
    the downsamplers and without a norm.
    """

    structure = Structure(
        stem=r"stem/",
        opens_stage=r"stages/(\d+)/query/",
        blocks=r"stages/(\d+)/blocks/(\d+)/",
        closes_stage=r"stages/(\d+)/downsample/",
        end=r"norm/|head/",
    )
    has_kernels = True
    feature_maps = tuple(f"stage{i}_blocks" for i in range(1, 5))
    dense_map = "norm"

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
        image_size = square(image_size, "GC ViT")
        if image_size < 32 or image_size % 32:
            raise InputError(
                f"image_size={image_size}: GC ViT needs a multiple of 32, because its windows are "
                "image_size/32 and image_size/16 places wide"
            )
        self.image_size = image_size
        self.dtype = dtype
        base = image_size // 32
        windows = (base, base, 2 * base, base)
        pools = ((True, True, True), (True, True), (False,), (False,))
        rates = drop_path_rates(variant.drop_path, variant.depths)
        dims = [variant.dim * 2**i for i in range(4)]

        self.stem = Stem(variant.dim, dtype=dtype, rngs=rngs)
        self.stages = nnx.List(
            [
                Stage(
                    dims[i],
                    windows[i],
                    pools[i],
                    rates[i],
                    variant,
                    is_last=i == 3,
                    implementation=implementation,
                    dtype=dtype,
                    rngs=rngs,
                )
                for i in range(4)
            ]
        )
        self.norm = layer_norm(dims[-1], dtype=dtype, rngs=rngs)
        self.num_classes = num_classes
        if num_classes:
            self.head = linear(dims[-1], num_classes, dtype=jnp.float32, rngs=rngs)

    def classify(self, x: Float[Array, "*B C"]) -> Float[Array, "*B classes"]:
        return self.head(x)

    def refusal(self, height: int, width: int) -> str | None:
        largest = square(self.image_size, "GC ViT")
        smallest = largest - 3
        if all(smallest <= side <= largest for side in (height, width)):
            return None
        return (
            f"this GC ViT was built for image_size={self.image_size} and takes heights and widths "
            f"from {smallest} to {self.image_size}. Resize the images, or build the model for "
            'their size: create_model("gcvit_...", image_size=...), a multiple of 32'
        )

    def maps(self, x: Float[Array, "B H W 3"], train: bool, key: jax.Array | None) -> Maps:
        """Computes every named map on the way, in order; NHWC.

        `stem`; for stage 1 to 4 `queryN` [B, w, w, C], `stageN_blocks` and `stageN` (what the stage
        hands on); `norm`; `pooled` [B, 8C]; `logits` [B, num_classes].
        """
        stage_keys = split_key(key, 4)
        maps = {"stem": (x := self.stem(x))}
        for i, stage in enumerate(self.stages, start=1):
            maps[f"query{i}"], maps[f"stage{i}_blocks"], x = stage(x, stage_keys[i - 1])
            maps[f"stage{i}"] = x
        maps["norm"] = self.norm(x)
        maps["pooled"] = maps["norm"].mean((1, 2), dtype=jnp.float32)
        if self.num_classes:
            maps["logits"] = self.head(maps["pooled"])
        return maps


def tiny(variant: Variant) -> dict[str, Any]:
    """Arguments of `create_model` for a model of a few small blocks, for tests."""
    return {"image_size": 32, "depths": (1, 2, 1, 1), "dim": 32, "mlp_ratio": 2}


# ------------------------------------------------------------------------------- the released ones

VARIANTS = {
    "gcvit_xxt": Variant(64, (2, 2, 6, 2), 3, None, 0.2),
    "gcvit_xt": Variant(64, (3, 4, 6, 5), 3, None, 0.2),
    "gcvit_t": Variant(64, (3, 4, 19, 5), 3, None, 0.2),
    "gcvit_t2": Variant(64, (3, 4, 29, 5), 3, None, 0.25),
    "gcvit_s": Variant(96, (3, 4, 19, 5), 2, 1e-5, 0.3),
    "gcvit_s2": Variant(96, (3, 4, 23, 5), 3, 1e-5, 0.35),
    "gcvit_b": Variant(128, (3, 4, 19, 5), 2, 1e-5, 0.5),
    "gcvit_l": Variant(192, (3, 4, 19, 5), 2, 1e-5, 0.5),
    "gcvit_l_384": Variant(192, (3, 4, 19, 5), 2, 1e-5, 0.1),
    "gcvit_l_512": Variant(192, (3, 4, 19, 5), 2, 1e-5, 0.1),
}


def _published(
    top1,
    parameters,
    gflops,
    crop_fraction,
    file,
    *,
    image_size=224,
    crop_mode="center",
    pretrained="",
) -> ModelInfo:
    return ModelInfo(
        paper="GC ViT, arXiv:2206.09959",
        top1=top1,
        parameters=parameters,
        gflops=gflops,
        image_size=image_size,
        eval_transform=EvalTransform(crop_fraction, crop_mode, "bicubic"),
        trained_on=pretrained + "ImageNet-1k",
        release_file=file,
        release_page="https://huggingface.co/nvidia/GCViT",
        download_url=f"https://huggingface.co/nvidia/GCViT/resolve/main/{file}",
        licence="weights CC-BY-NC-SA-4.0, original code NVIDIA Source Code License-NC",
    )


# Top-1 and FLOPs as the authors' README prints them (its introduction says 85.9 for B; its table
# and the paper's abstract say 85.0). Parameters counted on the official models. A second release
# fits gcvit_l: pretrained on ImageNet-21k, 86.6 % top-1, linked from the authors' README.
PUBLISHED = {
    "gcvit_xxt": _published(79.9, 11_995_428, 2.1, 1.0, "gcvit_1k_xxtiny.pth.tar"),
    "gcvit_xt": _published(82.0, 19_981_294, 2.6, 0.875, "gcvit_1k_xtiny.pth.tar"),
    "gcvit_t": _published(83.5, 28_221_974, 4.7, 1.0, "gcvit_1k_tiny.pth.tar"),
    "gcvit_t2": _published(83.7, 34_535_654, 5.5, 0.875, "gcvit_1k_tiny2.pth.tar"),
    "gcvit_s": _published(84.3, 51_092_173, 8.5, 0.875, "gcvit_1k_small.pth.tar"),
    "gcvit_s2": _published(84.8, 68_615_197, 10.7, 0.875, "gcvit_1k_small2.pth.tar"),
    "gcvit_b": _published(85.0, 90_320_836, 14.8, 1.0, "gcvit_1k_base.pth.tar"),
    "gcvit_l": _published(85.7, 202_075_570, 32.6, 1.0, "gcvit_1k_large.pth.tar"),
    "gcvit_l_384": _published(
        87.4,
        202_860_610,
        120.4,
        1.0,
        "gcvit_21k_large_384.pth.tar",
        image_size=384,
        crop_mode="squash",
        pretrained="ImageNet-21k, then ",
    ),
    "gcvit_l_512": _published(
        87.6,
        203_795_362,
        245.0,
        1.0,
        "gcvit_21k_large_512.pth.tar",
        image_size=512,
        crop_mode="squash",
        pretrained="ImageNet-21k, then ",
    ),
}

FAMILY = Family(GCViT, VARIANTS, PUBLISHED, tiny)
