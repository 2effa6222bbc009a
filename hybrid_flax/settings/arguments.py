"""What the command line says of the config: which file it is, and fields of the model's Variant."""

import ast
import difflib
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_flax.errors import InputError

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
_OVERRIDES = "config.model.overrides."


def with_home(arguments: Sequence[str]) -> list[str]:
    """The arguments with `~` as the home folder: behind an equals sign a shell leaves it."""
    found = []
    for argument in arguments:
        flag, path = re.fullmatch("(-[^=]*=)?(.*)", argument, re.DOTALL).groups("")  # type: ignore[union-attr]
        is_home = path == "~" or path.startswith("~/")
        found.append(flag + os.path.expanduser(path) if is_home else argument)
    return found


def with_found_config(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--config` as a file that is there: "quickstart", "finetune:model=…".

    A file of that name comes first; then those of this package, with or without `configs/` and
    `.py`, from whatever folder.

    Raises:
      InputError: neither is there, or several are given.
    """
    found = list(arguments)
    flags = ("--config", "-config")
    if sum(argument.partition("=")[0] in flags for argument in found) > 1:
        raise InputError("--config is given more than once; give one config file")
    for i, argument in enumerate(found):
        flag, given, value = argument.partition("=")
        if flag not in flags:
            continue
        if given:
            found[i] = f"{flag}={_file(value)}"
        elif i + 1 < len(found):
            found[i + 1] = _file(found[i + 1])
    return found


def _file(given: str) -> str:
    name, colon, arguments = given.partition(":")
    if not name or (os.path.exists(name) and not os.path.isdir(name)):
        return given
    path = pathlib.PurePath(name)
    own = CONFIGS / f"{path.name.removesuffix('.py')}.py"
    if path.parent.name in ("", "configs") and os.path.exists(own) and own.stem != "__init__":
        return f"{own}{colon}{arguments}"
    close = difflib.get_close_matches(own.stem, [file.stem for file in CONFIGS.glob("*.py")], n=3)
    raise InputError(
        f"--config={name}: no such file, nor a config of this package"
        + (f". Did you mean {', '.join(close)}?" if close else f"; those lie in {CONFIGS}")
    )


def take_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(the other arguments, {field: value} of --config.model.overrides.FIELD=VALUE).

    A value is written as in Python; what is not Python is a text: `.mixer=pooling`. It takes no
    field that the config names: which there are, the model knows.

    Raises InputError for a name that no field can have.
    """
    others: list[str] = []
    fields: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        flag, given, value = argument.partition("=")
        name = flag.lstrip("-")
        if not argument.startswith("-") or not name.startswith(_OVERRIDES):
            others.append(argument)
            continue
        field = name.removeprefix(_OVERRIDES)
        if not field.isidentifier():
            raise InputError(f"{argument[:80]}: expected --config.model.overrides.FIELD=VALUE")
        value = value if given else next(rest, "")
        try:
            fields[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            fields[field] = value
    return others, fields


def override(config: Any, fields: Mapping[str, Any]) -> None:
    """Sets fields of the model's Variant in a locked ConfigDict, beside those that it has."""
    if fields:
        with config.unlocked():
            config.model.overrides = dict(config.model.get("overrides", {})) | dict(fields)
