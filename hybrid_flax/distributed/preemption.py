"""Noticing that we are asked to stop, so that the loop can save first."""

import signal


class StopSignal:
    """Remembers the first SIGTERM or SIGINT; a second one stops at once.

        with StopSignal() as stop:
            while not stop.received: ...

    `received` is None or the signal. Python delivers signals between bytecodes: during a compile or
    a device computation it is set as soon as that returns.
    """

    def __enter__(self) -> "StopSignal":
        self.received: signal.Signals | None = None
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        self.received = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)
