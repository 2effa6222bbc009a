"""How the weights of a checkpoint differ from those that a model has, in a few lines."""

import itertools
import re
from collections.abc import Sequence

_SHOWN = 3  # of each kind


def summary(missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str] = ()) -> str:
    """Counts the differences, and shows some of each kind with what all of that kind share.

    Args:
      missing: names that the model has and the checkpoint has not.
      unexpected: names that only the checkpoint has.
      shapes: of names that both have, "NAME: what differs".

    Returns:
      At most 15 lines, each behind two blanks; "" without a difference.
    """
    kinds = {
        "missing from the checkpoint": missing,
        "only in the checkpoint": unexpected,
        "of another shape or type": shapes,
    }
    lines: list[str] = []
    for kind, names in kinds.items():
        if names:
            lines.append(f"  {len(names)} {kind}{_in_common(names)}:")
            lines += [f"    {name}" for name in names[:_SHOWN]]
            lines += [f"    … and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "\n".join(lines)


def _in_common(lines: Sequence[str]) -> str:
    """How all names begin and end, in whole parts: ", all beginning with module."."""
    if len(lines) < 2:
        return ""
    names = [re.split(r"(?<=[./])", line.partition(": ")[0]) for line in lines]
    begin = "".join(_shared(names))
    end = "".join(reversed(_shared([name[::-1] for name in names])))
    found = [f"beginning with {begin}"] * bool(begin) + [f"ending in {end}"] * bool(end)
    return f", all {' and '.join(found)}" if found else ""


def _shared(names: list[list[str]]) -> list[str]:
    """The parts with which all begin."""
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
    return [parts[0] for parts in same]
