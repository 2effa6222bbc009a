"""What a user can mend, why a run had to stop, and closing without hiding either."""

import contextlib
import logging
from collections.abc import Callable, Iterator


class InputError(ValueError):
    """Something that was given cannot be used.

    The message names the thing, its value, what was expected and what to do. Command-line programs
    print it without a traceback and exit with status 2.
    """


class TrainingError(RuntimeError):
    """Training had to stop for a reason that lies in the run; the message says where it stands."""


def close(closing: Callable[[], object], after: BaseException | None) -> None:
    """Calls `closing()`; what goes wrong in it does not hide an error that came before."""
    try:
        closing()
    except Exception as error:
        if after is None:
            raise
        logging.warning("while closing after an error: %s: %s", type(error).__name__, error)


@contextlib.contextmanager
def closed_after(closing: Callable[[], object]) -> Iterator[None]:
    """Calls `closing()` at the end, as `close` does."""
    try:
        yield
    except BaseException as error:
        close(closing, error)
        raise
    closing()
