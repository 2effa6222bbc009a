"""Models by name. A new family adds one line to `FAMILIES`."""

import difflib
import fnmatch
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_flax.errors import InputError
from hybrid_flax.models import gcvit, glnet, gramian, l2vit, unified
from hybrid_flax.models.backbone import Backbone, Family, ImageSize
from hybrid_flax.models.info import ModelInfo
from hybrid_flax.models.variants import whole, with_overrides
from pallas.dispatch import IMPLEMENTATIONS

FAMILIES: tuple[Family, ...] = (
    gcvit.FAMILY,
    l2vit.FAMILY,
    glnet.FAMILY,
    *gramian.FAMILIES,
    unified.FAMILY,
)


CLASSES = whole(0, 10**6)
SIDE = whole(1, 16384)
_DTYPES = ("bfloat16", "float16", "float32")


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models that match a shell pattern, sorted: `list_models("gcvit*")`."""
    names = [name for family in FAMILIES for name in family.variants]
    return sorted(fnmatch.filter(names, pattern))


def model_info(name: str) -> ModelInfo:
    """Published accuracy, size, evaluation transform, release file and licence of a model.

    Raises InputError for an unknown name.
    """
    return family_of(name).published[name]


def model_variant(name: str):
    """The row of the family's table of variants: a dataclass of the numbers that define the model.

    Raises InputError for an unknown name.
    """
    return family_of(name).variants[name]


def check_overrides(name: str, overrides: Mapping[str, Any]) -> None:
    """Raises InputError for an unknown name, and for fields or values that its Variant has not."""
    with_overrides(name, model_variant(name), overrides)


def tiny_model(name: str) -> dict[str, Any]:
    """Arguments of `create_model` that make a model of a few small blocks of it, for tests.

    Raises InputError for an unknown name.
    """
    return family_of(name).tiny(model_variant(name))


def create_model(
    name: str,
    *,
    num_classes: Any,  # this and the next are checked here, and named
    image_size: Any,
    dtype: Any,
    implementation: str = "auto",
    rngs: Any = None,
    **overrides,
) -> Backbone:
    """`hybrid_flax.create_model`, which has the defaults and says what they mean, but always fresh.

    Raises InputError for an unknown name or override, or a size the family cannot be built for.
    """
    family = family_of(name)
    variant = family.variants[name]
    if "attention" in overrides:
        warnings.warn(
            "create_model(attention=…) is now create_model(implementation=…); the old name will "
            "go with the next version",
            FutureWarning,
            stacklevel=3,
        )
        implementation = overrides.pop("attention")
    variant = with_overrides(name, variant, overrides)
    num_classes = _index(num_classes)
    if not CLASSES.fits(num_classes):
        raise InputError(f"num_classes={num_classes!r}: expected {CLASSES.words}; 0: no classifier")
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"implementation={implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation != "auto" and not family.model.has_kernels:
        raise InputError(
            f"implementation={implementation!r}: {name} has no operation with kernels to choose "
            "for; leave it 'auto'"
        )
    return family.model(
        variant,
        num_classes=num_classes,
        image_size=_size(family.published[name].image_size if image_size is None else image_size),
        dtype=_dtype(dtype),
        rngs=_Keys(_key(rngs)),
        **({"implementation": implementation} if family.model.has_kernels else {}),
    )


def _index(given: Any) -> Any:
    """A whole number of NumPy's, as `labels.max() + 1` gives, as Python's; others as they are."""
    try:
        return given if isinstance(given, bool) else operator.index(given)
    except TypeError:
        return given


def _dtype(given: Any) -> Any:
    try:
        known = "" if given is None else jnp.dtype(given).name
    except TypeError:
        known = ""
    if known not in _DTYPES and not (known == "float64" and jax.config.read("jax_enable_x64")):
        raise InputError(f"dtype={given!r}: expected one of {', '.join(_DTYPES)}")
    return given


def _key(rngs: Any) -> jax.Array:
    try:
        return (nnx.Rngs(0) if rngs is None else rngs).params()
    except AttributeError as error:
        raise InputError(
            f"rngs={type(rngs).__name__}: expected nnx.Rngs with a stream 'params' or 'default', "
            "such as nnx.Rngs(0)"
        ) from error


def _size(given: Any) -> ImageSize:
    """One number of a square, or (height, width)."""
    pair = isinstance(given, Sequence) and not isinstance(given, str)
    found = [_index(side) for side in (given if pair else (given, given))]
    if len(found) != 2 or not all(SIDE.fits(side) for side in found):
        raise InputError(
            f"image_size={given!r}: expected {SIDE.words} pixels, or two of them, (height, width)"
        )
    height, width = found
    return height if height == width else (height, width)


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


def family_of(name: str) -> Family:
    """The family that a model belongs to; raises InputError for an unknown name."""
    if not isinstance(name, str):
        raise InputError(f"a model's name is a text such as 'gcvit_b', not {name!r:.80}")
    for family in FAMILIES:
        if name in family.variants:
            return family
    close = difflib.get_close_matches(name.lower(), list_models(), n=3)
    hint = f"Did you mean {', '.join(close)}?" if close else f"Known: {', '.join(list_models())}"
    raise InputError(f"unknown model {name[:80]!r}. {hint}")
