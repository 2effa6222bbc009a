"""Noticing that we are asked to stop, so that the loop can save first."""

import contextlib
import http.client
import os
import pathlib
import signal
import threading
import urllib.request
from collections.abc import Iterator

# What Google Cloud tells a machine of itself, and the answers that mean that it goes on.
# https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
_NOTICES = {"preempted": "FALSE", "maintenance-event": "NONE"}
_POLL = 5.0  # seconds
_PATIENCE = 5.0  # seconds for Python to come to a bytecode where there is nothing to be saved
_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A stop signal, where there is nothing to be saved first."""

    def __init__(self, number: signal.Signals):
        super().__init__(f"stopped by {number.name}")
        self.status = 128 + number


class StopSignal:
    """Listens for SIGTERM, SIGINT and SIGHUP, which a terminal sends that is closed.

    The first raises `Stopped`, or is remembered to save first:

        with StopSignal() as stop:
            ...                          # a signal raises Stopped
            with stop.deferred():        # it sets `received`
                while not stop.received: ...

    A second signal, whichever the two are, ends the process at once with the status of the first:
    a thread hears it, for Python handles signals between bytecodes only, and a step may compile for
    minutes. Where nothing is deferred, that thread waits for Python five seconds and ends it, too.
    A SIGHUP that was ignored when the process began (by nohup) stays so.
    On Google Cloud the notice that this machine will be taken away, half a minute or more before it
    is, counts as SIGTERM where signals are deferred.

    Attributes:
      received: None, or the first signal.
      deferring: whether a signal is remembered.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> "StopSignal":
        self.deferring = False
        self._count = self._handled = 0
        self._counting = threading.Lock()
        ear, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        self._listener = threading.Thread(target=self._listen, args=(ear,), daemon=True)
        self._listener.start()
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in _NUMBERS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        self._woken_before = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._woken_before)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._mouth)
        self._listener.join(1.0)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Around what can stop by itself: it has to look at `received`."""
        left = threading.Event()
        self.deferring = True
        if host := _metadata_host():
            threading.Thread(target=self._watch, args=(host, left), daemon=True).start()
        try:
            yield
        finally:
            left.set()
            self.deferring = False

    def ask(self, number: signal.Signals) -> None:
        """Asks to stop as that signal would, where signals are deferred; nothing if one came.

        It is no second signal: Ctrl-C also ends a `tee` that reads what this process says.
        """
        if self.received is None:
            self.received = number
            self._heard()

    def _handle(self, number: int, _frame: object) -> None:
        self.received = self.received or signal.Signals(number)
        self._handled += 1
        if self._handled > 1:  # another event loop may have taken our ear
            os._exit(128 + self.received)
        if not self.deferring:
            raise Stopped(self.received)

    def _listen(self, ear: int) -> None:
        while numbers := os.read(ear, 1):
            if numbers[0] in _NUMBERS:
                # In a step that compiles `_handle` comes much later.
                self.received = self.received or signal.Signals(numbers[0])
                self._heard()
                if not self.deferring:
                    deaf = threading.Timer(_PATIENCE, self._end_if_deaf)
                    deaf.daemon = True
                    deaf.start()
        os.close(ear)

    def _end_if_deaf(self) -> None:
        if self.received and not (self._handled or self.deferring):
            with contextlib.suppress(OSError):
                os.write(2, f"stopped by {self.received.name}\n".encode())
            os._exit(128 + self.received)

    def _heard(self) -> None:
        with self._counting:
            self._count += 1
            if self._count > 1 and self.received:
                os._exit(128 + self.received)

    def _watch(self, host: str, left: threading.Event) -> None:
        while self.received is None:
            for key, usual in _NOTICES.items():
                notice = _metadata(host, key)
                if notice not in (None, usual):
                    print(f"this machine is about to stop ({key}: {notice}); saving", flush=True)
                    self.ask(signal.SIGTERM)
                    return
            if left.wait(_POLL):
                return


def _metadata_host() -> str | None:
    """The server that knows about this machine; None outside of Google Cloud."""
    product = pathlib.Path("/sys/class/dmi/id/product_name")
    if "GCE_METADATA_HOST" in os.environ:
        return os.environ["GCE_METADATA_HOST"]
    try:
        return "metadata.google.internal" if "Google" in product.read_text() else None
    except (OSError, ValueError):
        return None


def _metadata(host: str, key: str) -> str | None:
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_POLL) as answer:
            return answer.read().decode().strip()
    except (OSError, ValueError, http.client.HTTPException):
        return None
