"""Signals that end a run: noted, so that it can save before it ends."""

import signal
import threading
import time

from pipeline.torchrun import STOP_SIGNALS

REPEAT_SECONDS = 2.0


class GracefulStop:
    """Records SIGTERM, SIGHUP and Ctrl-C so that the loop can save before it ends; a second signal acts at once.

    One that came after the loop last looked is raised as the block ends, so that what follows does not begin.

    One within REPEAT_SECONDS is the same: a scheduler signals every process, and the one that started it does so again.

    Signals that were ignored (SIGHUP under nohup) stay ignored.
    """

    def __init__(self):
        self.received: int | None = None
        self.received_at = 0.0
        self.previous_handlers: dict = {}

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in STOP_SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self.previous_handlers = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self._restore_handlers()
        if self.received is not None and kind is None:
            raise_signal(self.received)

    def _restore_handlers(self) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}

    def _note(self, number: int, frame) -> None:
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
        elif time.monotonic() - self.received_at > REPEAT_SECONDS:
            self._restore_handlers()
            signal.raise_signal(number)


def raise_signal(number: int) -> None:
    """Raise what ends the process as the signal would: SystemExit(143), SystemExit(129) or KeyboardInterrupt."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
