import http.server
import os
import signal
import threading
import time

import pytest

from hybrid_flax.run import stop_signal
from hybrid_flax.run.stop_signal import StopSignal


def test_the_first_signal_is_remembered_and_the_second_has_its_usual_effect(monkeypatch):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


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
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        with StopSignal() as stop:
            time.sleep(0.2)
            assert stop.received is None
            Machine.answers[key] = notice
            end = time.monotonic() + 10
            while stop.received is None and time.monotonic() < end:
                time.sleep(0.02)
        server.shutdown()
    assert stop.received == signal.SIGTERM
    assert f"about to stop ({key}: {notice}); saving" in capsys.readouterr().out
