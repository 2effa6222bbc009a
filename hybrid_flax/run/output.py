"""What a program prints, also where nobody reads it or where there are only ASCII letters."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from hybrid_flax.run.stop_signal import StopSignal


@contextlib.contextmanager
def attended(stop: StopSignal) -> Iterator[None]:
    """Around a program: its standard output cannot end it in the middle of something.

    What cannot be written (nobody reads the pipe any more, the disk is full) is an OSError, but
    where the program saves first, `stop` is asked to stop it, as by SIGPIPE. Letters that the
    terminal does not have are written as Python would: \\u2026.
    """
    before = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if before is None:  # closed by who started us
        sys.stdout = open(os.devnull, "w")
    else:
        sys.stdout = _Output(before, stop)
    try:
        yield
    finally:
        sys.stdout = before or sys.stdout


class _Output:
    """A stream that is silent once it cannot be written to."""

    def __init__(self, stream: TextIO, stop: StopSignal):
        self._stream = stream
        self._stop = stop

    def write(self, text: str) -> int:
        with self._noticed():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._noticed():
            self._stream.flush()

    @contextlib.contextmanager
    def _noticed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, self._stream.fileno())
                os.close(silence)
            if not self._stop.deferring:
                raise OSError(error.errno, error.strerror, "standard output") from error
            self._stop.ask(signal.SIGPIPE)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
