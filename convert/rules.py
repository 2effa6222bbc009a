"""The form of a family's conversion rules, which its file in this folder exports as `RULES`."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from convert.official import Official

Pairs = tuple[tuple[str, str], ...]


def rename(key: str, pairs: Pairs) -> str:
    """Applies (regular expression, replacement) in order."""
    for pattern, replacement in pairs:
        key = re.sub(pattern, replacement, key)
    return key


class Rules(NamedTuple):
    """Names and layouts of the parameters of one class of models in its release.

    `RULES` of a file is {class: its rules}. Where the keys depend on the variant, `renames` and
    `layouts` are functions of the model.
    """

    # (regular expression, replacement), applied in order, that turn our paths, without collection
    # (`stages/0/norm/scale`) into the release's keys with "/" for ".".
    renames: Pairs | Callable[[Any], Pairs]
    # (regular expression on our path, axes) where an array is laid out otherwise than its name and
    # rank say: "c -> 1 c 1 1".
    layouts: Pairs | Callable[[Any], Pairs] = ()
    # {key: array} of entries of the release that follow from the architecture.
    derived_buffers: Callable[[Any], Mapping[str, np.ndarray]] = lambda model: {}
    # {name of a model: where the official code makes it}
    official: Mapping[str, Official] = {}
    # (regular expression, replacement), applied in order, that turn the release's keys into timm's,
    # where timm has the models; None where it has not.
    timm: Pairs | None = None
