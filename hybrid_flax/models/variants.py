"""What the fields of a family's Variant may be: checked before anything is built.

By its type a field is a whole number from 1, a share from 0 to below 1, a switch, a text, or
several of one kind. What a family expects beyond that is written beside the type:
`dim: Annotated[int, multiple_of(32)]`.
"""

import dataclasses
import difflib
import math
import numbers
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hybrid_flax.errors import InputError

LARGEST = 65536  # of every whole number: wider and deeper than any model that fits into memory


class Expected(NamedTuple):
    """A test of a value, and words for it: "expected a multiple of 32"."""

    words: str
    fits: Callable[[Any], bool]


def whole(low: int = 1, high: int = LARGEST) -> Expected:
    """A whole number in a closed range."""
    return Expected(
        f"a whole number from {low} to {high}", lambda x: type(x) is int and low <= x <= high
    )


def multiple_of(unit: int) -> Expected:
    """A whole number of units, at least one."""
    inside = whole(unit)
    return Expected(
        f"a multiple of {unit}, up to {LARGEST}", lambda x: inside.fits(x) and x % unit == 0
    )


def one_of(*choices: str) -> Expected:
    """One of a few texts."""
    return Expected(" or ".join(f'"{choice}"' for choice in choices), lambda x: x in choices)


def several(count: int, each: Expected, last: Expected | None = None) -> Expected:
    """A tuple of `count` values of one kind; the last may have a rule of its own."""
    words = f"{count} values, each {each.words}"
    kinds = [each] * (count - 1) + [last or each]
    if last:
        words += f", the last {last.words}"

    def fits(x: Any) -> bool:
        return (
            isinstance(x, tuple)
            and len(x) == count
            and all(kind.fits(value) for kind, value in zip(kinds, x, strict=True))
        )

    return Expected(words, fits)


def key_of(table: Mapping[str, Any]) -> Expected:
    """A text that is a key of a table, which may grow."""
    return Expected(f"one of {', '.join(table)}", lambda x: isinstance(x, str) and x in table)


_SHARE = Expected("a number from 0 to below 1", lambda x: type(x) in (int, float) and 0 <= x < 1)
_SCALE = Expected(
    "a finite number above 0, or None",
    lambda x: x is None or (type(x) in (int, float) and 0 < x < math.inf),
)
_BY_TYPE: dict[Any, Expected] = {
    int: whole(),
    float: _SHARE,
    float | None: _SCALE,
    bool: Expected("True or False", lambda x: type(x) is bool),
    str: Expected("a text", lambda x: isinstance(x, str)),
}


def with_overrides(name: str, variant: Any, overrides: Mapping[str, Any]) -> Any:
    """A copy of the row `name` of a family's variants with other values.

    Raises:
      InputError: naming every field that there is not, and every value that cannot be used.
    """
    expected = _expected(type(variant))
    problems = [_unknown(name, field, expected) for field in overrides if field not in expected]
    changes = {}
    for field, value in overrides.items():
        if field in expected:
            changes[field] = value = _plain(value)
            if not expected[field].fits(value):
                shown = repr(value)
                shown = shown if len(shown) < 80 else f"{shown[:76]} …"
                problems.append(f"{name}: {field}={shown}: expected {expected[field].words}")
    if problems:
        raise InputError("\n".join(problems))
    return dataclasses.replace(variant, **changes)


def _expected(kind: type) -> dict[str, Expected]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: _of_type(hints[field.name]) for field in dataclasses.fields(kind)}


def _of_type(hint: Any) -> Expected:
    if typing.get_origin(hint) is typing.Annotated:
        return hint.__metadata__[0]
    if typing.get_origin(hint) is tuple:
        each, *_ = parts = typing.get_args(hint)
        return several(len(parts), _BY_TYPE[each])
    return _BY_TYPE[hint]


def _unknown(name: str, field: str, expected: dict[str, Expected]) -> str:
    close = difflib.get_close_matches(field, expected, n=1)
    hint = f". Did you mean {close[0]!r}?" if close else ""
    return f"{name} has no field {field!r} to override; it has {', '.join(expected)}{hint}"


def _plain(value: Any) -> Any:
    """Lists as tuples, and numbers of NumPy as Python's own."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
