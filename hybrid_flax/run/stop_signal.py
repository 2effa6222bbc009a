"""Noticing that we are asked to stop, so that the loop can save first."""

import os
import pathlib
import signal
import threading
import urllib.error
import urllib.request

# What Google Cloud tells a machine of itself, and the answers that mean that it goes on.
# https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
_NOTICES = {"preempted": "FALSE", "maintenance-event": "NONE"}
_POLL = 5.0  # seconds


class StopSignal:
    """Remembers the first SIGTERM or SIGINT; a second one stops at once.

        with StopSignal() as stop:
            while not stop.received: ...

    `received` is None or the signal. Python delivers signals between bytecodes: during a compile or
    a device computation it is set as soon as that returns. On Google Cloud the notice that this
    machine will be taken away, half a minute or more before it is, counts as SIGTERM.
    """

    def __enter__(self) -> "StopSignal":
        self.received: signal.Signals | None = None
        self._left = threading.Event()
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        if host := _metadata_host():
            threading.Thread(target=self._watch, args=(host,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._left.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        self.received = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    def _watch(self, host: str):
        while self.received is None:
            for key, usual in _NOTICES.items():
                notice = _metadata(host, key)
                if notice not in (None, usual):
                    print(f"this machine is about to stop ({key}: {notice}); saving", flush=True)
                    self.received = signal.SIGTERM
            if self._left.wait(_POLL):
                return


def _metadata_host() -> str | None:
    """The server that knows about this machine; None outside of Google Cloud."""
    product = pathlib.Path("/sys/class/dmi/id/product_name")
    if "GCE_METADATA_HOST" in os.environ:
        return os.environ["GCE_METADATA_HOST"]
    try:
        return "metadata.google.internal" if "Google" in product.read_text() else None
    except OSError:
        return None


def _metadata(host: str, key: str) -> str | None:
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_POLL) as answer:
            return answer.read().decode().strip()
    except (OSError, urllib.error.URLError):
        return None
