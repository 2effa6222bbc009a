"""Finds out by which names a file calls a model's weights: prefixes, and other code bases."""

import collections
import itertools
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from convert.entries import AVERAGED
from convert.rules import Pairs, rename
from convert.tensors import shorten
from hybrid_flax.errors import InputError

_PARTS = 12  # of a key, that are tried as a prefix

# Entries that tools put between the weights: thop's counts, the counter of averaged models.
_OF_TOOLS = re.compile(r"(^|\.)(total_ops|total_params|n_averaged|_extra_state)$")

# What a file of none of a model's keys is, by some keys that it has.
_OTHERS = {
    "timm's weights of GC ViT": (r"^stages\.0\.global_block\.blocks\.",),
    "timm's weights of ConvNeXt": (r"^stem\.0\.", r"^stages\.0\.blocks\.0\.conv_dw\."),
    "timm's weights of Swin": (r"^layers\.0\.blocks\.0\.attn\.(qkv|relative)", r"^patch_embed\."),
    "timm's weights of PVT v2": (r"^stages\.0\.blocks\.0\.attn\.kv\.", r"^patch_embed\."),
    "timm's weights of HaloNet": (r"^stem\.conv1\.conv\.", r"\.self_attn\.pos_embed"),
    "timm's weights of CSWin": (r"^stage1_conv_embed\.", r"^head\."),
    "timm's weights of ViT": (r"^cls_token$|^pos_embed$", r"^blocks\.0\.attn\.qkv\."),
    "timm's or torchvision's weights of ResNet": (r"^layer1\.0\.conv1\.", r"^bn1\."),
    "torchvision's weights": (r"^features\.0\.0\.", r"^(features|classifier|head)\."),
    "weights of Hugging Face's transformers": (r"(^|\.)encoder\.(layer|layers|stages)\.0\.",),
    "the authors' weights of GC ViT": (r"^levels\.0\.q_global_gen\.",),
}


class Renamed(NamedTuple):
    """A state_dict by a release's keys."""

    state: dict[str, Any]
    note: str  # what was done with the keys, for a person; "" for nothing


def release_keys(
    state: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    derived: Collection[str] = (),
    timm: Pairs | None = None,
) -> Renamed:
    """Gives the weights in a file the keys of the release.

    A prefix that all keys have that matter is taken off, and what lies beside is left out; timm's
    names are translated. A state_dict that has the release's keys, or none that are known, is left
    as it is.

    Args:
      state: {key: array} of the file.
      shapes: {key of the release: shape}, of all that a model needs.
      derived: keys of the release that it has not to have.
      timm: (regular expression, replacement), applied in order, that turn the release's keys into
        timm's, where that has the model.

    Raises:
      InputError: the file has the weights of several models under as many prefixes.
    """
    state = {key: array for key, array in state.items() if not _OF_TOOLS.search(key)}
    names = {"": {key: key for key in (*shapes, *derived)}}
    if timm is not None:
        names["timm"] = {rename(key, timm): key for key in shapes}
    found: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    for key in state:
        for prefix, rest in _splits(key):
            for base, known in names.items():
                if known.get(rest) in shapes:
                    found[base, prefix].add(rest)
    if not found:
        return Renamed(state, "")
    (base, prefix), *others = _ways({way: len(keys) for way, keys in found.items()})
    if 2 * len(found[base, prefix]) < len(shapes):
        return Renamed(state, "")
    return _renamed(state, shapes, names[base], base, prefix, [other for _, other in others])


def code_base(keys: Collection[str]) -> str:
    """Whose weights a file has of none of the keys that are expected; "" where it does not show."""
    some = itertools.islice(keys, 2000)
    keys = [rest for key in some for _, rest in _splits(key)]
    for name, patterns in _OTHERS.items():
        if all(any(re.search(pattern, key) for key in keys) for pattern in patterns):
            return name
    return ""


def _splits(key: str) -> list[tuple[str, str]]:
    """A key as (prefix with its dot, the rest), from the shortest prefix on."""
    parts = key.split(".", _PARTS)
    return [(".".join([*parts[:i], ""]), ".".join(parts[i:])) for i in range(len(parts))]


def _ways(counts: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The (code base, prefix) under which a file has a model's weights, then others as complete."""
    full = [way for way, count in counts.items() if count >= 0.9 * max(counts.values())]
    bare = [way for way in full if way[1] == ""]
    raw = bare or [way for way in full if not AVERAGED.search(way[1])] or full
    if len(raw) > 1:
        prefixes = ", ".join(repr(shorten(prefix)) for _, prefix in raw[:5])
        raise InputError(
            f"this file holds the weights of {len(raw)} models, under the prefixes {prefixes}: "
            f"take one, python -m convert NAME FILE --entry={raw[0][1]} (in Python, entry=)"
        )
    return raw + [way for way in full if way not in raw]


def _renamed(
    state: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    known: Mapping[str, str],
    base: str,
    prefix: str,
    others: Collection[str],
) -> Renamed:
    renamed, beside = {}, {}
    for key, array in state.items():
        if key.startswith(prefix) and not key.startswith(tuple(others)):
            rest = key.removeprefix(prefix)
            ours = known.get(rest, rest)
            # timm's squeeze-and-excite layers are 1×1 convolutions.
            if base and array.shape == (*shapes.get(ours, ()), 1, 1):
                array = array.reshape(shapes[ours])
            renamed[ours] = array
        else:
            beside[key] = array
    # A wrapper around a trunk may have the classifier itself.
    own = {key for key in beside if known.get(key) in shapes and known[key] not in renamed}
    renamed |= {known[key]: beside[key] for key in own}
    notes = ["these are timm's weights, whose names were translated"] if base else []
    if prefix:
        notes.append(f"the prefix {shorten(prefix)!r} was taken off the keys")
    left = [key for key in beside if key not in own]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        notes.append(f"left out as no part of the model: {', '.join(map(shorten, left[:3]))}{more}")
    return Renamed(renamed, "; ".join(notes))
