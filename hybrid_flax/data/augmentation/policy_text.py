"""Reading the strings that policies are written as, like `rand-m9-mstd0.5-inc1`."""

import math
import re
from collections.abc import Collection, Mapping

from hybrid_flax.data.augmentation.magnitudes import Spread
from hybrid_flax.errors import InputError


def read_options(
    text: str,
    name: str,
    form: str,
    *,
    numbers: Collection[str],
    names: Mapping[str, Collection[str]] | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """Reads the parts of `name-key1-key2value`; the longest key that fits is meant.

    Args:
      form: how the string should look, for the error.
      numbers: keys whose value is a number.
      names: keys whose value is one of those names.

    Returns:
      ({key: number}, {key: name})

    Raises:
      InputError: another name, an unknown key or value, a key given twice.
    """
    first, *parts = text.split("-")
    names = names or {}
    found_numbers: dict[str, float] = {}
    found_names: dict[str, str] = {}
    for part in parts:
        key = max((k for k in (*numbers, *names) if part.startswith(k)), key=len, default="")
        value = part.removeprefix(key)
        if key in found_numbers or key in found_names:
            raise InputError(f"augmentation {text!r}: {key} is given twice")
        if key in numbers and (re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) or part == "mstdinf"):
            found_numbers[key] = float(value)
        elif key in names and value in names[key]:
            found_names[key] = value
        else:
            raise InputError(
                f"augmentation {text!r}: {part!r} is not understood; expected the form {form}"
            )
    if first != name:
        raise InputError(f"augmentation {text!r} is not understood; expected the form {form}")
    return found_numbers, found_names


def spread_of(options: Mapping[str, float]) -> Spread:
    """Reads the spread from mstd and mmax; without them, the magnitude itself, up to 10."""
    std = options.get("mstd", 0.0)
    # timm's strings cannot say "inf": it takes what is above 100 for it.
    return Spread(math.inf if std > 100 else std, options.get("mmax", 10.0))
