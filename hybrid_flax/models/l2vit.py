"""L2ViT: linear attention with local concentration (Zheng, arXiv:2501.16182).

An image meets, in this order: four times a `Stage` (its `Stem` or `Down`, its blocks), the final
norm, the mean over the map, the classifier. Blocks alternate between softmax attention inside local
windows and linear attention over the whole image, whose cost grows with the image and not with its
square. Linear attention spreads its weight over everything; the `LocalConcentration` that follows
it, two depthwise convolutions, gathers it again.

Nothing encodes positions but depthwise convolutions on the residual stream, and no weight depends
on window or image size: any image will do, and the same weights fit any window.

Shapes: B images, H×W map, C channels, w×w window, N tokens, h heads of d = e = 32 channels.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    BatchNorm,
    BiasedOptions,
    DepthwiseConv,
    Mlp,
    conv,
    drop_path,
    drop_path_rates,
    layer_norm,
    linear,
    normal_init,
    pad_to_multiple,
    run_blocks,
    show,
    split_key,
    window_attention,
)
from hybrid_flax.models.backbone import Backbone, Family, ImageSize, Maps
from hybrid_flax.models.info import EvalTransform, ModelInfo
from hybrid_flax.models.structure import Structure
from hybrid_flax.models.variants import multiple_of

HEAD_DIM = 32
MLP_RATIO = 4
NORMALISER_FLOOR = 100.0  # not an epsilon: in stage 4, and on small images, it is often reached
DETECTION_WINDOW = 7


@dataclasses.dataclass(frozen=True)
class Variant:
    """The numbers that define an L2ViT."""

    dim: Annotated[int, multiple_of(HEAD_DIM)]  # channels of stage 1; each stage doubles them
    depths: tuple[int, int, int, int]
    window: int
    drop_path: float  # rate of the last block; the first has 0, linear between
    detection: bool = False  # the trunk for dense prediction: see `L2ViT`


def depthwise(dim: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DepthwiseConv:
    return DepthwiseConv(dim, size, use_bias=True, kernel_init=normal_init, dtype=dtype, rngs=rngs)


class Stem(nnx.Module):
    """conv → BN → ReLU → conv → BN → LayerNorm; [B, H, W, 3] → [B, ⌈H/4⌉, ⌈W/4⌉, C].

    The image is padded to multiples of 4 first.
    """

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        options: BiasedOptions = {
            "use_bias": True,
            "kernel_init": normal_init,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.conv1 = conv(3, dim // 2, 3, stride=2, **options)
        self.bn1 = BatchNorm(dim // 2, dtype=dtype)
        self.conv2 = conv(dim // 2, dim, 3, stride=2, **options)
        self.bn2 = BatchNorm(dim, dtype=dtype)
        self.norm = layer_norm(dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, images: Float[Array, "B H W 3"], train: bool = False
    ) -> Float[Array, "B H4 W4 C"]:
        x = jax.nn.relu(self.bn1(self.conv1(pad_to_multiple(images, 4)), train))
        return self.norm(self.bn2(self.conv2(x), train))


class Down(nnx.Module):
    """LayerNorm → 2×2 convolution of stride 2; [B, H, W, C] → [B, ⌈H/2⌉, ⌈W/2⌉, K].

    An odd map is padded after the norm: the padding is 0 and not the norm's bias.
    """

    def __init__(self, dim: int, out_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.proj = conv(
            dim,
            out_dim,
            2,
            stride=2,
            padding=0,
            use_bias=True,
            kernel_init=normal_init,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> Float[Array, "B H2 W2 K"]:
        return self.proj(pad_to_multiple(self.norm(x), 2))


class WindowAttention(nnx.Module):
    """Multi-head softmax attention inside w×w windows, without a position bias.

    Where windows reach over the map's edge it is padded with zeros, and as in the official code the
    padding is not masked: its keys and values, which are the biases of `qkv`, take part.
    """

    def __init__(
        self, dim: int, window: int, implementation: str, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.heads = dim // HEAD_DIM
        self.window = window
        self.implementation = implementation
        self.qkv = linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        _, height, width, dim = x.shape
        qkv = self.qkv(pad_to_multiple(x, self.window))
        qkv = qkv.reshape(*qkv.shape[:3], 3, self.heads, HEAD_DIM)
        out = window_attention(qkv, window=self.window, implementation=self.implementation)
        return self.proj(out.reshape(*out.shape[:3], dim)[:, :height, :width])


def linear_attention(
    query: Float[Array, "B N h d"],
    key: Float[Array, "B N h d"],
    value: Float[Array, "B N h e"],
    temperature: Float[Array, "h 1 1"],
) -> Float[Array, "B N h e"]:
    """t · Q (Kᵀ V) / max(Q Kᵀ 1, 100) with Q = ReLU(query), K = ReLU(key), for each head; float32.

    The temperature t scales the result but not the normaliser, so it does not cancel.
    """
    query, key = jax.nn.relu(query).astype(jnp.float32), jax.nn.relu(key)
    context = jnp.einsum("bmhd,bmhe->bhde", key, value, preferred_element_type=jnp.float32)
    out = jnp.einsum("bnhd,bhde->bnhe", query, context * temperature[None])
    normaliser = jnp.einsum("bnhd,bhd->bnh", query, key.sum(1, dtype=jnp.float32))
    out = out / jnp.maximum(normaliser, NORMALISER_FLOOR)[..., None]

    def weights():  # [B, h, N, N], never formed otherwise: weights times value is the result
        shares = (
            temperature[None] / jnp.maximum(normaliser, NORMALISER_FLOOR).swapaxes(1, 2)[..., None]
        )
        return (
            jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32) * shares
        )

    show("linear attention", weights=weights, value=lambda: value, out=lambda: out)
    return out


class LinearAttention(nnx.Module):
    """Multi-head linear attention of all places of the map; [B, H, W, C] → the same."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = dim // HEAD_DIM
        self.qkv = linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        # Of rank 3 as in the release: weight decay goes by rank, and there it is decayed.
        self.temperature = nnx.Param(jnp.full((self.heads, 1, 1), HEAD_DIM**-0.5, jnp.float32))
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        qkv = self.qkv(x).reshape(x.shape[0], -1, 3, self.heads, HEAD_DIM)
        query, key, value = (qkv[:, :, part] for part in range(3))
        out = linear_attention(query, key, value, self.temperature[...])
        return self.proj(out.reshape(x.shape))


class LocalConcentration(nnx.Module):
    """depthwise 7×7 → GELU → BatchNorm → depthwise 7×7; [B, H, W, C] → the same."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.depthwise1 = depthwise(dim, 7, dtype=dtype, rngs=rngs)
        self.bn = BatchNorm(dim, dtype=dtype)
        self.depthwise2 = depthwise(dim, 7, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B H W C"]:
        return self.depthwise2(self.bn(jax.nn.gelu(self.depthwise1(x), approximate=False), train))


class WindowBlock(nnx.Module):
    """x + position(x), x + attention(norm(x)), x + position(x), x + MLP(norm(x)).

    `position` (the paper's CPE) is a depthwise convolution; drop path spares it.
    """

    def __init__(
        self,
        dim: int,
        window: int,
        drop_path_rate: float,
        implementation: str,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.position1 = depthwise(dim, 3, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.attn = WindowAttention(dim, window, implementation, dtype=dtype, rngs=rngs)
        self.position2 = depthwise(dim, 3, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, MLP_RATIO * dim, dtype=dtype, rngs=rngs)
        self.drop_path_rate = drop_path_rate

    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False, key: jax.Array | None = None
    ) -> Float[Array, "B H W C"]:
        keys = split_key(key, 2)
        x = x + self.position1(x)
        x = x + drop_path(self.attn(self.norm1(x)), self.drop_path_rate, keys[0])
        x = x + self.position2(x)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, keys[1])


class LinearBlock(nnx.Module):
    """x + position(x), x + attention(norm(x)), x + concentration(norm(x)), x + MLP(norm(x))."""

    def __init__(self, dim: int, drop_path_rate: float, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.position1 = depthwise(dim, 3, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.attn = LinearAttention(dim, dtype=dtype, rngs=rngs)
        self.local_norm = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.local = LocalConcentration(dim, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, MLP_RATIO * dim, dtype=dtype, rngs=rngs)
        self.drop_path_rate = drop_path_rate

    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False, key: jax.Array | None = None
    ) -> Float[Array, "B H W C"]:
        keys = split_key(key, 3)
        x = x + self.position1(x)
        x = x + drop_path(self.attn(self.norm1(x)), self.drop_path_rate, keys[0])
        x = x + drop_path(self.local(self.local_norm(x), train), self.drop_path_rate, keys[1])
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, keys[2])


class Stage(nnx.Module):
    """The embedding that opens the stage, then blocks: even ones window, odd ones linear."""

    def __init__(
        self,
        embed: Stem | Down,
        dim: int,
        window: int,
        drop_path_rates: list[float],
        implementation: str,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.embed = embed
        self.blocks = nnx.List(
            [
                LinearBlock(dim, rate, dtype=dtype, rngs=rngs)
                if index % 2
                else WindowBlock(dim, window, rate, implementation, dtype=dtype, rngs=rngs)
                for index, rate in enumerate(drop_path_rates)
            ]
        )

    def __call__(self, x: Float[Array, "B H W C"], train: bool, key: jax.Array | None):
        """Returns [the embedding, the output of every block], each [B, H, W, C]."""
        x = self.embed(x, train)
        return [x, *run_blocks(self.blocks, x, key, train)]


class L2ViT(Backbone):
    """Images [B, H, W, 3], normalised, to logits [B, num_classes] in float32.

    Images of every size are taken; `image_size` only says which the model is meant for.

    With `detection=True` this is the trunk of the official detection and segmentation code: a
    LayerNorm on each map that `features` returns, no final norm, no classifier, and windows of 7
    whatever the variant says.
    """

    structure = Structure(
        stem=r"stages/0/embed/",
        opens_stage=r"stages/([1-9])/embed/",
        blocks=r"stages/(\d+)/blocks/(\d+)/",
        end=r"norms?/|head/",
    )
    has_kernels = True
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
        self.image_size = image_size
        self.dtype = dtype
        self.detection = variant.detection
        if variant.detection:
            self.feature_maps = ("out1", "out2", "out3", "out4")
        window = DETECTION_WINDOW if variant.detection else variant.window
        rates = drop_path_rates(variant.drop_path, variant.depths)
        dims = [variant.dim * 2**i for i in range(4)]

        embeds: list[Stem | Down] = [Stem(dims[0], dtype=dtype, rngs=rngs)]
        embeds += [Down(dims[i], dims[i + 1], dtype=dtype, rngs=rngs) for i in range(3)]
        self.stages = nnx.List(
            [
                Stage(embeds[i], dims[i], window, rates[i], implementation, dtype=dtype, rngs=rngs)
                for i in range(4)
            ]
        )
        if variant.detection:
            self.norms = nnx.List([layer_norm(dim, dtype=dtype, rngs=rngs) for dim in dims])
        else:
            self.norm = layer_norm(dims[-1], dtype=dtype, rngs=rngs)
        self.num_classes = 0 if variant.detection else num_classes
        if self.num_classes:
            self.head = linear(dims[-1], num_classes, dtype=jnp.float32, rngs=rngs)

    def classify(self, x: Float[Array, "*B C"]) -> Float[Array, "*B classes"]:
        return self.head(x)

    def maps(self, x: Float[Array, "B H W 3"], train: bool, key: jax.Array | None) -> Maps:
        """Computes every named map on the way, in order; NHWC.

        `stem` or `downN`, what opens the stage; `stageN_block1`, `stageN_block2`, …; `stageN`, the
        last of them; `norm`; `pooled` [B, 8C]; `logits` [B, num_classes]. With `detection=True`
        `out1` to `out4`, the normalised stages, in place of the last three.
        """
        stage_keys, maps = split_key(key, 4), {}
        for i, stage in enumerate(self.stages, start=1):
            maps["stem" if i == 1 else f"down{i}"], *blocks = stage(x, train, stage_keys[i - 1])
            maps |= {f"stage{i}_block{j}": block for j, block in enumerate(blocks, start=1)}
            maps[f"stage{i}"] = x = blocks[-1]
        if self.detection:
            outs = enumerate(self.norms, start=1)
            return maps | {f"out{i}": norm(maps[f"stage{i}"]) for i, norm in outs}
        maps["norm"] = self.norm(x)
        maps["pooled"] = maps["norm"].mean((1, 2), dtype=jnp.float32)
        if self.num_classes:
            maps["logits"] = self.head(maps["pooled"])
        return maps


def tiny(variant: Variant) -> dict[str, Any]:
    """Arguments of `create_model` for a model of a few small blocks, for tests."""
    return {"image_size": 32, "depths": (1, 2, 1, 1), "dim": 32, "window": 4}


# ------------------------------------------------------------------------------- the released ones

# The drop path rates of T and S are not published: 0.1 and 0.2 are ours. B was trained with 0.3,
# and fine-tuned with 0.2.
VARIANTS = {
    "l2vit_t": Variant(96, (2, 2, 6, 2), 7, 0.1),
    "l2vit_s": Variant(96, (2, 2, 18, 2), 7, 0.2),
    "l2vit_b": Variant(128, (2, 2, 18, 2), 7, 0.3),
    "l2vit_b_384": Variant(128, (2, 2, 18, 2), 12, 0.2),
}

_CENTRE = EvalTransform(0.875, "center", "bicubic")
_RELEASE = "https://github.com/ChuanyangZheng/L2ViT/releases"


def _published(
    top1,
    parameters,
    gflops,
    file,
    *,
    image_size=224,
    crop=_CENTRE,
    pretrained="",
) -> ModelInfo:
    return ModelInfo(
        paper="L2ViT, arXiv:2501.16182",
        top1=top1,
        parameters=parameters,
        gflops=gflops,
        image_size=image_size,
        eval_transform=crop,
        trained_on=pretrained + "ImageNet-1k",
        release_file=file,
        release_page=f"{_RELEASE}/tag/v1.0",
        licence="MIT",
        download_url=f"{_RELEASE}/download/v1.0/{file}",
    )


# Top-1 and FLOPs as the authors' README prints them; parameters counted on the official models.
# Two more releases fit l2vit_b: pretrained on ImageNet-22k (21,841 classes), and that fine-tuned on
# ImageNet-1k at 224 pixels (86.0 %).
PUBLISHED = {
    "l2vit_t": _published(83.1, 28_596_781, 4.7, "L2ViT-Tiny-checkpoint-best-ema.pth"),
    "l2vit_s": _published(84.1, 50_199_157, 9.0, "L2ViT-Small-checkpoint-best-ema.pth"),
    "l2vit_b": _published(84.4, 88_577_188, 15.9, "L2ViT-Base-checkpoint-best-ema.pth"),
    "l2vit_b_384": _published(
        87.0,
        88_577_188,
        47.5,
        "L2ViT-Base-22k21k-finetune-384-checkpoint-best.pth",
        image_size=384,
        crop=EvalTransform(1.0, "squash", "bicubic"),
        pretrained="ImageNet-22k, then ",
    ),
}

FAMILY = Family(L2ViT, VARIANTS, PUBLISHED, tiny)
