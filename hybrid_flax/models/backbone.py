"""What all models have in common."""

from typing import Any

from flax import nnx


class Backbone(nnx.Module):
    """A model of the registry: images [B, H, W, 3], normalised, to logits [B, num_classes].

    Built as `Class(variant, num_classes=, image_size=, dtype=, rngs=)`, and with
    `implementation="auto"`, "pallas" or "xla" where `has_kernels` says so.
    """

    @staticmethod
    def has_kernels(variant: Any) -> bool:
        """Whether models of this variant call operations of `pallas/`, which can be chosen."""
        return False
