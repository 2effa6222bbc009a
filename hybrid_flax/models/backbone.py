"""The interface of all models, written once over the named maps that each family computes."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.errors import InputError
from hybrid_flax.models.info import ModelInfo
from hybrid_flax.models.structure import Structure


class Backbone(nnx.Module):
    """Images [B, H, W, 3], normalised, to logits [B, num_classes] in float32.

    A family computes `intermediates` and says what its parts are. Its constructor takes
    `(variant, *, num_classes, image_size, dtype, rngs)`, and `implementation` where it has kernels.
    """

    structure: ClassVar[Structure]
    has_kernels: ClassVar[bool] = False  # whether it has operations of `pallas/`
    feature_maps: tuple[str, ...] = ("stage1", "stage2", "stage3", "stage4")
    dense_map: ClassVar[str] = ""  # the map whose places the classifier can read; "": there is none

    image_size: int
    dtype: DTypeLike
    detection: bool = False  # a trunk for dense prediction, without a classifier

    def intermediates(
        self, images: Array, *, train: bool = False, key: jax.Array | None = None
    ) -> dict[str, Float[Array, "..."]]:
        """Every named map on the way, in order; NHWC. Under `jit`, unused maps cost nothing.

        What is pooled has a name that begins with `pooled`; the last is `logits`, unless the model
        has no classifier.

        Args:
          images: [B, H, W, 3], normalised.
          train: with drop path, which needs `key`, and batch statistics.

        Raises:
          InputError: images of a size or layout that the model does not take.
        """
        raise NotImplementedError

    def __call__(self, images: Array, *, train: bool = False, key: jax.Array | None = None) -> Any:
        """Logits, float32 [B, classes]. `train=True` needs a PRNG `key` for drop path.

        Raises:
          InputError: as `intermediates`; or the model has no classifier.
        """
        self._check_classifier()
        return self.intermediates(images, train=train, key=key)["logits"]

    def features(self, images: Array) -> list[Float[Array, "B _H _W _C"]]:
        """The maps named by `feature_maps`, for dense prediction: strides 4, 8, 16 and 32."""
        maps = self.intermediates(images)
        return [maps[name] for name in self.feature_maps]

    def dense_logits(self, images: Array) -> Float[Array, "B _H _W classes"]:
        """The logits of each place of the last map, whose mean is the image's; float32.

        Raises:
          InputError: the model's classifier reads the whole map, or there is none.
        """
        self._check_classifier()
        if not self.dense_map:
            raise InputError(
                f"{type(self).__name__} has no logits of places: its classifier reads the whole "
                "map. Take a GC ViT, L2ViT, GLNet or unified model"
            )
        return self.classify(self.intermediates(images)[self.dense_map])

    def classify(self, x: Float[Array, "*B C"]) -> Float[Array, "*B classes"]:
        """The classifier alone."""
        raise NotImplementedError

    def _check_classifier(self) -> None:
        if self.detection:
            raise InputError(
                f"this {type(self).__name__} was built with detection=True and has no classifier: "
                "call features(images), or build it with detection=False"
            )


class Family(NamedTuple):
    """A class of models, as the registry knows it."""

    model: type[Backbone]
    variants: Mapping[str, Any]  # {name: the numbers that define the model, a dataclass}
    published: Mapping[str, ModelInfo]
    tiny: Callable[
        [Any], dict[str, Any]
    ]  # arguments that make one of a few small blocks, for tests
