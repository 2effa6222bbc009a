"""A compiled program without its machine code, which is what nearly all the time goes into.

The TPU compiler decides everything else first: how the program is split over the chips, what
passes between them, which arrays there are and where each lies in memory. It writes that down when
asked to, and then needs minutes more. So it runs in a process of its own, which is ended there.
"""

import json
import multiprocessing
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from hybrid_flax.errors import InputError

_OPTIONS = {"xla_dump_hlo_as_text": True}
_TEXT = "*after_optimizations_after_buffer_assignment.txt"  # the last that it writes before code
_BUFFERS = "*after_optimizations-buffer-assignment.txt"
_REPORT = "*after_optimizations-memory-usage-report.txt"


class Buffers(NamedTuple):
    """A program as it is before there is machine code."""

    known: dict[str, Any]  # said of it before it was compiled
    text: str
    bytes: int  # in a chip's memory: arguments, results, temporary
    temporary: int


class CompilerError(Exception):
    """A refusal in the compiler's own words."""


def buffer_assignment(lower: Callable, *arguments) -> Buffers:
    """Compiles a program until every array has its place.

    Args:
      lower: called with the arguments, gives what is known of the program beforehand, for JSON, and
        its `jax.stages.Lowered`. A function of a module: it runs in another process.

    Raises:
      InputError: `lower` did.
      CompilerError: the compiler refused the program, for want of memory or otherwise.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        process = context.Process(target=_compile, args=(folder, lower, *arguments), daemon=True)
        process.start()
        try:
            while process.is_alive() and not (found := _read(folder)):
                time.sleep(1)
            found = found if process.is_alive() else _read(folder)
        finally:
            process.kill()
            process.join()
        if found:
            return found
        refused = folder / "refused.txt"
        if (unusable := folder / "unusable.txt").exists():
            raise InputError(unusable.read_text())
        raise CompilerError(refused.read_text() if refused.exists() else "the compiler died")


def _compile(folder: pathlib.Path, lower: Callable, *arguments) -> None:
    try:
        known, lowered = lower(*arguments)
        (folder / "known.json").write_text(json.dumps(known))
        lowered.compile(compiler_options={"xla_dump_to": str(folder), **_OPTIONS})
    except InputError as error:
        (folder / "unusable.txt").write_text(str(error))
    except Exception as error:  # of any kind: compilers have many
        (folder / "refused.txt").write_text(f"{type(error).__name__}: {error}")


def _read(folder: pathlib.Path) -> Buffers | None:
    """Reads what the compiler wrote; None until it has written all."""
    files = [file for pattern in (_BUFFERS, _REPORT, _TEXT) for file in folder.glob(pattern)]
    if len(files) < 3:
        return None
    buffers, report, text = (file.read_text() for file in files)
    if not text.endswith("\n}\n\n"):
        return None
    (total,) = re.findall(r"Memory Space: default .*\nTotal bytes: (\d+)", report)
    temporary = re.findall(r"^allocation \d+: size (\d+), page 0, preallocated-temp", buffers, re.M)
    known = json.loads((folder / "known.json").read_text())
    return Buffers(known, text, int(total), sum(map(int, temporary)))
