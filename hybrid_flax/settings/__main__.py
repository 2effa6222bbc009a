"""Writes docs/settings.md, the table of all settings: python -m hybrid_flax.settings"""

import argparse
import dataclasses
import inspect
import pathlib
import sys
from typing import Any

from hybrid_flax.settings.reading import FIELDS, SECTIONS, Field

FILE = pathlib.Path(__file__).parents[2] / "docs" / "settings.md"

HEAD = """\
# Settings

Every field of a config, made from [hybrid_flax/settings/sections.py](../hybrid_flax/settings/\
sections.py) by `python -m hybrid_flax.settings`. On the command line: \
`--config.optimizer.learning_rate=1e-3`. A default is what a recipe starts from; what each paper \
changes is in [recipes.md](recipes.md). A resumed run may change fields marked *free*; of those \
marked *host*, each process of a run may have its own.
"""


def document() -> str:
    """The text of docs/settings.md."""
    parts = [HEAD, _table("", [field for field in FIELDS.values() if "." not in field.name])]
    for name, kind in SECTIONS.items():
        own = [field for field in FIELDS.values() if field.name.startswith(f"{name}.")]
        parts.append(f"## `{name}`\n\n{inspect.getdoc(kind)}\n\n{_table(name, own)}")
    return "\n".join(parts)


def _table(section: str, fields: list[Field]) -> str:
    rows = ["| field | default | meaning | expected | |", "|---|---|---|---|---|"]
    for field in fields:
        cells = (
            f"`{field.name.removeprefix(f'{section}.')}`",
            _show(field.default),
            field.meaning,
            field.expected.words,
            "host" if field.of_host else "free" if field.free else "",
        )
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _show(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "given by each config"
    if isinstance(default, tuple):
        default = tuple(round(x, 3) if isinstance(x, float) else x for x in default)
    return f"`{default!r}`"


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help, and nothing else
    try:
        FILE.write_text(document())
    except OSError as error:  # an installed package has no docs/ beside it
        print(f"error: cannot write {FILE}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
