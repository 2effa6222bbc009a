"""GLNet: vision networks of GLMix blocks (Zhu et al., NeurIPS 2024, arXiv:2411.14429).

An image meets, in this order: four times a `Stage` (the embedding that opens it, its blocks), a
final batch norm, the mean over the map, the classifier. A `GLMixBlock` runs two branches side by
side on one normalised map: convolutions, which see the neighbourhood, and 64 slots, which see the
image. The slots gather the pixels they resemble (one softmax over the pixels), attend to each
other, and hand the result back (a softmax of the same similarities over the slots). Late blocks are
attention blocks over the whole map.

The token-labelled models add a second classifier for every place of the last map; in training they
mix two images inside the network (MixToken, arXiv:2104.10858).

Shapes: B images, H×W map, C channels, L = H·W places, S = 64 slots, N tokens.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.errors import InputError
from hybrid_flax.layers import (
    BatchNorm,
    conv,
    drop_path_rates,
    linear,
    pytorch_init,
    run_blocks,
    split_key,
)
from hybrid_flax.models.backbone import Backbone, Family, ImageSize, Maps, sides
from hybrid_flax.models.glnet.blocks import Block, Variant
from hybrid_flax.models.glnet.mix_token import mix_token_box, swap_box
from hybrid_flax.models.info import EvalTransform, ModelInfo
from hybrid_flax.models.structure import Structure

TOKEN_STRIDE = 8  # places of the stem's map per place of the last one


class ConvStem(nnx.Module):
    """conv → BN → GELU → conv → BN; [B, H, W, 3] → [B, ⌈H/4⌉, ⌈W/4⌉, C]."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = conv(3, dim // 2, 3, stride=2, use_bias=True, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(dim // 2, dtype=dtype)
        self.conv2 = conv(dim // 2, dim, 3, stride=2, use_bias=True, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(dim, dtype=dtype)

    def __call__(
        self, images: Float[Array, "B H W 3"], train: bool = False
    ) -> Float[Array, "B H4 W4 C"]:
        x = jax.nn.gelu(self.bn1(self.conv1(images), train), approximate=False)
        return self.bn2(self.conv2(x), train)


class ConvNorm(nnx.Module):
    """A strided convolution, then a batch norm.

    3×3 of stride 2 on the way to the next stage: [B, H, W, C] → [B, ⌈H/2⌉, ⌈W/2⌉, K]. 4×4 of
    stride 4 as the stem of STL: [B, H, W, 3] → [B, ⌊H/4⌋, ⌊W/4⌋, C].
    """

    def __init__(
        self, dim: int, out_dim: int, size: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.conv = conv(
            dim,
            out_dim,
            size,
            stride=stride,
            padding=size // 2 if size > stride else 0,
            use_bias=True,
            dtype=dtype,
            rngs=rngs,
        )
        self.bn = BatchNorm(out_dim, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> Float[Array, "B H2 W2 K"]:
        return self.bn(self.conv(x), train)


class NormMerge(nnx.Module):
    """Batch norm, then a 2×2 convolution of stride 2; [B, H, W, C] → [B, ⌊H/2⌋, ⌊W/2⌋, K]."""

    def __init__(self, dim: int, out_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.merge_bn = BatchNorm(dim, dtype=dtype)
        self.merge = conv(
            dim, out_dim, 2, stride=2, padding=0, use_bias=True, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> Float[Array, "B H2 W2 K"]:
        return self.merge(self.merge_bn(x, train))


class Stage(nnx.Module):
    """The embedding that opens the stage, and its blocks, whose kinds alternate as `kinds` says."""

    def __init__(
        self,
        embed: ConvStem | ConvNorm | NormMerge,
        kinds: str,
        dim: int,
        drop_path_rates: list[float],
        variant: Variant,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.embed = embed
        self.blocks = nnx.List(
            [
                Block(kinds[j % len(kinds)], dim, rate, variant, dtype=dtype, rngs=rngs)
                for j, rate in enumerate(drop_path_rates)
            ]
        )


class GLNet(Backbone):
    """Images [B, H, W, 3], normalised, to logits [B, num_classes] in float32.

    Images of every size are taken by the convolutional variants, from 32 pixels by STL, whose
    embeddings drop what is left over at the right and at the bottom. `image_size` only says which
    size the model is meant for.

    The logits of a token-labelled model are those of the pooled map plus half of the largest of the
    token logits, for each class. In training it mixes the images of a batch and returns what
    `training.losses.token_labelling` takes. Its logits of places are those of the tokens.
    """

    structure = Structure(
        stem=r"stages/0/embed/",
        opens_stage=r"stages/([1-9])/embed/",
        blocks=r"stages/(\d+)/blocks/(\d+)/",
        end=r"norm/|head/|token_head/",
        classifier=r"head/|token_head/",
        split_columns=r"/mlp/(?:fc1|expand)/",
        split_rows=r"/mlp/(?:fc2|reduce)/",
    )
    dense_map = "norm"

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int,
        image_size: ImageSize,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.convolutional = variant.convolutional
        self.token_labelling = variant.token_labelling and num_classes > 0
        if reason := self.refusal(*sides(image_size)):
            raise InputError(f"image_size={image_size}: {reason}")
        self.image_size = image_size
        self.dtype = dtype
        dims = [variant.dim * 2**i for i in range(4)]
        rates = drop_path_rates(variant.drop_path, variant.depths)
        embeds: list[ConvStem | ConvNorm | NormMerge]
        if variant.convolutional:
            embeds = [ConvStem(dims[0], dtype=dtype, rngs=rngs)]
            embeds += [
                ConvNorm(dims[i], dims[i + 1], 3, 2, dtype=dtype, rngs=rngs) for i in range(3)
            ]
        else:
            embeds = [ConvNorm(3, dims[0], 4, 4, dtype=dtype, rngs=rngs)]
            embeds += [NormMerge(dims[i], dims[i + 1], dtype=dtype, rngs=rngs) for i in range(3)]
        self.stages = nnx.List(
            [
                Stage(embed, kinds, dim, stage_rates, variant, dtype=dtype, rngs=rngs)
                for embed, kinds, dim, stage_rates in zip(
                    embeds, variant.blocks, dims, rates, strict=True
                )
            ]
        )
        self.norm = BatchNorm(dims[-1], dtype=dtype)
        self.num_classes = num_classes
        if num_classes:
            self.head = linear(dims[-1], num_classes, dtype=jnp.float32, rngs=rngs)
        if self.token_labelling:
            self.token_head = linear(
                dims[-1], num_classes, kernel_init=pytorch_init, dtype=jnp.float32, rngs=rngs
            )

    def __call__(
        self, images: Array, *, train: bool = False, key: jax.Array | None = None
    ) -> Float[Array, "B classes"] | dict[str, Array]:
        """Logits, float32. `train=True`: drop path, which needs `key`, and batch statistics.

        A token-labelled model returns a dictionary in training: `logits` [B, classes] of the mixed
        maps; `token_logits` [B, tokens, classes], each of its own image; `mixed`, the fraction of
        a map that is the other image's.
        """
        if not (train and self.token_labelling):
            return super().__call__(images, train=train, key=key)
        maps = self.intermediates(images, train=train, key=key)
        return {
            "logits": maps["logits"],
            "token_logits": maps["aux_tokens"],
            "mixed": maps["mixed"],
        }

    def classify(self, x: Float[Array, "*B C"]) -> Float[Array, "*B classes"]:
        """The classifier of places, where there is one, or else the image's."""
        return self.token_head(x) if self.token_labelling else self.head(x)

    def refusal(self, height: int, width: int) -> str | None:
        smallest = 1 if self.convolutional else 32
        if min(height, width) >= smallest:
            return None
        return f"this GLNet takes heights and widths from {smallest}. Resize the images"

    def maps(self, x: Float[Array, "B H W 3"], train: bool, key: jax.Array | None) -> Maps:
        """Computes every named map on the way, in order; NHWC.

        `stem` or `downN`, what opens the stage; for block M, from 0, of stage N `sNbM_posconv`;
        `sNbM_slot_logits` [B, S, L], before both softmaxes, `sNbM_slots` [B, S, C] after their
        attention, `sNbM_local`, or `sNbM_attn`; `sNbM_mlp`, `sNbM_out`; `stageN`; `norm`; `pooled`
        [B, 8C]; `logits` [B, num_classes]. Token-labelled models have `aux_tokens` [B, tokens,
        num_classes] before the logits, and in training `mixed`, as `__call__` describes them.
        """
        *stage_keys, box_key = split_key(key, 5)
        image_shape, maps = x.shape, {}
        for i, stage in enumerate(self.stages, start=1):
            x = maps["stem" if i == 1 else f"down{i}"] = stage.embed(x, train)
            if i == 1 and self.token_labelling and box_key is not None:
                grid = _token_grid(image_shape, x.shape)
                box = mix_token_box(box_key, *grid)
                x = swap_box(x, box, TOKEN_STRIDE)
            outputs = run_blocks(stage.blocks, x, stage_keys[i - 1])
            for j, (_, block_maps) in enumerate(outputs):
                maps |= {f"s{i}b{j}_{name}": value for name, value in block_maps.items()}
            maps[f"stage{i}"] = x = outputs[-1][0]

        maps["norm"] = self.norm(x, train)
        maps["pooled"] = maps["norm"].mean((1, 2), dtype=jnp.float32)
        if not self.num_classes:
            return maps
        logits = self.head(maps["pooled"])
        if self.token_labelling:
            tokens = self.token_head(maps["norm"])
            if train:
                tokens = swap_box(tokens, box)
                area = (box[1] - box[0]) * (box[3] - box[2])
                maps["mixed"] = jnp.asarray(area / math.prod(grid), jnp.float32)
            maps["aux_tokens"] = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
            if not train:
                logits = logits + 0.5 * maps["aux_tokens"].max(1)
        maps["logits"] = logits
        return maps


def _token_grid(images: tuple[int, ...], stem: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the last map, on which boxes are drawn."""
    if stem[1] % TOKEN_STRIDE or stem[2] % TOKEN_STRIDE:
        raise InputError(
            f"images are {images[1]}×{images[2]}, but in training a token-labelled GLNet mixes "
            "them on the grid of its last map and takes only multiples of 32 (or up to 3 less). "
            "Train with another image_size"
        )
    return stem[1] // TOKEN_STRIDE, stem[2] // TOKEN_STRIDE


def tiny(variant: Variant) -> dict[str, Any]:
    """Arguments of `create_model` for a model of a few small blocks, for tests."""
    return {"image_size": 32, "depths": (1, 1, 1, 1), "dim": 32}


# ------------------------------------------------------------------------------- the released ones


def _glnet(dim, drop_path, *, layer_scale=None, token_labelling=False) -> Variant:
    return Variant(
        dim,
        (4, 4, 18, 4),
        3,
        ("G", "G", "GA", "A"),
        convolutional=True,
        learned_slots=False,
        layer_scale=layer_scale,
        token_labelling=token_labelling,
        drop_path=drop_path,
    )


def _stl(*, learned_slots) -> Variant:
    return Variant(
        96,
        (2, 2, 6, 2),
        4,
        ("G", "G", "G", "A"),
        convolutional=False,
        learned_slots=learned_slots,
        layer_scale=None,
        token_labelling=False,
        drop_path=0.1,
    )


# Drop path as the authors' README gives it; their script has 0.1 for 4G and 9G too.
VARIANTS = {
    "glnet_4g": _glnet(64, 0.15),
    "glnet_9g": _glnet(96, 0.3),
    "glnet_16g": _glnet(128, 0.4, layer_scale=1e-4),
    "glnet_4g_tklb": _glnet(64, 0.1, token_labelling=True),
    "glnet_9g_tklb": _glnet(96, 0.1, token_labelling=True),
    "glnet_stl": _stl(learned_slots=False),
    "glnet_stl_paramslot": _stl(learned_slots=True),
}


def _published(name, top1, parameters, gflops, crop_fraction=0.875, weights_entry=None):
    return ModelInfo(
        paper="GLNet (GLMix), arXiv:2411.14429",
        top1=top1,
        parameters=parameters,
        gflops=gflops,
        image_size=224,
        eval_transform=EvalTransform(crop_fraction, "center", "bicubic"),
        trained_on="ImageNet-1k",
        release_file=f"{name}.pth",
        release_page="https://github.com/rayleizhu/GLMix",
        licence="MIT",
        weights_entry=weights_entry,
    )


# Top-1 and FLOPs as the authors' README prints them; parameters counted on the official models.
# The published accuracy of 16G is that of its averaged weights.
PUBLISHED = {
    info.release_file.removesuffix(".pth"): info
    for info in (
        _published("glnet_4g", 83.7, 27_001_593, 4.5),
        _published("glnet_9g", 84.5, 60_010_617, 9.7),
        _published("glnet_16g", 85.0, 106_055_161, 16.7, weights_entry="model_ema"),
        _published("glnet_4g_tklb", 84.4, 27_514_593, 4.5, 0.96),
        _published("glnet_9g_tklb", 85.3, 60_779_617, 9.7, 0.96),
        _published("glnet_stl", 82.5, 30_296_786, 4.4),
        _published("glnet_stl_paramslot", 82.1, 30_481_106, 4.4),
    )
}

FAMILY = Family(GLNet, VARIANTS, PUBLISHED, tiny)
