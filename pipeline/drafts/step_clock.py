"""Where the time of training steps goes: seconds in each phase of a step.

    forward      the backbone and a method's own modules, from states to what the head reads, and the bookkeeping of
                 the loss
    head         the LM head fused with its loss (head_loss.py). It computes its gradient in the forward, so this is the
                 forward AND the backward of logits, loss and correction by W_out, the two largest matrix products
    backward     the rest of the backward: from the head's gradient down through the backbone. Where layers are computed
                 again for want of memory, that second forward is here; of sharded ranks also their sums of gradients
    optimizer    the gradient's norm, clipping, and the update

A method that does not use the fused head has its head in forward and backward.
"""

import contextlib
import itertools
import time

import torch

PHASES = ("forward", "head", "backward", "optimizer")
MOST_MARKS = 4096  # of a GPU that nobody has asked for yet


class StoppedClock:
    """A clock that measures nothing: what a draft has outside of a training."""

    def phase(self, name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class StepClock(StoppedClock):
    """Adds up the seconds of each phase. Phases may nest: the inner one's seconds are not the outer one's.

    On a CUDA device the seconds are those of the stream in use, by events in it: the host waits for nothing until
    `read`. Elsewhere they are the host's.
    """

    def __init__(self, device: torch.device):
        self.device, self._on_gpu = device, device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._running: str | None = None
        self._began = 0.0
        self._marks: list[tuple[str | None, torch.cuda.Event]] = []  # the phase that began there

    def phase(self, name: str) -> "Phase":
        """Return a context manager whose time counts as that of a phase of PHASES."""
        return Phase(self, name)

    def enter(self, name: str | None) -> str | None:
        """Begin a phase, None for time that is not counted; return the one before."""
        before, self._running = self._running, name
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append((name, event))
            if len(self._marks) > MOST_MARKS:
                self.read()
            return before
        now = time.perf_counter()
        if before is not None:
            self._seconds[before] += now - self._began
        self._began = now
        return before

    def read(self) -> dict[str, float]:
        """Return the seconds in each phase so far; on a CUDA device, once it has come to the end of the last one."""
        if self._marks:
            self._marks[-1][1].synchronize()
            for (name, begin), (_, end) in itertools.pairwise(self._marks):
                if name is not None:
                    self._seconds[name] += begin.elapsed_time(end) / 1000
            del self._marks[:-1]
        return dict(self._seconds)


class Phase:
    """A phase of a clock while it lasts; a class, which takes half the time of a generator's context."""

    __slots__ = ("before", "clock", "name")

    def __init__(self, clock: StepClock, name: str):
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.before = self.clock.enter(self.name)

    def __exit__(self, *_) -> None:
        self.clock.enter(self.before)
