"""Class numbers, as users' files have them: converted and bounded here."""

import re
import reprlib
from collections.abc import Callable

import numpy as np

from hybrid_flax.errors import InputError

_EVERY_SET_MAY_HAVE = 100_000  # classes, however few images it has
_DIGITS = 18  # of a class number: it fits into an int64
_NUMBER = re.compile(r"\+?0*([0-9]+)(?:\.0*)?")


def class_number(value: object, where: str, limit: int | None = None) -> int:
    """Converts a label as it is stored into a class number.

    Args:
      value: an integer, of Python or NumPy; a float that is one, as 3.0; text of one, " 007".
      where: names the label in messages: a file with its line, or its member.
      limit: class numbers lie below it; None: they have at most 18 digits.

    Raises:
      InputError: it is no class number; says what was found.
    """
    number = _integer(value)
    if number is None or number < 0:
        raise InputError(
            f"{where}: the label is {_shown(value)}; expected a class number, from 0 up"
        )
    if number >= (10**_DIGITS if limit is None else limit):
        raise InputError(
            f"{where}: the label is {_shown(value)}; expected a class number "
            + (f"of at most {_DIGITS} digits" if limit is None else f"from 0 to {limit - 1}")
        )
    return number


def check_label_range(labels: np.ndarray, image: Callable[[int], str], where: str) -> None:
    """Raises InputError, naming the image, for a label far above what a set of its size can have.

    A model gets as many classes as the largest label says: a typo there would take all memory.

    Args:
      labels: class numbers of all images, int [N].
      image: names an image by its number, as `Source.name`.
      where: names the set.
    """
    if not len(labels):
        return
    bound = max(_EVERY_SET_MAY_HAVE, len(labels))
    number = int(labels.argmax())
    if labels[number] >= bound:
        raise InputError(
            f"{where}: {image(number)} has the label {labels[number]}, which would make "
            f"{int(labels[number]) + 1} classes of {len(labels)} images; expected class numbers "
            f"from 0 up, below {bound}"
        )


def _integer(value: object) -> int | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig", errors="replace")
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value.strip("\ufeff \t\r\n\v\f"))
        if not match:
            return None
        return int(match[1]) if len(match[1]) <= _DIGITS else 10**_DIGITS
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return int(value) if float(value).is_integer() else None
    return None


def _shown(value: object) -> str:
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= 60 else f"{value[:60]!r}…"
    if isinstance(value, int) and abs(value) >= 10**60:  # Python refuses to show all digits
        return f"a number of about {value.bit_length() * 3 // 10} digits"
    return reprlib.repr(value.item() if isinstance(value, np.generic) else value)
