import http.server
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hybrid_flax.run import stop_signal
from hybrid_flax.run.stop_signal import Stopped, StopSignal


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    monkeypatch.setattr(stop_signal, "_metadata_host", lambda: None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_is_remembered_where_there_is_something_to_save(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        with stop.deferred():
            assert stop.received is None
            os.kill(os.getpid(), number)
            assert stop.received == number
        assert stop.received == number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_elsewhere_it_ends_what_is_done_at_once(number):
    def interrupted():
        os.kill(os.getpid(), number)
        time.sleep(60)

    with StopSignal(), pytest.raises(Stopped, match=f"stopped by {number.name}") as stopped:
        interrupted()
    assert stopped.value.status == 128 + number


def test_a_closed_pipe_after_a_signal_is_no_second_signal(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"ended with {status}"))
    with StopSignal() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        stop.ask(signal.SIGPIPE)
        assert stop.received == signal.SIGINT


def test_a_hang_up_that_nohup_ignores_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop, stop.deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


BUSY = """
import hashlib, sys
from hybrid_flax.run.stop_signal import Stopped, StopSignal
import signal
with StopSignal() as stop, stop.deferred():
    if sys.argv[1:]:
        stop.ask(signal.Signals[sys.argv[1]])  # as the machine's notice does
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as deaf as a compiler
"""


@pytest.mark.parametrize(
    ("first", "second"), [("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM"), ("", "SIGINT")]
)
def test_any_second_signal_ends_it_with_the_status_of_the_first(first, second):
    notice = [] if first else ["SIGTERM"]
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, *notice], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "busy\n"
        for name in filter(None, (first, second)):
            time.sleep(0.2)
            assert process.poll() is None
            process.send_signal(signal.Signals[name])
        assert process.wait(timeout=20) == 128 + signal.Signals[first or "SIGTERM"]


def test_where_nothing_is_to_be_saved_a_compiler_is_not_waited_for():
    impatient = "from hybrid_flax.run import stop_signal\nstop_signal._PATIENCE = 0.2\n"
    program = impatient + BUSY.replace(", stop.deferred()", "")
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "busy\n"
        time.sleep(0.5)  # before its work begins, Python would hear the signal itself
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
        assert process.stderr.read() == "stopped by SIGTERM\n"


class Machine(http.server.BaseHTTPRequestHandler):
    """Answers as Google Cloud's metadata server does; `answers` by key."""

    answers: dict[str, str]

    def do_GET(self):
        key = self.path.removeprefix("/computeMetadata/v1/instance/")
        found = self.headers["Metadata-Flavor"] == "Google" and key in self.answers
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(self.answers.get(key, "").encode())

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("key", "notice"),
    [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_a_notice_of_the_machine_counts_as_sigterm(monkeypatch, capsys, key, notice):
    usual = {"preempted": "FALSE", "maintenance-event": "NONE"}
    monkeypatch.setattr(Machine, "answers", dict(usual), raising=False)
    monkeypatch.setattr(stop_signal, "_POLL", 0.05)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Machine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        monkeypatch.setattr(stop_signal, "_metadata_host", lambda: host)
        with StopSignal() as stop, stop.deferred():
            time.sleep(0.2)
            assert stop.received is None
            Machine.answers[key] = notice
            end = time.monotonic() + 10
            while stop.received is None and time.monotonic() < end:
                time.sleep(0.02)
        server.shutdown()
    assert stop.received == signal.SIGTERM
    assert f"about to stop ({key}: {notice}); saving" in capsys.readouterr().out
