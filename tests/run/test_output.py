import errno
import io
import os
import signal
import sys

import pytest

from hybrid_flax.run.output import attended
from hybrid_flax.run.stop_signal import StopSignal


@pytest.fixture
def pipe():
    """For a standard output that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as stream:
        yield stream


def test_where_something_is_saved_first_a_closed_pipe_asks_to_stop(monkeypatch, pipe):
    monkeypatch.setattr(sys, "stdout", pipe)
    with StopSignal() as stop, attended(stop):
        with stop.deferred():
            for _ in range(3):
                print("a line")
                sys.stdout.flush()
        assert stop.received == signal.SIGPIPE
    assert sys.stdout is pipe


def test_elsewhere_it_is_an_error_once(monkeypatch, pipe):
    monkeypatch.setattr(sys, "stdout", pipe)
    with StopSignal() as stop, attended(stop):
        with pytest.raises(BrokenPipeError) as error:
            print("a line")
        assert (error.value.errno, error.value.filename) == (errno.EPIPE, "standard output")
        print("a line")
    pipe.flush()


def test_letters_that_a_terminal_lacks_are_spelled(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with StopSignal() as stop, attended(stop):
        print("224×224 …")
        sys.stdout.flush()
    assert terminal.buffer.getvalue() == rb"224\xd7224 \u2026" + b"\n"


def test_a_program_without_standard_output_goes_on(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        with StopSignal() as stop, attended(stop):
            print("a line")
            sys.stdout.flush()
        sys.stdout.close()
