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

import dataclasses
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
    DepthwiseConv,
    Mlp,
    PointwiseConv,
    adaptive_average_pool,
    attention,
    check_images,
    conv,
    drop_path,
    drop_path_rates,
    layer_norm,
    linear,
    normal_init,
    pytorch_init,
    split_key,
    training_key,
)
from hybrid_flax.models.backbone import Backbone, Family
from hybrid_flax.models.info import EvalTransform, ModelInfo
from hybrid_flax.models.structure import Structure

HEAD_DIM = 32
SLOT_GRID = 8  # slots start as the means over an 8×8 grid
SLOTS = SLOT_GRID**2
NORM_EPSILON = 1e-6  # of the layer norms
TOKEN_STRIDE = 8  # places of the stem's map per place of the last one


@dataclasses.dataclass(frozen=True)
class Variant:
    """What distinguishes one GLNet from another. Heads are 32 channels wide in all of them."""

    dim: int  # channels of stage 1; each stage doubles them
    depths: tuple[int, int, int, int]
    mlp_ratio: int
    blocks: tuple[str, str, str, str]  # of each stage, in turn: G GLMix, A attention
    convolutional: bool  # 3×3 convolutions as embeddings, position encodings and inside the MLPs;
    #                      without (STL) the frame is that of Swin-T, for comparison with it
    learned_slots: bool  # the slots start from parameters instead of from the map
    layer_scale: float | None  # initial γ
    token_labelling: bool
    drop_path: float  # rate of the last block; the first has 0, linear between


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
        options = {"stride": stride, "padding": size // 2 if size > stride else 0}
        self.conv = conv(dim, out_dim, size, **options, use_bias=True, dtype=dtype, rngs=rngs)
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


class MultiHeadAttention(nnx.Module):
    """Softmax attention of all tokens with all; [B, N, C] → the same."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        xavier = jax.nn.initializers.xavier_uniform()
        self.heads = dim // HEAD_DIM
        self.qkv = linear(dim, 3 * dim, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, HEAD_DIM)
        out = attention(*(qkv[:, :, part] for part in range(3)))
        return self.proj(out.reshape(x.shape))


def cosine_similarity(
    slots: Float[Array, "B S C"], pixels: Float[Array, "B L C"]
) -> Float[Array, "B S L"]:
    """Of every slot with every pixel, in float32; lengths count as at least 1e-12."""

    def inverse_length(x):  # clamped before the root, whose gradient at 0 is infinite
        squared = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)
        return jax.lax.rsqrt(jnp.maximum(squared, 1e-24))

    products = jnp.einsum("bsc,blc->bsl", slots, pixels, preferred_element_type=jnp.float32)
    return products * inverse_length(slots)[:, :, None] * inverse_length(pixels)[:, None]


class LocalBranch(nnx.Module):
    """1×1 → depthwise 5×5 → 1×1, with nothing between them; [B, H, W, C] → the same."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.pointwise1 = PointwiseConv(dim, dim, use_bias=True, dtype=dtype, rngs=rngs)
        self.depthwise = DepthwiseConv(dim, 5, use_bias=True, dtype=dtype, rngs=rngs)
        self.pointwise2 = PointwiseConv(dim, dim, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.pointwise2(self.depthwise(self.pointwise1(x)))


def layer_scale(dim: int, initial: float | None) -> nnx.Param | None:
    """γ, one number per channel; None for the variants without."""
    return None if initial is None else nnx.Param(jnp.full(dim, initial, jnp.float32))


def scaled(branch: Float[Array, "B H W C"], gamma: nnx.Param | None) -> Float[Array, "B H W C"]:
    return branch if gamma is None else branch * gamma[None, None, None].astype(branch.dtype)


class GLMix(nnx.Module):
    """γ·(global branch + local branch) of a normalised map; [B, H, W, C] → the same.

    The slots start as the means of the map as it entered the block, before position encoding and
    norm, or from parameters. One pass: they are replaced by what they gather, and that by their
    attention to each other, without residual, norm or MLP. The next block starts anew.
    """

    def __init__(self, dim: int, variant: Variant, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.learned_slots = variant.learned_slots
        if variant.learned_slots:
            self.init_slots = nnx.Param(normal_init(rngs.params(), (1, SLOTS, dim), jnp.float32))
        self.slot_scale = nnx.Param(jnp.asarray(dim**-0.5, jnp.float32))
        self.slot_attn = MultiHeadAttention(dim, dtype=dtype, rngs=rngs)
        self.local = LocalBranch(dim, dtype=dtype, rngs=rngs)
        self.map_gamma = layer_scale(dim, variant.layer_scale)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B H W C"], entered: Float[Array, "B H W C"]):
        """Returns (branch [B, H, W, C], the named maps on the way)."""
        pixels = x.reshape(x.shape[0], -1, x.shape[-1])
        shape = (x.shape[0], SLOTS, x.shape[-1])
        if self.learned_slots:
            slots = jnp.broadcast_to(self.init_slots[...].astype(self.dtype), shape)
        else:
            slots = adaptive_average_pool(entered, SLOT_GRID, SLOT_GRID).reshape(shape)

        logits = self.slot_scale[...] * cosine_similarity(slots, pixels)
        gather = jax.nn.softmax(logits, axis=2).astype(self.dtype)  # over the pixels
        dispatch = jax.nn.softmax(logits, axis=1).astype(self.dtype)  # over the slots
        slots = jnp.einsum("bsl,blc->bsc", gather, pixels, preferred_element_type=jnp.float32)
        slots = self.slot_attn(slots.astype(self.dtype))
        from_slots = jnp.einsum("bsl,bsc->blc", dispatch, slots).reshape(x.shape)

        local = self.local(x)
        maps = {"slot_logits": logits, "slots": slots, "local": local}
        return scaled(from_slots + local, self.map_gamma), maps


class MapAttention(nnx.Module):
    """γ·attention of all places of a normalised map; [B, H, W, C] → the same."""

    def __init__(self, dim: int, variant: Variant, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attn = MultiHeadAttention(dim, dtype=dtype, rngs=rngs)
        self.token_gamma = layer_scale(dim, variant.layer_scale)

    def __call__(self, x: Float[Array, "B H W C"], entered: Float[Array, "B H W C"]):
        """Returns (branch [B, H, W, C], the named maps on the way)."""
        branch = self.attn(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)
        return scaled(branch, self.token_gamma), {"attn": branch}


class ConvMlp(nnx.Module):
    """expand → (h + depthwise 3×3(h) where convolutional) → GELU → reduce; [B, H, W, C] → same."""

    def __init__(
        self, dim: int, hidden: int, convolutional: bool, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.expand = PointwiseConv(dim, hidden, use_bias=True, dtype=dtype, rngs=rngs)
        self.convolutional = convolutional
        if convolutional:
            self.depthwise = DepthwiseConv(hidden, 3, use_bias=True, dtype=dtype, rngs=rngs)
        self.reduce = PointwiseConv(hidden, dim, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = self.expand(x)
        if self.convolutional:
            x = x + self.depthwise(x)
        return self.reduce(jax.nn.gelu(x, approximate=False))


class Block(nnx.Module):
    """x + position(x) where convolutional, then x + mixer(norm(x)), then x + γ·MLP(norm(x)).

    Kind "G" mixes by `GLMix`, kind "A" by `MapAttention`. Both norms are layer norms; the batch
    norms of this family are all outside the blocks. `position` is a depthwise convolution, which
    drop path spares. [B, H, W, C] → the same.
    """

    def __init__(
        self,
        kind: str,
        dim: int,
        drop_path_rate: float,
        variant: Variant,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.convolutional = variant.convolutional
        if variant.convolutional:
            self.position = DepthwiseConv(dim, 3, use_bias=True, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(dim, epsilon=NORM_EPSILON, dtype=dtype, rngs=rngs)
        mixer = {"G": GLMix, "A": MapAttention}[kind]
        self.mixer = mixer(dim, variant, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(dim, epsilon=NORM_EPSILON, dtype=dtype, rngs=rngs)
        hidden = variant.mlp_ratio * dim
        if kind == "A" and not variant.convolutional:  # STL's plain transformer blocks
            self.mlp = Mlp(dim, hidden, dtype=dtype, rngs=rngs)
        else:
            self.mlp = ConvMlp(dim, hidden, variant.convolutional, dtype=dtype, rngs=rngs)
        self.mlp_gamma = layer_scale(dim, variant.layer_scale)
        self.drop_path_rate = drop_path_rate

    def __call__(self, x: Float[Array, "B H W C"], key: jax.Array | None = None):
        """Returns (output [B, H, W, C], the named maps on the way)."""
        keys, entered, maps = split_key(key, 2), x, {}
        if self.convolutional:
            maps["posconv"] = self.position(x)
            x = x + maps["posconv"]
        branch, mixer_maps = self.mixer(self.norm1(x), entered)
        x = x + drop_path(branch, self.drop_path_rate, keys[0])
        branch = self.mlp(self.norm2(x))
        out = x + drop_path(scaled(branch, self.mlp_gamma), self.drop_path_rate, keys[1])
        return out, maps | mixer_maps | {"mlp": branch, "out": out}


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


# -------------------------------------------------------------------------------------- mix-token

Box = tuple[int | jax.Array, int | jax.Array, int | jax.Array, int | jax.Array]


def mix_token_box(key: jax.Array, height: int, width: int) -> Box:
    """Draws a box on a height×width grid: row0, row1, column0, column1, int scalars, ends excluded.

    As in cutmix the sides are the grid's times √(1 - λ), λ ~ Beta(1, 1), here rounded down to even
    numbers; the centre is uniform. What lies outside of the grid is cut off; a box may be empty.
    """
    ratio_key, row_key, column_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.uniform(ratio_key))  # Beta(1, 1) is uniform

    def interval(key, size):
        half = jnp.floor(size * side).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (), 0, size)
        return jnp.clip(centre - half, 0, size), jnp.clip(centre + half, 0, size)

    return *interval(row_key, height), *interval(column_key, width)


def swap_box(x: Float[Array, "B H W C"], box: Box, stride: int = 1) -> Float[Array, "B H W C"]:
    """Each image gets the box, times `stride`, of the image at the mirrored batch position."""
    row0, row1, column0, column1 = (edge * stride for edge in box)
    rows, columns = jnp.arange(x.shape[1]), jnp.arange(x.shape[2])
    in_rows, in_columns = (rows >= row0) & (rows < row1), (columns >= column0) & (columns < column1)
    inside = in_rows[None, :, None, None] & in_columns[None, None, :, None]
    return jnp.where(inside, x[::-1], x)


# ---------------------------------------------------------------------------------------- the model


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
        image_size: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.convolutional = variant.convolutional
        self.token_labelling = variant.token_labelling
        _check_size(image_size, image_size, self.convolutional)
        if len(variant.blocks) != 4 or not all(
            kinds and set(kinds) <= {"G", "A"} for kinds in variant.blocks
        ):
            raise InputError(
                f"blocks={variant.blocks!r}: expected for each of the four stages a text of the "
                'letters G (GLMix) and A (attention), such as "GA"'
            )
        self.image_size = image_size
        self.dtype = dtype
        dims = [variant.dim * 2**i for i in range(4)]
        rates = drop_path_rates(variant.drop_path, variant.depths)
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
                Stage(*each, variant, dtype=dtype, rngs=rngs)
                for each in zip(embeds, variant.blocks, dims, rates, strict=True)
            ]
        )
        self.norm = BatchNorm(dims[-1], dtype=dtype)
        self.head = linear(dims[-1], num_classes, dtype=jnp.float32, rngs=rngs)
        if variant.token_labelling:
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
        maps = self.intermediates(images, train=train, key=key)
        if not (train and self.token_labelling):
            return maps["logits"]
        return {
            "logits": maps["logits"],
            "token_logits": maps["aux_tokens"],
            "mixed": maps["mixed"],
        }

    def classify(self, x: Float[Array, "*B C"]) -> Float[Array, "*B classes"]:
        """The classifier of places, where there is one, or else the image's."""
        return self.token_head(x) if self.token_labelling else self.head(x)

    def intermediates(
        self, images: Array, *, train: bool = False, key: jax.Array | None = None
    ) -> dict[str, Float[Array, "..."]]:
        """Every named map on the way, in order; NHWC.

        `stem` or `downN`, what opens the stage; for block M, from 0, of stage N `sNbM_posconv`;
        `sNbM_slot_logits` [B, S, L], before both softmaxes, `sNbM_slots` [B, S, C] after their
        attention, `sNbM_local`, or `sNbM_attn`; `sNbM_mlp`, `sNbM_out`; `stageN`; `norm`; `pooled`
        [B, 8C]; `logits` [B, num_classes]. Token-labelled models have `aux_tokens` [B, tokens,
        num_classes] before the logits, and in training `mixed`, as `__call__` describes them. Under
        `jit`, maps that are not used cost nothing.
        """
        check_images(images.shape)
        _check_size(*images.shape[1:3], self.convolutional)
        *stage_keys, box_key = split_key(training_key(train, key), 5)
        mixing = train and self.token_labelling
        x, maps = images.astype(self.dtype), {}
        for i, stage in enumerate(self.stages, start=1):
            x = maps["stem" if i == 1 else f"down{i}"] = stage.embed(x, train)
            if i == 1 and mixing:
                grid = _token_grid(images.shape, x.shape)
                box = mix_token_box(box_key, *grid)
                x = swap_box(x, box, TOKEN_STRIDE)
            block_keys = split_key(stage_keys[i - 1], len(stage.blocks))
            for j, block in enumerate(stage.blocks):
                x, block_maps = block(x, block_keys[j])
                maps |= {f"s{i}b{j}_{name}": value for name, value in block_maps.items()}
            maps[f"stage{i}"] = x

        maps["norm"] = self.norm(x, train)
        maps["pooled"] = maps["norm"].mean((1, 2), dtype=jnp.float32)
        logits = self.head(maps["pooled"])
        if self.token_labelling:
            tokens = self.token_head(maps["norm"])
            if mixing:
                tokens = swap_box(tokens, box)
                area = (box[1] - box[0]) * (box[3] - box[2])
                maps["mixed"] = jnp.asarray(area / math.prod(grid), jnp.float32)
            maps["aux_tokens"] = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
            if not train:
                logits = logits + 0.5 * maps["aux_tokens"].max(1)
        maps["logits"] = logits
        return maps


def _check_size(height: int, width: int, convolutional: bool):
    smallest = 1 if convolutional else 32
    if min(height, width) < smallest:
        raise InputError(
            f"images of {height}×{width} are too small: this GLNet takes heights and widths from "
            f"{smallest}. Resize the images"
        )


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
