"""One meta-architecture, five token mixers."""

from hybrid_flax.models.unified.model import MIXERS, PUBLISHED, VARIANTS, Unified, Variant

__all__ = ["MIXERS", "PUBLISHED", "VARIANTS", "Unified", "Variant"]
