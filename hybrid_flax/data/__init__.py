"""Images from disk to uint8 batches: sources, decoding, augmentation, the loader."""

from hybrid_flax.data.augmentation.operations import augment_op
from hybrid_flax.data.images import eval_crop
from hybrid_flax.data.model_input import imagenet_classes, model_input, normalise

__all__ = ["augment_op", "eval_crop", "imagenet_classes", "model_input", "normalise"]
