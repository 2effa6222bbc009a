"""The blocks of GLNet: two ways to mix the places of a map, and an MLP.

Shapes: B images, H×W map, C channels, L = H·W places, S = 64 slots, N tokens.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    DepthwiseConv,
    Mlp,
    PointwiseConv,
    adaptive_average_pool,
    attention,
    drop_path,
    layer_norm,
    layer_scale,
    linear,
    normal_init,
    scaled,
    split_key,
)
from hybrid_flax.models.variants import Expected, multiple_of, several

HEAD_DIM = 32
SLOT_GRID = 8  # slots start as the means over an 8×8 grid
SLOTS = SLOT_GRID**2
NORM_EPSILON = 1e-6  # of the layer norms
KINDS = Expected(
    'a text of the letters G (GLMix) and A (attention), such as "GA"',
    lambda x: isinstance(x, str) and bool(x) and set(x) <= {"G", "A"},
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """The numbers that define a GLNet. Heads are 32 channels wide in all of them."""

    dim: Annotated[int, multiple_of(HEAD_DIM)]  # channels of stage 1; each stage doubles them
    depths: tuple[int, int, int, int]
    mlp_ratio: int
    # Of each stage, in turn: G GLMix, A attention.
    blocks: Annotated[tuple[str, str, str, str], several(4, KINDS)]
    convolutional: bool  # 3×3 convolutions as embeddings, position encodings and inside the MLPs;
    #                      without (STL) the frame is that of Swin-T, for comparison with it
    learned_slots: bool  # the slots start from parameters instead of from the map
    layer_scale: float | None  # initial γ
    token_labelling: bool
    drop_path: float  # rate of the last block; the first has 0, linear between


class MultiHeadAttention(nnx.Module):
    """Softmax attention of all tokens with all; [B, N, C] → the same."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        xavier = jax.nn.initializers.xavier_uniform()
        self.heads = dim // HEAD_DIM
        self.qkv = linear(dim, 3 * dim, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, HEAD_DIM)
        query, key, value = (qkv[:, :, part] for part in range(3))
        out = attention(query, key, value)
        return self.proj(out.reshape(x.shape))


def cosine_similarity(
    slots: Float[Array, "B S C"], pixels: Float[Array, "B L C"]
) -> Float[Array, "B S L"]:
    """Compares every slot with every pixel, in float32; lengths count as at least 1e-12."""

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
        self.mlp: Mlp | ConvMlp
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
