"""A thread that writes what another computes, fed through a short queue so that memory stays bounded."""

import queue
import threading
from collections.abc import Callable
from typing import Any

_END = object()
POLL_S = 0.2


class BackgroundWriter:
    """Calls `write` with every item put, in order, in a thread of its own; at most `depth` items wait.

    An exception in `write` is raised by the computing thread's next `put` or `finish`.
    """

    def __init__(self, write: Callable[[Any], None], depth: int):
        self._write = write
        self._queue: queue.Queue = queue.Queue(depth)
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="background-writer", daemon=True)
        self._thread.start()

    def put(self, item: Any) -> None:
        """Queue an item; waits while the queue is full."""
        while True:
            self._check()
            try:
                return self._queue.put(item, timeout=POLL_S)
            except queue.Full:
                continue

    def finish(self) -> None:
        """Wait until everything queued is written."""
        self.put(_END)
        self._thread.join()
        self._check()

    def stop(self) -> None:
        """End after the current item and drop the rest; harmless after `finish`."""
        self._stopped.set()
        self._thread.join()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    item = self._queue.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if item is _END:
                    return
                self._write(item)
        except BaseException as error:  # handed to the computing thread, which raises it
            self._error = error
