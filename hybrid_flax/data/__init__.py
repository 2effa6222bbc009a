"""Images from disk to uint8 batches: sources, decoding, augmentation, the loader."""

from hybrid_flax.data.augmentation.operations import augment_op
from hybrid_flax.data.images import eval_crop

__all__ = ["augment_op", "eval_crop"]
