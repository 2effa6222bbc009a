"""From a config, however it was written, to checked `Settings`; and back to what JSON can hold."""

import dataclasses
import difflib
import functools
import json
import logging
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from hybrid_flax.errors import InputError
from hybrid_flax.settings.expected import Expected
from hybrid_flax.settings.sections import Settings
from hybrid_flax.settings.together import cut_short, impossible, without_effect

# Names of the version before this one: what they are called now, and what is no setting any more.
RENAMED = {"model.attention": "model.implementation"}
DROPPED = {"loss.name": "the loss follows from the model"}


class Field(NamedTuple):
    """A setting, as the tables and messages need it."""

    name: str  # with its section: "optimizer.learning_rate"
    default: Any  # dataclasses.MISSING where every config has to give it
    meaning: str
    expected: Expected
    free: bool  # whether a resumed run may have another value
    of_host: bool  # whether the processes of one run may have different ones


class Tree(Protocol):
    """Values by name, some of them trees again: a ConfigDict, or a dictionary."""

    def keys(self) -> Iterable[str]: ...

    def __getitem__(self, name: str, /) -> Any: ...


def _sections() -> dict[str, type]:
    """{name: dataclass} of all sections, in their order."""
    hints = typing.get_type_hints(Settings)
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}


def _fields() -> dict[str, Field]:
    """{dotted name: field} of all settings, those of no section first."""
    found = {}
    for section, kind in {"": Settings, **_sections()}.items():
        for field in dataclasses.fields(kind):
            if field.metadata:
                name = f"{section}.{field.name}".lstrip(".")
                default = field.default
                if field.default_factory is not dataclasses.MISSING:
                    default = field.default_factory()
                found[name] = Field(name, default, **field.metadata)
    return found


SECTIONS = _sections()
FIELDS = _fields()


def from_config(config: Tree) -> Settings:
    """The settings of a config, every one of them checked.

    Names of the version before this one are understood, and said to be old; what was chosen and
    has no effect beside the other values, or none within the run's epochs, is said, too.

    Raises:
      InputError: naming every value that cannot be used, every unknown name, and what is missing.
    """
    given = _dotted(config)
    for old in [name for name in given if name in RENAMED or name in DROPPED]:
        logging.warning(old_name(old))
        value = given.pop(old)
        if old in RENAMED:
            given[RENAMED[old]] = value
    problems = [_unknown(name) for name in given if name not in FIELDS]
    for name, field in FIELDS.items():
        value = given.setdefault(name, field.default)
        if value is dataclasses.MISSING:
            problems.append(f"--config.{name} is missing: expected {field.expected.words}")
        elif not field.expected.fits(value):
            problems.append(f"--config.{name}={value!r}: expected {field.expected.words}")
    if not problems:
        settings = _build(given)
        problems = list(impossible(settings))
    if problems:
        raise InputError("\n".join(problems))
    defaults = {name: field.default for name, field in FIELDS.items()}
    for sentence in (*without_effect(settings, defaults), *cut_short(settings)):
        _say_once(sentence)
    return settings


@functools.cache
def _say_once(sentence: str) -> None:
    logging.warning(sentence)


def replace(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """A checked copy with other values, by dotted name: {"model.num_classes": 10}."""
    return from_config(_nested(_dotted(dataclasses.asdict(settings)) | dict(changes)))


def to_plain(settings: Settings) -> dict[str, Any]:
    """The settings as JSON knows them, section by section: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def from_saved(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a config.json into what this version would have written.

    Old names are translated, and fields that it lacks have their defaults. Values are left as they
    are, unchecked.
    """
    values = {RENAMED.get(name, name): value for name, value in _dotted(saved).items()}
    defaults = {
        name: field.default
        for name, field in FIELDS.items()
        if field.default is not dataclasses.MISSING
    }
    kept = {name: value for name, value in values.items() if name not in DROPPED}
    return json.loads(json.dumps(_nested(defaults | kept)))


def old_name(name: str) -> str:
    """A sentence about a name of the version before this one."""
    if name in DROPPED:
        return f"--config.{name} is ignored: {DROPPED[name]}. The next version refuses it"
    return f"--config.{name} is called --config.{RENAMED[name]} now; the next version refuses it"


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, FIELDS, n=1)
    return f"--config.{name}: there is no such setting" + (
        f". Did you mean {close[0]}?" if close else ""
    )


def _dotted(tree: Tree) -> dict[str, Any]:
    """{dotted name: value}"""
    flat: dict[str, Any] = {}
    for name in tree.keys():
        value = tree[name]
        if name in SECTIONS and hasattr(value, "keys"):
            flat |= {f"{name}.{field}": _tuples(value[field]) for field in value.keys()}
        else:
            flat[name] = _tuples(value)
    return flat


def _tuples(value: Any) -> Any:
    """Lists as tuples, ConfigDicts as dictionaries, at every depth."""
    if isinstance(value, list | tuple):
        return tuple(map(_tuples, value))
    if hasattr(value, "keys"):
        return {name: _tuples(value[name]) for name in value.keys()}
    return value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, field = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[field] = value
    return tree


def _build(flat: Mapping[str, Any]) -> Settings:
    tree = _nested(flat)
    sections = {name: kind(**tree.pop(name)) for name, kind in SECTIONS.items()}
    return Settings(**tree, **sections)
