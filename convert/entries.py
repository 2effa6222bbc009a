"""Finds the weights among what a training checkpoint holds."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from convert.pickles import StandIn
from convert.tensors import is_array, shorten
from hybrid_flax.errors import InputError

# Where training scripts put the weights, in the order in which we look.
_USUAL = ("state_dict", "model", "state_dict_ema", "model_ema")
_ITSELF = "."  # the file itself, as an entry
_DEPTH = 4
_OF_TRAINING = re.compile(r"optim|sched|scaler|loss|criterion|grad|^amp$|^rng", re.IGNORECASE)
AVERAGED = re.compile(r"ema|avg|average|swa|teacher|momentum", re.IGNORECASE)


class Found(NamedTuple):
    """Weights in a file."""

    weights: Mapping[Any, Any]
    entry: str  # where: "state_dict", "model/module", "." for the file itself
    others: list[str]  # entries with about as many weights, or more


def find_weights(content: Any, entry: str | None, published: str | None, path: str) -> Found:
    """Finds the entry that holds the weights.

    Args:
      content: of the file.
      entry: the one that is asked for; None: that which is found. If it ends with a dot, what
        follows the last slash is a prefix of keys, of which those weights have the rest.
      published: where its authors put the weights of a released file. It decides if it is there.
      path: for messages.

    Raises:
      InputError: no weights, not the entry that is asked for, or several and none of a usual name.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary with weights")
    found = dict(_candidates(content))
    if entry is not None and entry.endswith(".") and entry != _ITSELF:
        where, _, prefix = entry.rpartition("/")
        whole = find_weights(content, where or None, published, path)
        begun = {key: value for key, value in whole.weights.items() if str(key).startswith(prefix)}
        if not begun:
            raise InputError(f"{path} has no keys that begin with {prefix!r} under {whole.entry}")
        return Found({key[len(prefix) :]: begun[key] for key in begun}, entry, [])
    if entry is not None:
        asked = _at(content, entry)
        if not isinstance(asked, Mapping):
            raise InputError(
                f"{path} has no entry {entry!r} with weights; it has {_listed(found or content)}"
            )
        return Found(asked, entry, [])
    if not found:
        raise InputError(
            f"{path} has no weights under any of {', '.join(_USUAL)}, nor is it a bare state_dict; "
            f"its entries are {_listed(content)}" + _objects(content)
        )
    counts = {name: sum(map(is_array, weights.values())) for name, weights in found.items()}
    first = published if published in found else _first(counts, path)
    others = [
        name
        for name in found
        if name not in (first, _ITSELF) and counts[name] >= 0.9 * counts[first]
    ]
    return Found(found[first], first, others)


def _objects(content: Mapping[Any, Any]) -> str:
    """Which entry is an object whose code is not here, and what to do about it; "" for none."""
    for name, value in content.items():
        if isinstance(value, StandIn) and value.stands_for:
            return (
                f". {shorten(str(name))} is an object of {value.stands_for}, which needs the code "
                "of that class. Where that is to be had, save its state_dict()"
            )
    return ""


def _first(counts: Mapping[str, int], path: str) -> str:
    """Which of the entries with arrays, {name: their number}, holds the weights."""
    usual = [name for part in _USUAL for name in counts if name.split("/")[0] == part]
    if usual:
        return next((name for name in usual if "/" not in name), usual[0])
    most = [name for name, count in counts.items() if count == max(counts.values())]
    raw = [name for name in most if not AVERAGED.search(name)] or most
    if len(raw) > 1:
        raise InputError(
            f"{path} has weights under {_listed(raw)}: name one with --entry={raw[0]} "
            "(in Python, entry=)"
        )
    return raw[0]


def _at(content: Mapping[Any, Any], entry: str) -> Any:
    """What lies under "model", "ema/module" or "."; None for nothing."""
    if entry == _ITSELF:
        return content
    found: Any = content
    for part in [entry] if entry in content else entry.strip("/").split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _candidates(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """(entry, dictionary with arrays) at any depth, but for those of optimizers and the like."""
    seen: set[int] = set()

    def walk(found: Mapping[Any, Any], parts: tuple[str, ...]):
        if id(found) in seen or len(parts) > _DEPTH:
            return
        seen.add(id(found))
        if any(map(is_array, found.values())):
            yield "/".join(parts) or _ITSELF, found
        for name, value in found.items():
            is_inner = isinstance(value, Mapping) and isinstance(name, str)
            if is_inner and not _OF_TRAINING.search(name):
                yield from walk(value, (*parts, name))

    yield from walk(content, ())


def _listed(names: Any) -> str:
    names = [shorten(str(name), 60) for name in names]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more if names else "none"
