"""Prefetching: a background thread reads the next cells (packed micro-batches), in order, within a byte limit.

States are read into buffers that are reused, pinned where a CUDA device copies from them. So a cell is valid only
until the next one is asked for.
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
    from stages.train_draft.loader import AnyCell, Batch, BatchLayout, BatchLoader, CellLayout

PREFETCH_BYTES = 1 << 30  # of states: the cell in use and those prefetched. At least one is prefetched, however large
MAX_WAITING = 8  # cells prefetched at most: a small cache should not be in memory a second time
LAYOUTS_AHEAD = 2  # batches laid out beyond the one whose cells are being read: ids, masks and blocks, but no states
CPU = torch.device("cpu")
BUFFER_STEP = 16 << 20  # buffers are multiples of this, so that one fits many cells


@dataclass(eq=False)
class Buffer:
    """Memory for one cell's states. `copy_done`: the CUDA event after which it may be overwritten."""

    bytes_B: Tensor
    copy_done: "torch.cuda.Event | None" = None

    def __len__(self) -> int:
        return len(self.bytes_B)


class Prefetcher:
    """Iterates once over the batches of steps start to stop - 1, in order. Call `close` at the end.

    limit: bytes of states in memory. waited: seconds the caller has waited for data. An error while reading a cell is
    raised when the caller asks for that cell.
    """

    def __init__(
        self, loader: "BatchLoader", start: int, stop: int, device: torch.device = CPU, limit: int = PREFETCH_BYTES
    ):
        self.loader, self.limit, self.device = loader, limit, device
        self.pinned = device.type == "cuda"
        self.waited = 0.0
        self._steps = iter(range(start, stop))
        self._layouts: deque[Future[BatchLayout]] = deque()  # being laid out
        self._batches: deque[BatchLayout] = deque()  # laid out, not yet given out
        self._cells: deque[tuple[int, CellLayout]] = deque()  # of these batches, to be read
        self._reads: deque[tuple[int, Future[AnyCell], Buffer]] = deque()
        self._free_buffers: list[Buffer] = []
        self._used_bytes = 0  # bytes of buffers in use
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def __iter__(self) -> Iterator["Batch"]:
        while self._next_batch():
            layout = self._batches.popleft()
            yield layout.batch(self._cells_of(layout))
            self._drop_rest(layout.step)

    def close(self) -> None:
        """Cancel what is not begun; return when the thread has ended."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _next_batch(self) -> bool:
        self._submit_work()
        while not self._batches and self._layouts:
            self._take_layout()
            self._submit_work()
        return bool(self._batches)

    def _take_layout(self) -> None:
        layout = self._wait(self._layouts.popleft())
        self._batches.append(layout)
        self._cells += ((layout.step, cell_layout) for cell_layout in layout.cells)

    def _cells_of(self, layout: "BatchLayout") -> Iterator["tuple[AnyCell, Blocks]"]:
        for cell_layout in layout.cells:
            self._submit_work()
            step, future, buffer = self._reads.popleft()
            assert step == layout.step, f"cells of step {layout.step} are asked for after its batch"
            try:
                cell = self._wait(future)
                self._submit_work()
                yield cell, cell_layout.blocks
            finally:
                self._return_buffer(buffer)

    def _drop_rest(self, step: int) -> None:
        """Drop the cells of a batch that the caller did not ask for."""
        while self._cells and self._cells[0][0] == step:
            self._cells.popleft()
        while self._reads and self._reads[0][0] == step:
            _, future, buffer = self._reads.popleft()
            if not future.cancel():
                self._wait(future)
            self._return_buffer(buffer)

    def _submit_work(self) -> None:
        """Have the next cells read, as many as there is room for, and the next batches laid out."""
        while True:
            while len(self._layouts) < LAYOUTS_AHEAD and (step := next(self._steps, None)) is not None:
                self._layouts.append(self._thread.submit(self.loader.lay_out, step))
            if not self._cells and self._layouts and self._layouts[0].done():
                self._take_layout()
                continue
            if not self._cells:
                return
            step, cell_layout = self._cells[0]
            size = -(-self.loader.size(cell_layout) // BUFFER_STEP) * BUFFER_STEP
            if self._reads and (self._used_bytes + size > self.limit or len(self._reads) == MAX_WAITING):
                return
            self._cells.popleft()
            buffer = self._take_buffer(size)
            self._reads.append((step, self._thread.submit(self._read, cell_layout, buffer), buffer))

    def _read(self, cell_layout: "CellLayout", buffer: Buffer) -> "AnyCell":
        if buffer.copy_done is not None:
            buffer.copy_done.synchronize()
        return self.loader.read(cell_layout, buffer.bytes_B)

    def _wait(self, future: Future):
        began = time.perf_counter()
        try:
            return future.result()
        finally:
            self.waited += time.perf_counter() - began

    def _take_buffer(self, size: int) -> Buffer:
        fitting = [buffer for buffer in self._free_buffers if len(buffer) >= size]
        if fitting:
            buffer = min(fitting, key=len)
            self._free_buffers.remove(buffer)
        else:
            if self._used_bytes + sum(map(len, self._free_buffers)) + size > self.limit:
                self._free_buffers.clear()  # all too small
            buffer = Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned))
        self._used_bytes += len(buffer)
        return buffer

    def _return_buffer(self, buffer: Buffer) -> None:
        self._used_bytes -= len(buffer)
        if self.pinned:
            buffer.copy_done = torch.cuda.Event()
            # the copy to the device may still be queued; `device` need not be the process' current one
            buffer.copy_done.record(torch.cuda.current_stream(self.device))
        self._free_buffers.append(buffer)
