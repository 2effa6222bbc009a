"""GA-ViT-S: Gramian attention heads on ViT-S/16 (Touvron et al., ICML 2021, arXiv:2012.12877).

A reconstruction: the authors published results for it, but no code and no weights. Known are its
rounded counts: 22.9 million parameters with one head, 27.7 with five, 4.3 GFLOPs; this model has
22.870 and 27.691 million, 4.33 GFLOPs if the products inside attention are left out, as the authors
do. All of the following is inferred from them, and about 50 other settings of the heads meet them
as well: a plain ViT-S/16 without class token, no aggregation, heads as GA-ConvNeXt's but without a
gram layer, with 128 channels in the Gramian and 6 in each head of the class attention.

Everything starts normal with deviation 0.02, biases at 0; norms have ε = 1e-6 in the trunk.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.layers import (
    Mlp,
    attention,
    conv,
    drop_path,
    drop_path_rates,
    layer_norm,
    linear,
    normal_init,
    run_blocks,
    split_key,
)
from hybrid_flax.models.backbone import Family, ImageSize, sides
from hybrid_flax.models.gramian.heads import Head
from hybrid_flax.models.gramian.network import (
    GRAM_DIM,
    STRUCTURE,
    GramianNet,
    Trunk,
    check_size,
    published,
)
from hybrid_flax.models.variants import multiple_of

PATCH = 16
HEAD_DIM = 64
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Variant:
    """The numbers that define a GA-ViT. Heads of the trunk are 64 channels wide."""

    dim: Annotated[int, multiple_of(HEAD_DIM)]
    depth: int
    head_channels: int  # of the class attention
    gram_dim: Annotated[int, GRAM_DIM]
    drop_path: float  # of the last block; the first has 0, linear between
    heads: int = 5


class Block(nnx.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); [B, N, C] → the same."""

    def __init__(self, dim: int, drop_path_rate: float, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = layer_norm(dim, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.qkv = linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(dim, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, 4 * dim, dtype=dtype, rngs=rngs)
        self.drop_path_rate = drop_path_rate

    def __call__(
        self, x: Float[Array, "B N C"], key: jax.Array | None = None
    ) -> Float[Array, "B N C"]:
        keys = split_key(key, 2)
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, -1, HEAD_DIM)
        query, key_, value = (qkv[:, :, part] for part in range(3))
        out = attention(query, key_, value)
        x = x + drop_path(self.proj(out.reshape(x.shape)), self.drop_path_rate, keys[0])
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, keys[1])


class ViT(Trunk):
    """The trunk: patches of 16×16 pixels with learned positions, blocks, a norm."""

    top = "norm"

    def __init__(
        self, variant: Variant, image_size: ImageSize, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        check_size(image_size, PATCH, "GA-ViT")
        dim = variant.dim
        self.patches = conv(
            3,
            dim,
            PATCH,
            stride=PATCH,
            padding=0,
            use_bias=True,
            kernel_init=normal_init,
            dtype=dtype,
            rngs=rngs,
        )
        height, width = sides(image_size)
        tokens = (height // PATCH) * (width // PATCH)
        self.positions = nnx.Param(normal_init(rngs.params(), (tokens, dim), jnp.float32))
        (rates,) = drop_path_rates(variant.drop_path, (variant.depth,))
        self.blocks = nnx.List([Block(dim, rate, dtype=dtype, rngs=rngs) for rate in rates])
        self.norm = layer_norm(dim, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(
        self, images: Float[Array, "B H W 3"], train: bool = False, key: jax.Array | None = None
    ) -> dict[str, Float[Array, "..."]]:
        """`stem`, `blocks` and `norm`, all [B, H/16, W/16, C]."""
        patches = self.patches(images)
        x = patches.reshape(len(patches), -1, patches.shape[-1])
        x = x + self.positions[None].astype(self.dtype)
        maps = {"stem": x.reshape(patches.shape)}
        *_, x = run_blocks(self.blocks, x, key)
        maps["blocks"] = x.reshape(patches.shape)
        maps["norm"] = self.norm(maps["blocks"])
        return maps


class GAViT(GramianNet):
    """GA-ViT-S, a reconstruction. Heights and widths of image_size only, a multiple of 16."""

    trunk_class = ViT
    structure = STRUCTURE._replace(
        stem=r"trunk/(?:patches/|positions$)",
        blocks=r"trunk/blocks/(\d+)/",
        end=r"trunk/norm/|heads/",
        position_map=r"trunk/positions$",
    )
    feature_maps = ("norm",)  # of stride 16

    def make_head(self, variant: Variant, num_classes: int, **options) -> Head:
        return Head(
            variant.dim,
            num_classes,
            gram_dim=variant.gram_dim,
            head_channels=variant.head_channels,
            **options,
        )


def tiny(variant: Variant) -> dict[str, Any]:
    """Arguments of `create_model` for a model of a few small blocks, for tests."""
    return {
        "image_size": 32,
        "dim": 64,
        "depth": 2,
        "head_channels": 2,
        "gram_dim": 16,
        "heads": 2,
    }


# ----------------------------------------------------------------------------- the published one

VARIANTS = {"ga_vit_s": Variant(384, 12, 6, 128, 0.1)}

# Parameters of this reconstruction (published: 27.7 million); top-1 and FLOPs as the authors'
# README prints them. Drop path is our choice.
PUBLISHED = {"ga_vit_s": published(80.9, 27_691_016, 4.3)}

FAMILY = Family(GAViT, VARIANTS, PUBLISHED, tiny)
