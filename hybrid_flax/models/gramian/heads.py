"""The Gramian attention head: a class token made of second-order statistics, and its attention."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    BatchNorm,
    BiasedOptions,
    PointwiseConv,
    attention,
    layer_norm,
    layer_scale,
    linear,
    normal_init,
    scaled,
)

ATTENTION_HEADS = 8
EMBEDDING_GROUPS = 8


def gramian_vector(x: Float[Array, "B H W g"]) -> Float[Array, "B pairs"]:
    """Measures how channels agree: the upper triangle of MᵀM, as a unit vector, float32.

    M [N, g] has a row for each place. The g(g + 1)/2 entries, diagonal included, come row by row:
    (0,0), (0,1), …, (0,g-1), (1,1), …; groups of the embedding that follows depend on that order.
    """
    batch, height, width, channels = x.shape
    # The two divisions cancel in the unit vector; they matter where a map is all but zero. The
    # official ConvNeXt trains with float64 here if a device has less than 128 images; we do not.
    places = x.astype(jnp.float32).reshape(batch, height * width, channels) / height
    gramian = jnp.einsum("bni,bnj->bij", places, places, precision=jax.lax.Precision.HIGHEST)
    gramian = (gramian / (height * width)).reshape(batch, channels * channels)
    rows, columns = np.triu_indices(channels)
    triangle = gramian.at[:, (rows * channels + columns).astype(np.int32)].get(
        mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
    )
    # The norm, at least 1e-12; written so that its gradient exists at zero.
    square = jnp.sum(jnp.square(triangle), axis=1, keepdims=True)
    return triangle / jnp.sqrt(jnp.maximum(square, 1e-24))


def shuffle_channels(x: Float[Array, "*B C"], groups: int) -> Float[Array, "*B C"]:
    """out[a·C/groups + b] = in[b·groups + a]: the inverse of ShuffleNet's channel shuffle."""
    return x.reshape(*x.shape[:-1], -1, groups).swapaxes(-1, -2).reshape(x.shape)


class GroupedMlp(nnx.Module):
    """Linear → GELU → channel shuffle → linear, both in groups; [B, 1, C] → [B, 1, C]."""

    def __init__(
        self, dim: int, groups: int, *, kernel_init: Initializer, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        options: BiasedOptions = {
            "use_bias": True,
            "kernel_init": kernel_init,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.fc1 = PointwiseConv(dim, 4 * dim, groups=groups, **options)
        self.fc2 = PointwiseConv(4 * dim, dim, groups=groups, **options)
        self.groups = groups

    def __call__(self, x: Float[Array, "B 1 C"]) -> Float[Array, "B 1 C"]:
        x = jax.nn.gelu(self.fc1(x), approximate=False)
        return self.fc2(shuffle_channels(x, self.groups))


class ClassAttention(nnx.Module):
    """The first token asks, all tokens answer; [B, 1 + N, C] → [B, 1, C]."""

    def __init__(self, dim: int, head_channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        inner = ATTENTION_HEADS * head_channels
        self.q = linear(dim, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.k = linear(dim, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.v = linear(dim, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.proj = linear(inner, dim, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "B M C"]) -> Float[Array, "B 1 C"]:
        query, key, value = (
            projected.reshape(*projected.shape[:2], ATTENTION_HEADS, -1)
            for projected in (self.q(tokens[:, :1]), self.k(tokens), self.v(tokens))
        )
        out = attention(query, key, value)
        return self.proj(out.reshape(len(tokens), 1, -1))


class Head(nnx.Module):
    """One classifier: contraction → gram layer → Gramian → embedding → class attention → logits.

    Args:
      dim: C, channels of the map.
      gram_dim: g; the Gramian's vector has g(g + 1)/2 entries.
      head_channels: of each of the 8 heads of the class attention.
      contraction_groups, mlp_groups: of the contraction and of the class attention's MLP.
      gram_layer: a block of the trunk's kind, g channels wide, `layer(x, key)`; None for none.
      kernel_init: of what are convolutions in the official code (all but the attention's linear
        layers and the classifier).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        gram_dim: int,
        head_channels: int,
        contraction_groups: int = 1,
        mlp_groups: int = 4,
        gram_layer: nnx.Module | None = None,
        kernel_init: Initializer = normal_init,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: BiasedOptions = {
            "use_bias": True,
            "kernel_init": kernel_init,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.contraction = PointwiseConv(dim, gram_dim, groups=contraction_groups, **options)
        self.contraction_norm = BatchNorm(gram_dim, dtype=dtype)
        self.gram_layer = gram_layer
        pairs = gram_dim * (gram_dim + 1) // 2
        self.embedding = PointwiseConv(pairs, dim, groups=EMBEDDING_GROUPS, **options)
        self.embedding_norm = BatchNorm(dim, dtype=dtype)
        self.norm1 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.attn = ClassAttention(dim, head_channels, dtype=dtype, rngs=rngs)
        self.gamma1 = layer_scale(dim, 1e-4)
        self.norm2 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.mlp = GroupedMlp(dim, mlp_groups, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.gamma2 = layer_scale(dim, 1e-4)
        self.num_classes = num_classes
        if num_classes:
            self.classifier = linear(dim, num_classes, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False, key: jax.Array | None = None
    ) -> dict[str, Float[Array, "..."]]:
        """Every map on the way, in order; the last, `logits`, is float32 [B, num_classes], if any.

        The embedding's batch norm sees one vector per image, so training needs two images.
        """
        maps = {"contract": (y := self.contraction_norm(self.contraction(x), train))}
        if self.gram_layer is not None:
            maps["layer"] = y = self.gram_layer(y, key)
        maps["gram"] = gramian_vector(y)
        maps["embed"] = self.embedding_norm(self.embedding(maps["gram"]), train)

        token = maps["embed"][:, None]
        tokens = jnp.concatenate([token, x.reshape(len(x), -1, x.shape[-1])], axis=1)
        maps["class_attn"] = self.attn(self.norm1(tokens))
        token = token + scaled(maps["class_attn"], self.gamma1)
        maps["mlp"] = self.mlp(self.norm2(token))
        token = token + scaled(maps["mlp"], self.gamma2)
        maps["pooled"] = token[:, 0]
        if self.num_classes:
            maps["logits"] = self.classifier(maps["pooled"].astype(jnp.float32))
        return maps
