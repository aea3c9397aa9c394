"""Cells read ahead of the one that is computed: in order, by another thread, within so many bytes.

A cell's states are read into memory that is used again and again, pinned where a CUDA device copies from it. So a cell
is good until the next one is asked for.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.drafts import Blocks

if TYPE_CHECKING:
    from stages.train_draft.loader import AnyCell, Batch, Laid, Plan, Stream

AHEAD_BYTES = 1 << 30  # of states: the cell in use and those that wait. At least one always waits, however large
CELLS = 8  # that wait at most: a small cache is not to be held in memory a second time
PLANS = 2  # batches laid out beyond the one whose cells are being read: ids, masks and blocks, but no states
CPU = torch.device("cpu")
GRAIN = 16 << 20  # buffers are multiples of this, so that one fits many cells


@dataclass(eq=False)
class Buffer:
    """Memory for one cell's states. `busy`: what a CUDA device has still to do before it may be overwritten."""

    bytes_B: Tensor
    busy: "torch.cuda.Event | None" = None

    def __len__(self) -> int:
        return len(self.bytes_B)


class Ahead:
    """The batches of steps start to stop - 1, once, in order. Close it when done.

    waited: seconds the caller has waited for data. What reading raises, the caller gets at the cell it was raised for.
    """

    def __init__(self, stream: "Stream", start: int, stop: int, device: torch.device = CPU, limit: int = AHEAD_BYTES):
        self.stream, self.limit, self.device = stream, limit, device
        self.pinned = device.type == "cuda"
        self.waited = 0.0
        self._steps = iter(range(start, stop))
        self._plans: deque[Future[Plan]] = deque()  # being laid out
        self._batches: deque[Plan] = deque()  # laid out, in turn
        self._cells: deque[tuple[int, Laid]] = deque()  # theirs, to be read
        self._reads: deque[tuple[int, Future[AnyCell], Buffer]] = deque()
        self._free: list[Buffer] = []
        self._held = 0  # bytes of buffers in use
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def __iter__(self) -> Iterator["Batch"]:
        while self._next_batch():
            plan = self._batches.popleft()
            yield plan.batch(self._cells_of(plan))
            self._pass_over(plan.step)

    def close(self) -> None:
        """Stop reading; returns when no thread of ours reads any more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _next_batch(self) -> bool:
        self._read_on()
        while not self._batches and self._plans:
            self._take_plan()
            self._read_on()
        return bool(self._batches)

    def _take_plan(self) -> None:
        plan = self._wait(self._plans.popleft())
        self._batches.append(plan)
        self._cells += ((plan.step, laid) for laid in plan.cells)

    def _cells_of(self, plan: "Plan") -> Iterator["tuple[AnyCell, Blocks]"]:
        for laid in plan.cells:
            self._read_on()
            step, future, buffer = self._reads.popleft()
            assert step == plan.step, f"cells of step {plan.step} are asked for after its batch"
            try:
                cell = self._wait(future)
                self._read_on()
                yield cell, laid.blocks
            finally:
                self._give(buffer)

    def _pass_over(self, step: int) -> None:
        """Drop the cells that the caller left of a batch."""
        while self._cells and self._cells[0][0] == step:
            self._cells.popleft()
        while self._reads and self._reads[0][0] == step:
            _, future, buffer = self._reads.popleft()
            if not future.cancel():
                self._wait(future)
            self._give(buffer)

    def _read_on(self) -> None:
        """Have the next cells read, as many as there is room for, and the next batches laid out."""
        while True:
            while len(self._plans) < PLANS and (step := next(self._steps, None)) is not None:
                self._plans.append(self._thread.submit(self.stream.plan, step))
            if not self._cells and self._plans and self._plans[0].done():
                self._take_plan()
                continue
            if not self._cells:
                return
            step, laid = self._cells[0]
            size = -(-self.stream.size(laid) // GRAIN) * GRAIN
            if self._reads and (self._held + size > self.limit or len(self._reads) == CELLS):
                return
            self._cells.popleft()
            buffer = self._take(size)
            self._reads.append((step, self._thread.submit(self._read, laid, buffer), buffer))

    def _read(self, laid: "Laid", buffer: Buffer) -> "AnyCell":
        if buffer.busy is not None:
            buffer.busy.synchronize()
        return self.stream.read(laid, buffer.bytes_B)

    def _wait(self, future: Future):
        asked = time.perf_counter()
        try:
            return future.result()
        finally:
            self.waited += time.perf_counter() - asked

    def _take(self, size: int) -> Buffer:
        fitting = [buffer for buffer in self._free if len(buffer) >= size]
        if fitting:
            buffer = min(fitting, key=len)
            self._free.remove(buffer)
        else:
            if self._held + sum(map(len, self._free)) + size > self.limit:
                self._free.clear()  # they are too small
            buffer = Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned))
        self._held += len(buffer)
        return buffer

    def _give(self, buffer: Buffer) -> None:
        self._held -= len(buffer)
        if self.pinned:
            buffer.busy = torch.cuda.Event()
            # the copy was queued, and may not be done; on this device, which need not be the process' current one
            buffer.busy.record(torch.cuda.current_stream(self.device))
        self._free.append(buffer)
