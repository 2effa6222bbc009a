"""The interface of all models, written once over the named maps that each family computes."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.errors import InputError
from hybrid_flax.layers import check_images, training_key
from hybrid_flax.models.info import ModelInfo
from hybrid_flax.models.structure import Structure

Maps = dict[str, Array]
ImageSize = int | tuple[int, int]  # of a square's sides, or (height, width); pixels


def sides(image_size: ImageSize) -> tuple[int, int]:
    """Height and width."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def square(image_size: ImageSize, family: str) -> int:
    """The side of a square; raises InputError that names the family for anything else."""
    if not isinstance(image_size, int):
        height, width = image_size
        raise InputError(
            f"image_size={image_size}: {family} is built for squares: its position tables and "
            f"windows are those of one side. Resize the images, for example to {max(height, width)}"
        )
    return image_size


class Backbone(nnx.Module):
    """Images [B, H, W, 3], normalised, to logits [B, num_classes] in float32.

    A family computes its `maps` and says what its parts are, and what it cannot take.
    """

    structure: ClassVar[Structure]
    has_kernels: ClassVar[bool] = False  # whether it has operations of `pallas/`
    feature_maps: tuple[str, ...] = ("stage1", "stage2", "stage3", "stage4")
    dense_map: ClassVar[str] = ""  # the map whose places the classifier can read; "": there is none

    image_size: ImageSize
    num_classes: int  # 0: without a classifier, a call gives what it would see
    dtype: DTypeLike
    detection: bool = False  # a trunk for dense prediction, without a classifier

    def __init__(
        self,
        variant: Any,
        *,
        num_classes: int,
        image_size: ImageSize,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Builds the model of a row of the family's variants.

        Args:
          variant: the numbers that define the model.
          num_classes: width of the classifier; 0: none is built.
          image_size: height and width in pixels that it is meant for.
          dtype: of the computation.
          rngs: where initial values come from.
          options: `implementation=` where the family has kernels.

        Raises:
          InputError: numbers or a size that do not fit.
        """
        raise NotImplementedError

    def intermediates(
        self, images: Array, *, train: bool = False, key: jax.Array | None = None
    ) -> Maps:
        """Every named map on the way, see `maps`. Under `jit`, those not used cost nothing.

        Args:
          images: [B, H, W, 3], normalised.
          train: with drop path, which needs `key`, and batch statistics.

        Raises:
          InputError: images of a size or layout that the model does not take; no key for training.
        """
        check_images(images)
        height, width = images.shape[1:3]
        if reason := self.refusal(height, width):
            raise InputError(f"images are {height}×{width}, but {reason}")
        return self.maps(images.astype(self.dtype), train, training_key(train, key))

    def maps(self, x: Float[Array, "B H W 3"], train: bool, key: jax.Array | None) -> Maps:
        """Computes every named map on the way, in order; NHWC.

        What is pooled [B, C] has a name that begins with `pooled`; the last is `logits`, float32
        [B, classes], unless the model has no classifier.

        Args:
          x: images in the model's dtype, of a size that is not refused.
          train: whether batch norms use the batch's statistics, and move the running ones.
          key: for drop path; None drops nothing.
        """
        raise NotImplementedError

    def refusal(self, height: int, width: int) -> str | None:
        """Says why images of this height and width cannot be taken; None if they can."""
        return None

    def __call__(self, images: Array, *, train: bool = False, key: jax.Array | None = None) -> Any:
        """Logits, float32 [B, classes]. `train=True` needs a PRNG `key` for drop path.

        Of a model with `num_classes=0` what its classifier would see, float32 [B, C]: the pooled
        last map; of several heads one after the other.

        Raises:
          InputError: as `intermediates`; or the model is a trunk for dense prediction.
        """
        self._check_not_trunk()
        maps = self.intermediates(images, train=train, key=key)
        if self.num_classes:
            return maps["logits"]
        pooled = [value for name, value in maps.items() if name.startswith("pooled")]
        return jnp.concatenate(pooled, axis=-1).astype(jnp.float32)

    def features(self, images: Array) -> list[Float[Array, "B _H _W _C"]]:
        """The maps named by `feature_maps`, for dense prediction: strides 4, 8, 16 and 32."""
        maps = self.intermediates(images)
        return [maps[name] for name in self.feature_maps]

    def dense_logits(self, images: Array) -> Float[Array, "B _H _W classes"]:
        """The logits of each place of the last map, whose mean is the image's; float32.

        Raises:
          InputError: the model's classifier reads the whole map, or there is none.
        """
        self._check_not_trunk()
        if not self.num_classes:
            raise InputError(
                f"this {type(self).__name__} was built with num_classes=0 and has no classifier: "
                "call features(images), or build it with classes"
            )
        if not self.dense_map:
            raise InputError(
                f"{type(self).__name__} has no logits of places: its classifier reads the whole "
                "map. Take a GC ViT, L2ViT, GLNet or unified model"
            )
        return self.classify(self.intermediates(images)[self.dense_map])

    def classify(self, x: Float[Array, "*B C"]) -> Float[Array, "*B classes"]:
        """The classifier alone."""
        raise NotImplementedError

    def _check_not_trunk(self) -> None:
        if self.detection:
            raise InputError(
                f"this {type(self).__name__} was built with detection=True and has no classifier: "
                "call features(images), or build it with detection=False"
            )

    def __repr__(self) -> str:
        """A summary of one screen: size, parts and their parameters."""
        counts: dict[str, int] = {}
        for path, leaf in nnx.to_flat_state(nnx.state(self, nnx.Param)):
            part = "/".join(map(str, path[: 2 if isinstance(path[1], int) else 1]))
            counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
        height, width = sides(self.image_size)
        lines = [
            f"{type(self).__name__}: {sum(counts.values()):,} parameters, images {height}×{width}, "
            f"{self.num_classes or 'no'} classes, {jnp.dtype(self.dtype).name}"
        ]
        lines += [f"  {part:<16}{count:>14,}" for part, count in counts.items()]
        return "\n".join(lines)

    __str__ = __repr__


class Family(NamedTuple):
    """A class of models, as the registry knows it."""

    model: type[Backbone]
    variants: Mapping[str, Any]  # {name: the numbers that define the model, a dataclass}
    published: Mapping[str, ModelInfo]
    # variant → arguments of `create_model` that make one of a few small blocks, for tests
    tiny: Callable[[Any], dict[str, Any]]
