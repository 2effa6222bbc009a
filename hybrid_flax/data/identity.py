"""Which data a run has: what is recorded with its checkpoints, and compared at the next start.

An image is known by its number, a class by the number of its name. So beside the counts stand the
names of the classes and digests: of the labels, and of the names and sizes of the files.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_flax.data.sources import EncodedSource
from hybrid_flax.errors import InputError

Fingerprint = dict[str, Any]

_SHOWN = 3  # classes in a message


def fingerprint(source: EncodedSource) -> Fingerprint:
    """Sums up one split: counts, and digests of files, class names and labels, where known."""
    found: Fingerprint = {
        "images": len(source),
        "classes": source.num_classes,
        "files": source.identity(),
    }
    if source.class_names is not None:
        found["names"] = _digest(json.dumps(list(source.class_names)).encode())
    if source.labels is not None:
        found["labels"] = _digest(source.labels.tobytes())
    return found


def describe(train: EncodedSource, val: EncodedSource) -> Fingerprint:
    """The fingerprints of both splits, and the names of the classes: for checkpoints."""
    names = train.class_names
    return {
        **fingerprint(train),
        "class_names": None if names is None else list(names),
        "val": fingerprint(val),
    }


def class_names(meta: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes, by number, that a checkpoint's meta has; None without any."""
    return (meta.get("data") or {}).get("class_names")


def has_no_names(meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was trained on data whose classes have numbers alone."""
    return (meta.get("data") or {}).get("class_names", "unknown") is None


def check_same_data(now: Fingerprint, before: Fingerprint, step: int) -> None:
    """Raises InputError if the data are not those a checkpoint was made with.

    Args:
      now: as `describe` gives it.
      before: what the checkpoint has of it. An older one has less, and only that is compared.
      step: of the checkpoint, for the message.
    """
    changes = []
    then, names = before.get("class_names"), now.get("class_names")
    if then and names and then != names:
        changes.append(class_changes(then, names))
    changes += _changes("training", before, now)
    changes += _changes("validation", before.get("val") or {}, now.get("val") or {})
    if changes:
        raise InputError(
            f"the data changed since the checkpoint of step {step} ({'; '.join(changes)}): the run "
            "would go on with other images or classes. Give it the same data, or begin another "
            "--workdir with --config.init_from= this one"
        )


def class_changes(then: Sequence[str], now: Sequence[str]) -> str:
    """Says how two lists of class names, which differ, do so."""
    gone, new = sorted(set(then) - set(now)), sorted(set(now) - set(then))
    parts = [f"{len(gone)} classes are gone: {shown(gone)}"] if gone else []
    parts += [f"{len(new)} classes are new: {shown(new)}"] if new else []
    if not parts:
        pairs = enumerate(zip(then, now, strict=False))
        number, (old, other) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        parts = [f"the classes are in another order: number {number} was {old!r}, is {other!r}"]
    return "; ".join(parts)


def shown(names: Sequence[str]) -> str:
    """Some of the names, for a message."""
    return ", ".join(map(repr, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")


def _changes(split: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs of one split, in words; digests say nothing that other counts do not."""
    differing = [name for name in before if name in now and before[name] != now[name]]
    counts = [
        f"{split} {name}: {before[name]} then, {now[name]} now"
        for name in ("images", "classes")
        if name in differing
    ]
    digests = {
        "labels": f"the labels of the {split} images are others",
        "files": f"names or sizes of the {split} files are others",
    }
    return counts or [words for name, words in digests.items() if name in differing]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
