"""How a setting is declared, and kinds of values: each with a test, and words for a person."""

import dataclasses
import math
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Expected:
    """A test of a value, and how its outcome is explained: "expected a whole number from 0"."""

    words: str
    fits: Callable[[Any], bool]
    choices: tuple[Any, ...] = ()  # all values, where they can be listed


def setting(
    meaning: str,
    expected: Expected,
    default: T | dataclasses._MISSING_TYPE = dataclasses.MISSING,
    *,
    free: bool = False,
    of_host: bool = False,
) -> T:
    """Declares a field of a section; without a default every config has to give it."""
    about = {
        "meaning": meaning,
        "expected": expected,
        "free": free or of_host,
        "of_host": of_host,
    }
    if isinstance(default, dict):
        found: Any = dataclasses.field(default_factory=default.copy, metadata=about)
    else:
        found = dataclasses.field(default=default, metadata=about)
    return found


def whole(low: int, high: int = 10**9, *, special: tuple[int, ...] = ()) -> Expected:
    """A whole number in a closed range, or one of the `special` ones outside of it."""
    words = f"a whole number from {low} to {high}"
    words += "".join(f", or {number}" for number in special)
    return Expected(words, lambda x: is_whole(x) and (low <= x <= high or x in special))


def number(low: float, high: float = 1e6, *, above: bool = False, below: bool = False) -> Expected:
    """A number from `low` to `high`, which `above` and `below` leave out, in float32, too."""
    words = f"a number {'above' if above else 'from'} {low:g}"
    if below:
        words += f" {'and' if above else 'to'} below {high:g}"
    else:
        words += f"{', up' if above else ''} to {high:g}"

    def fits(x: Any) -> bool:
        if not is_finite(x) or not low <= x <= high:
            return False
        (single,) = struct.unpack("f", struct.pack("f", x))  # training computes with that
        return (low < single or not above) and (single < high or not below)

    return Expected(words, fits)


def several(count: int, each: Expected, what: str) -> Expected:
    """A tuple of `count` values of one kind; `what` says it in words."""
    return Expected(what, lambda x: has_length(x, count) and all(map(each.fits, x)))


def one_of(*choices: Any) -> Expected:
    """One of a few values, of exactly their type."""
    return Expected(
        f"one of {', '.join(map(repr, choices))}",
        lambda x: any(type(x) is type(choice) and x == choice for choice in choices),
        choices,
    )


FLAG = one_of(False, True)
TEXT = Expected(
    "a text of at most 4096 characters, none of them NUL",
    lambda x: isinstance(x, str) and len(x) <= 4096 and "\0" not in x,
)
NAME = Expected("a name", lambda x: TEXT.fits(x) and bool(x.strip()))


def text_like(pattern: str, words: str) -> Expected:
    """A text that a regular expression matches as a whole."""
    return Expected(words, lambda x: isinstance(x, str) and re.fullmatch(pattern, x) is not None)


def interval(high: float) -> Expected:
    """A pair (low, high) of numbers above 0 in that order."""
    words = f"(low, high) with 0 < low ≤ high ≤ {high}"

    def fits(x: Any) -> bool:
        return has_length(x, 2) and all(map(is_finite, x)) and 0 < x[0] <= x[1] <= high

    return Expected(words, fits)


def is_pattern(value: Any) -> bool:
    """Whether this is a regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return isinstance(value, str)


PATTERNS = Expected(
    "a tuple of regular expressions",
    lambda x: isinstance(x, tuple) and all(map(is_pattern, x)),
)


def rules(axes: Sequence[str]) -> Expected:
    """Pairs of a regular expression and a tuple of mesh axes, None for what stays whole."""
    known = (*axes, None)

    def is_rule(rule: Any) -> bool:
        return (
            has_length(rule, 2)
            and is_pattern(rule[0])
            and isinstance(rule[1], tuple)
            and all(axis in known for axis in rule[1])
        )

    return Expected(
        "a tuple of pairs such as ('/fc1/kernel$', (None, 'tensor')): a regular expression and "
        f"for each dimension one of {', '.join(map(repr, known))}",
        lambda x: isinstance(x, tuple) and all(map(is_rule, x)),
    )


FIELDS_BY_NAME = Expected(
    "values by name",
    lambda x: isinstance(x, dict) and all(isinstance(name, str) for name in x),
)


def is_whole(value: Any) -> bool:
    """Whether this is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether this is a number, neither infinite nor NaN."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def has_length(value: Any, count: int) -> bool:
    """Whether this is a tuple of so many."""
    return isinstance(value, tuple) and len(value) == count
