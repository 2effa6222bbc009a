"""Arguments of a config file: --config=configs/finetune.py:model=gcvit_b,dataset=digits"""

import difflib
from typing import Any

from hybrid_flax.errors import InputError


def parse_arguments(text: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Values by name, of the types of the defaults.

    Args:
      text: `name=value` pairs with commas between; a name alone means true.
      defaults: every name that there is; strings, whole numbers, or booleans.

    Raises:
      InputError: an unknown name, one that is given twice, or a value of another type.
    """
    values = {}
    for pair in filter(None, text.split(",")):
        name, given, value = pair.partition("=")
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise InputError(
                f"the config has no argument {name!r}. {hint}It takes {', '.join(defaults)}"
            )
        if name in values:
            raise InputError(f"the config's argument {name!r} is given twice")
        values[name] = _convert(name, value if given else "true", type(defaults[name]))
    return defaults | values


def _convert(name: str, value: str, kind: type):
    if kind is str:
        return value
    if kind is bool and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    if kind is int and value.isdecimal():
        return int(value)
    expected = {bool: "true or false", int: "a whole number"}[kind]
    raise InputError(f"the config's argument {name}={value}: expected {expected}")
