"""Hybrid convolution/attention vision backbones in JAX: train, port and fine-tune.

import hybrid_flax
model = hybrid_flax.create_model("gcvit_b")
logits = model(images)  # [B, 224, 224, 3], normalised → [B, 1000]
"""

# Loaded on first use, so that processes which only read images import neither JAX nor Flax.
_PUBLIC = ("create_model", "list_models", "model_info", "model_variant")

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        from hybrid_flax.models import registry

        return getattr(registry, name)
    raise AttributeError(f"module 'hybrid_flax' has no attribute {name!r}")
