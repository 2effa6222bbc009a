"""GLNet: vision networks of GLMix blocks (Zhu et al., NeurIPS 2024, arXiv:2411.14429)."""

from hybrid_flax.models.glnet.blocks import (
    GLMix,
    MapAttention,
    MultiHeadAttention,
    Variant,
    cosine_similarity,
)
from hybrid_flax.models.glnet.mix_token import mix_token_box, swap_box
from hybrid_flax.models.glnet.model import FAMILY, PUBLISHED, VARIANTS, GLNet

__all__ = [
    "FAMILY",
    "PUBLISHED",
    "VARIANTS",
    "GLMix",
    "GLNet",
    "MapAttention",
    "MultiHeadAttention",
    "Variant",
    "cosine_similarity",
    "mix_token_box",
    "swap_box",
]
