"""A trunk and its heads: what all Gramian attention models have in common."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.errors import InputError
from hybrid_flax.layers import split_key
from hybrid_flax.models.backbone import Backbone, ImageSize, Maps, sides
from hybrid_flax.models.gramian.heads import Head
from hybrid_flax.models.info import EvalTransform, ModelInfo
from hybrid_flax.models.structure import Structure
from hybrid_flax.models.variants import multiple_of

# What the kinds have in common; they add their blocks.
STRUCTURE = Structure(
    stem=r"trunk/stem/",
    blocks=r"trunk/stages/(\d+)/(\d+)/",
    after_blocks=r"trunk/stage5/",
    end=r"heads/",
    classifier=r"heads/\d+/classifier/",
)


# The Gramian's vector has g(g + 1)/2 entries, which the embedding takes in 8 groups.
GRAM_DIM = multiple_of(16)
# Of each kind's `tiny` model; the taps are places in stage 3 whose maps are aggregated, too.
TINY_HEADS = {"gram_dim": 16, "heads": 2, "taps": 1}


def check_size(image_size: ImageSize, unit: int, family: str) -> None:
    """Raises InputError unless both sides are multiples of `unit`."""
    if any(side < unit or side % unit for side in sides(image_size)):
        raise InputError(f"image_size={image_size}: {family} needs a multiple of {unit}")


class Trunk(nnx.Module):
    """The part below the heads: `trunk(images, train, key)` gives its named maps, in order.

    The heads see the one that `top` names. (Not the last: under `jit` names come in their order.)
    """

    top: ClassVar[str] = "stage5"
    slack: ClassVar[tuple[int, int]] = (0, 0)  # pixels below and above its size that it takes

    def __call__(
        self, images: Float[Array, "B H W 3"], train: bool = False, key: jax.Array | None = None
    ) -> Maps:
        raise NotImplementedError


class GramianNet(Backbone):
    """Images [B, H, W, 3], normalised, to the sum of the heads' logits; training: to each head's.

    A kind of model says what its trunk is and what its heads are:

    - `trunk_class(variant, image_size, dtype=, rngs=)`, a `Trunk`.
    - `make_head(variant, num_classes, dtype=, rngs=)`. Variants say how many there are.

    Both are given `implementation=` too where the kind `has_kernels`.
    """

    trunk_class: ClassVar[Callable[..., Trunk]]

    def make_head(self, variant: Any, num_classes: int, **options: Any) -> Head:
        """Builds one head; all are alike."""
        raise NotImplementedError

    def __init__(
        self,
        variant: Any,
        *,
        num_classes: int,
        image_size: ImageSize,
        dtype: DTypeLike,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        if self.has_kernels:
            options["implementation"] = implementation
        self.trunk = type(self).trunk_class(variant, image_size, **options)
        self.heads = nnx.List(
            [self.make_head(variant, num_classes, **options) for _ in range(variant.heads)]
        )
        self.image_size = image_size
        self.num_classes = num_classes
        self.dtype = dtype

    def __call__(
        self, images: Array, *, train: bool = False, key: jax.Array | None = None
    ) -> Float[Array, "*heads B classes"]:
        """Evaluation: the sum (not the mean) of the heads' logits, float32 [B, classes].

        `train=True`: the logits of each head, float32 [heads, B, classes], for `losses.gramian`;
        it needs a PRNG `key` for drop path, and updates the batch norms' running statistics.
        """
        if not (train and self.num_classes):
            return super().__call__(images, train=train, key=key)
        return self.intermediates(images, train=train, key=key)["head_logits"]

    def refusal(self, height: int, width: int) -> str | None:
        (below, above), built = self.trunk.slack, sides(self.image_size)
        if all(
            own - below <= side <= own + above
            for side, own in zip((height, width), built, strict=True)
        ):
            return None
        low, high = (
            " and ".join(f"{own + by}" for own in dict.fromkeys(built)) for by in (-below, above)
        )
        taken = f"from {low} to {high}" if below or above else f"of {low}"
        return (
            f"this {type(self).__name__} was built for image_size={self.image_size} and takes "
            f"heights and widths {taken}. Resize the images, or build the model for their size: "
            'create_model("ga_...", image_size=...)'
        )

    def maps(self, x: Float[Array, "B H W 3"], train: bool, key: jax.Array | None) -> Maps:
        """Computes every named map on the way, in order; NHWC.

        The trunk's: `stem`, `stage1` to `stage4`, `aggregate`, `stage5`, and what is its own. Of
        head k: `hK_contract` and `hK_layer` [B, H, W, g], `hK_gram` [B, g(g + 1)/2], `hK_embed`
        [B, D], `hK_class_attn` and `hK_mlp` [B, 1, D], `pooled_K` [B, D]. `head_logits` [heads, B,
        num_classes]; `logits`, their sum.
        """
        trunk_key, *head_keys = split_key(key, 1 + len(self.heads))
        maps = self.trunk(x, train, trunk_key)
        x = maps[self.trunk.top]
        head_logits = []
        for k, (head, head_key) in enumerate(zip(self.heads, head_keys, strict=True)):
            found = head(x, train, head_key)
            if self.num_classes:
                head_logits.append(found.pop("logits"))
            pooled = found.pop("pooled")
            maps |= {f"h{k}_{name}": value for name, value in found.items()}
            maps[f"pooled_{k}"] = pooled
        if self.num_classes:
            maps["head_logits"] = jnp.stack(head_logits)
            maps["logits"] = maps["head_logits"].sum(0)
        return maps


def published(top1: float | None, parameters: int, gflops: float | None) -> ModelInfo:
    """Builds the entry of a model of this paper: no weights were released."""
    return ModelInfo(
        paper="Gramian Attention Heads, arXiv:2310.16483",
        top1=top1,
        parameters=parameters,
        gflops=gflops,
        image_size=224,
        eval_transform=EvalTransform(0.875, "center", "bicubic"),
        trained_on="ImageNet-1k",
        release_file="",
        release_page="https://github.com/Lab-LVM/imagenet-models",
        licence="Apache-2.0",
    )
