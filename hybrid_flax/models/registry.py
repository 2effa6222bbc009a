"""Models by name. A new family adds one line to `_FAMILIES`."""

import dataclasses
import difflib
import fnmatch
import warnings

import jax
from flax import nnx
from jax.typing import DTypeLike

from hybrid_flax.errors import InputError
from hybrid_flax.models import gcvit, glnet, gramian, l2vit, unified
from hybrid_flax.models.info import ModelInfo
from pallas.dispatch import IMPLEMENTATIONS

_FAMILIES = (
    (gcvit.GCViT, gcvit.VARIANTS, gcvit.PUBLISHED),
    (l2vit.L2ViT, l2vit.VARIANTS, l2vit.PUBLISHED),
    (glnet.GLNet, glnet.VARIANTS, glnet.PUBLISHED),
    *gramian.FAMILIES,
    (unified.Unified, unified.VARIANTS, unified.PUBLISHED),
)


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models that match a shell pattern, sorted: `list_models("gcvit*")`."""
    names = [name for _, variants, _ in _FAMILIES for name in variants]
    return sorted(fnmatch.filter(names, pattern))


def model_info(name: str) -> ModelInfo:
    """Published accuracy, size, evaluation transform, release file and licence of a model.

    Raises InputError for an unknown name.
    """
    _, _, published = _family(name)
    return published[name]


def model_variant(name: str):
    """The row of the family's table of variants: a dataclass of the numbers that define the model.

    Raises InputError for an unknown name.
    """
    _, variants, _ = _family(name)
    return variants[name]


def create_model(
    name: str,
    *,
    num_classes: int,
    image_size: int | None,
    dtype: DTypeLike,
    rngs: nnx.Rngs | None,
    implementation: str = "auto",
    **overrides,
) -> nnx.Module:
    """`hybrid_flax.create_model`, which has the defaults and says what they mean, but always fresh.

    Raises InputError for an unknown name or override, or a size the family cannot be built for.
    """
    model_class, variants, published = _family(name)
    variant = variants[name]
    if "attention" in overrides:  # until version 0.2
        warnings.warn("attention= is now implementation=", FutureWarning, stacklevel=3)
        implementation = overrides.pop("attention")
    known = [field.name for field in dataclasses.fields(variant)]
    for override in overrides:
        if override not in known:
            raise InputError(
                f"{name} has no field {override!r} to override; it has {', '.join(known)}"
            )
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"implementation={implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    if num_classes < 1:
        raise InputError(f"num_classes={num_classes}: a classifier needs at least one class")
    if "depths" in overrides:
        depths, stages = overrides["depths"], len(variant.depths)
        if len(depths) != stages or min(depths) < 1:
            raise InputError(
                f"depths={depths}: {name} has {stages} stages, each of at least one block"
            )
    variant = dataclasses.replace(variant, **overrides)
    options = {}
    if model_class.has_kernels(variant):
        options = {"implementation": implementation}
    elif implementation != "auto":
        raise InputError(
            f"implementation={implementation!r}: {name} has no operation whose implementation "
            'could be chosen; leave it "auto"'
        )
    return model_class(
        variant,
        num_classes=num_classes,
        image_size=published[name].image_size if image_size is None else image_size,
        dtype=dtype,
        rngs=_Keys((nnx.Rngs(0) if rngs is None else rngs).params()),
        **options,
    )


class _Keys(nnx.Rngs):
    """Stands in for `nnx.Rngs` while a model is built: a new key for each parameter.

    `nnx.Rngs` counts in an array. Under a trace that is seconds of work for a large model with
    Flax 0.12.8; a Python counter costs nothing and depends on nothing but the order of the layers.
    """

    def __init__(self, key: jax.Array):
        self.key = key
        self.count = 0

    def params(self) -> jax.Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


def _family(name: str):
    for family in _FAMILIES:
        if name in family[1]:
            return family
    close = difflib.get_close_matches(name, list_models(), n=3)
    hint = f"Did you mean {', '.join(close)}?" if close else f"Known: {', '.join(list_models())}"
    raise InputError(f"unknown model {name!r}. {hint}")
