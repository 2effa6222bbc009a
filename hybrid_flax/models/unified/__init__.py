"""One meta-architecture, five token mixers."""

from hybrid_flax.models.unified.model import FAMILY, MIXERS, PUBLISHED, VARIANTS, Unified, Variant

__all__ = ["FAMILY", "MIXERS", "PUBLISHED", "VARIANTS", "Unified", "Variant"]
