"""Streams and events of a fake GPU, and whether what they order is ordered enough.

A stream without a queue does everything at once, so a missing wait never shows in results. It shows here: of every
stream and thread it is known what of the others has certainly ended when its next operation begins (a vector clock),
and an access that may come before one it must come after is a race. Three kinds:

    read          of what may not be written yet
    overwritten   pinned memory by the host, while it may still be copied from
    reused        memory by a stream that allocates, while its former owner may still be used on another
"""

import contextlib
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

journal: list[str] = []  # what was asked of streams and events, in order
Clock = dict[str, int]  # stream or thread -> how many of its operations have ended


@dataclass(frozen=True)
class Access:
    by: str
    tick: int
    writes: bool


class Order:
    """Which operations of streams and threads come after which."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.known: defaultdict[str, Clock] = defaultdict(dict)
        self.ticks: Counter = Counter()
        self.accesses: defaultdict[object, list[Access]] = defaultdict(list)  # of a storage or pinned memory
        self.freed: defaultdict[str, list[Access]] = defaultdict(list)  # of memory that a stream may allocate again
        self.races: Counter = Counter()
        self._owned: dict[int, weakref.finalize] = {}
        self._kept: set[object] = set()

    def ran(self, stream: str, reads: Iterable[object], writes: Iterable[object]) -> None:
        """Note an operation on a stream; it comes after all that its thread knows to have ended."""
        self.learn(stream, self.known[_host()])
        self.ticks[stream] += 1
        tick = self.known[stream][stream] = self.ticks[stream]
        for key in reads:
            if not all(self._ended(stream, access) for access in self.accesses[key] if access.writes):
                self.races["read"] += 1
            self.accesses[key].append(Access(stream, tick, False))
        for key in writes:
            if not all(self._ended(stream, access) for access in self.accesses[key]):
                self.races["reused"] += 1
            self.accesses[key] = [Access(stream, tick, True)]

    def allocated(self, stream: str, storage: torch.UntypedStorage) -> None:
        """Note memory that a stream got, maybe some that was freed before."""
        key = storage._cdata
        if key in self._owned:
            return
        self.learn(stream, self.known[_host()])
        self.races["reused"] += not all(self._ended(stream, access) for access in self.freed.pop(stream, ()))
        self.accesses.pop(key, None)
        self._owned[key] = weakref.finalize(storage, self._free, stream, key)

    def keep(self, key: object, stream: "Stream") -> None:
        """Note that memory is not allocated again before a stream has ended what it does now."""
        journal.append(f"memory kept for {stream.name}")
        self._kept.add(key)

    def host_wrote(self, key: object) -> None:
        self.races["overwritten"] += not all(self._ended(_host(), access) for access in self.accesses.pop(key, ()))

    def learn(self, who: str, clock: Clock) -> None:
        """Note that `who` comes after all of a clock."""
        for other, tick in clock.items():
            self.known[who][other] = max(tick, self.known[who].get(other, 0))

    def host_waited(self, stream: str) -> None:
        self.learn(_host(), self.known[stream])

    def _ended(self, who: str, access: Access) -> bool:
        return self.known[who].get(access.by, 0) >= access.tick

    def _free(self, stream: str, key: int) -> None:
        self._owned.pop(key, None)
        accesses = self.accesses.pop(key, [])
        self.freed[stream] += [] if key in self._kept else accesses
        self._kept.discard(key)


order = Order()
_current = threading.local()


def _host() -> str:
    return f"thread {threading.get_ident()}"


class Stream:
    """A stream without a queue."""

    def __init__(self, name: object = "copying"):
        self.name = name if isinstance(name, str) else "copying"

    def wait_stream(self, other: "Stream") -> None:
        journal.append(f"{self.name} waits for {other.name}")
        order.learn(self.name, order.known[other.name])

    def wait_event(self, event: "Event") -> None:
        journal.append(f"{self.name} waits for an event after {event.after}")
        order.learn(self.name, event.clock)


class Event:
    def __init__(self, enable_timing: bool = False):
        self.after: str | None = None
        self.at = 0.0
        self.clock: Clock = {}

    def record(self, stream: Stream) -> None:
        self.after, self.clock = stream.name, dict(order.known[stream.name])
        self.at = time.perf_counter()
        journal.append(f"event after {stream.name}")

    def synchronize(self) -> None:
        assert self.after, "nothing was recorded: this waits for nothing"
        journal.append(f"{threading.current_thread().name} waits for {self.after}")
        order.learn(_host(), self.clock)

    def elapsed_time(self, end: "Event") -> float:
        """Return milliseconds, as CUDA does."""
        return (end.at - self.at) * 1000


def current_stream(*_) -> Stream:
    return getattr(_current, "stream", None) or Stream("computing")


@contextlib.contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    before, _current.stream = current_stream(), stream
    try:
        yield
    finally:
        _current.stream = before
