"""Orbax, as one process of several uses it alone, and without a thousand reports of one error."""

import contextlib
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.experimental.v1._src.saving import execution


class _WithoutOrbaxTraces(logging.Filter):
    """Leaves out the stack traces that Orbax's threads log of errors which it raises as well."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_WithoutOrbaxTraces())


def _unraisable(found: Any, before: Callable[[Any], object] = sys.unraisablehook) -> None:
    """Writes of a save that failed end after it, and find its event loop closed: no news."""
    if not (isinstance(found.exc_value, RuntimeError) and "loop is closed" in str(found.exc_value)):
        before(found)


sys.unraisablehook = _unraisable


def save_async(folder: epath.Path, parts: dict[str, Any]) -> ocp.AsyncResponse[None]:
    """Begins to write parts of a checkpoint, {name: tree or JSON}, into a folder that is not there.

    Raises whatever Orbax does, here or when the response is asked for its result.
    """
    with _context(), _alone():
        return ocp.save_checkpointables_async(folder, parts)


def load(folder: epath.Path, name: str) -> Any:
    """Reads one part of a checkpoint.

    Raises:
      UnreadableError: what Orbax and TensorStore raise on files that are not as they were written.
    """
    with _quiet_background():
        try:
            with _context():
                return ocp.load_checkpointables(folder, {name: None})[name]
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = f"{type(cause).__name__}: {str(cause)[:300]}"
        time.sleep(0.5)  # for the reads that are still under way
        gc.collect()
    raise UnreadableError(f"its {name} cannot be read ({reason})")


class UnreadableError(Exception):
    """A part of a checkpoint cannot be read; the message says why."""


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="manifest")
    context = ocp.Context()
    # Of several processes only the one that has the folder comes here: Orbax would wait for all.
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    context.checkpointables.registry = registry
    return context


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keeps Orbax from comparing the folder's name between all processes before it saves.

    Orbax 0.12.8 does so whatever the context says of active processes, and has no option for it.
    The comparison stands before what is written in the background, so that this ends with the call.
    """
    original = execution._check_directory_consistency
    execution._check_directory_consistency = lambda directory: None
    try:
        yield
    finally:
        execution._check_directory_consistency = original


@contextlib.contextmanager
def _quiet_background() -> Iterator[None]:
    """Keeps one damaged array from being reported a thousand times.

    Orbax abandons all other reads at the first that fails. asyncio reports each abandoned task, and
    each read that still ends reports that its event loop is closed.
    """
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook
