"""The data loader: the states of each step's cells, read from the cache by a thread ahead of need.

The layout of a batch is known before its states are read: only the rows of each sample's window, and straight to their
place in the cell. The target's final states are read only for losses that learn from them.

    K layers   R rows of a cell   F of them that keep `final`   D hidden size
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.cache.codecs.lossy import Encoded
from pipeline.cache.layout import FINAL
from pipeline.cache.reader import Layer, Part
from pipeline.drafts import Cell
from stages.train_draft.batches import Batch, Sampler, SampleWindow

ALIGNMENT = 4  # bytes: of where a column's states begin in a buffer
PREFETCH_BYTES = 1 << 30  # of states: the cell in use and those prefetched. At least one is prefetched, however large
MAX_WAITING = 8  # cells prefetched at most: a small cache should not be in memory a second time
BUFFER_STEP = 16 << 20  # buffers are multiples of this, so that one fits many cells
CPU = torch.device("cpu")


@dataclass(frozen=True)
class EncodedStates:
    """States [K, R, D] that were read but are still encoded: fewer bytes to copy, and no work for the host.

    pieces: (index of the layer, first row, encoded rows).
    """

    shape: tuple[int, int, int]
    final: bool
    pieces: list[tuple[int, int, Encoded]]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Tensor:
        """Return the states as a cell has them, decoded on a device."""
        dtype = getattr(torch, self.pieces[0][2].dtype)
        states_KRD = torch.empty(self.shape, dtype=dtype, device=device)
        for k, first, encoded in self.pieces:
            encoded.decode(device, states_KRD[k, first : first + len(encoded)])
        return states_KRD[0] if self.final else states_KRD


class BatchLoader:
    """Reads the states of a sampler's batches.

    keep_encoded: leave the states of lossy codecs undecoded until their cell is moved to the device that trains.
    rank, ranks: of a batch's cells j, only those with j mod `ranks` = `rank` are read.
    """

    def __init__(self, sampler: Sampler, keep_encoded: bool = False, rank: int = 0, ranks: int = 1):
        self.sampler, self.cache = sampler, sampler.cache
        self.rank, self.ranks = rank, ranks
        groups = [sampler.config.target_layer_ids, *[(FINAL,)] * sampler.config.needs_final_states]
        codecs = {layers: self.cache.lossy_codec(layers) for layers in groups if keep_encoded}
        self._encoded = {layers: codec for layers, codec in codecs.items() if codec}

    def read_all(self, batch: Batch) -> Iterator[Cell]:
        """Yield this rank's cells of a batch with their states, each read when it is asked for."""
        return (self.read(batch, number) for number in self.numbers(batch))

    def numbers(self, batch: Batch) -> range:
        """Return which of a batch's cells are this rank's."""
        return range(self.rank, len(batch.cells), self.ranks)

    def read(self, batch: Batch, number: int, memory_B: Tensor | None = None) -> Cell:
        """Return a cell with its states, read into `memory_B` (uint8, `size` or more) if given; raises as `fill`."""
        cell, windows, states, at = batch.cells[number], batch.windows[number], {}, 0
        if memory_B is None:
            memory_B = torch.empty(self.size(windows), dtype=torch.uint8)
        for name, layers, parts in self._to_read(windows):
            shape = self._shape(layers, parts)
            part_B = memory_B[at : at + self._bytes(layers, shape)]
            at += len(part_B)
            final = FINAL in layers
            if codec := self._encoded.get(layers):
                states[name] = EncodedStates(shape, final, self.cache.read_encoded(part_B, parts, layers, codec))
            else:
                states_KRD = part_B.view(self.cache.dtype).view(shape)
                self.cache.fill(states_KRD, parts, layers)
                states[name] = states_KRD[0] if final else states_KRD
        return replace(cell, **states)

    def size(self, windows: list[SampleWindow]) -> int:
        """Return the bytes of a cell's states, as `read` leaves them in memory."""
        return sum(self._bytes(layers, self._shape(layers, parts)) for _, layers, parts in self._to_read(windows))

    def _to_read(self, windows: list[SampleWindow]) -> Iterator[tuple[str, tuple[Layer, ...], list[Part]]]:
        """Yield what a cell's states are read from: the cell's field, the layers, and for each window the sample's
        index, first row and stop."""
        yield "aux_KRD", self.sampler.config.target_layer_ids, [window.part for window in windows]
        if self.sampler.config.needs_final_states:
            yield "final_FD", (FINAL,), [window.final_part for window in windows]

    def _shape(self, layers: tuple[Layer, ...], parts: list[Part]) -> tuple[int, int, int]:
        return len(layers), sum(stop - start for _, start, stop in parts), self.cache.hidden_size

    def _bytes(self, layers: tuple[Layer, ...], shape: tuple[int, int, int]) -> int:
        K, R, D = shape
        if codec := self._encoded.get(layers):
            return -(-codec.buffer_bytes(shape) // ALIGNMENT) * ALIGNMENT
        return K * R * D * self.cache.dtype.itemsize


@dataclass(eq=False)
class Buffer:
    """Memory for one cell's states. `copy_done`: the CUDA event after which it may be overwritten."""

    bytes_B: Tensor
    copy_done: "torch.cuda.Event | None" = None

    def __len__(self) -> int:
        return len(self.bytes_B)


class Prefetcher:
    """Iterates once over the batches of steps start to stop - 1, in order, as (batch, its cells with their states), of
    which a loader for one of several ranks reads that rank's.

    A cell is valid only until the next one is asked for: its memory is used again, pinned where a CUDA device copies
    from it. limit: bytes of states in memory. waited: seconds the caller has waited for data. An error while reading a
    cell is raised when the caller asks for that cell. Call `close` at the end.
    """

    def __init__(
        self, loader: BatchLoader, start: int, stop: int, device: torch.device = CPU, limit: int = PREFETCH_BYTES
    ):
        self.loader, self.limit, self.device = loader, limit, device
        self.pinned = device.type == "cuda"
        self.waited = 0.0
        self._changed = threading.Condition()  # guards all that follows
        self._ready: deque = deque()  # in order: a batch, then (cell, buffer) of each of its cells; None at the end
        self._free_buffers: list[Buffer] = []
        self._used_bytes = 0  # bytes of buffers in use
        self._closed = False
        self._current: Batch | None = None  # whose cells may be asked for
        self._thread = threading.Thread(target=self._run, args=(range(start, stop),), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Batch, Iterator[Cell]]]:
        while (found := self._take()) is not None:
            if isinstance(found, Batch):
                self._current = found
                yield found, self._cells(found)
            else:  # a cell that nobody asked for
                self._return_buffer(found[1])

    def close(self) -> None:
        """Return when the thread has ended; it begins nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _cells(self, batch: Batch) -> Iterator[Cell]:
        for _ in self.loader.numbers(batch):
            assert self._current is batch, f"cells of step {batch.step} are asked for after its batch"
            cell, buffer = self._take()
            try:
                yield cell
            finally:
                self._return_buffer(buffer)

    def _take(self):
        """Return what comes next, once it is there; raise the error that came instead."""
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            found = self._ready.popleft()
            self._changed.notify_all()
        self.waited += time.perf_counter() - began
        if isinstance(found, BaseException):
            raise found
        return found

    def _return_buffer(self, buffer: Buffer) -> None:
        if self.pinned:
            buffer.copy_done = torch.cuda.Event()
            # the copy to the device may still be queued; `device` need not be the process' current one
            buffer.copy_done.record(torch.cuda.current_stream(self.device))
        with self._changed:
            self._used_bytes -= len(buffer)
            self._free_buffers.append(buffer)
            self._changed.notify_all()

    def _run(self, steps: range) -> None:
        """In the thread: lay out each batch, then read its cells."""
        try:
            for step in steps:
                batch = self.loader.sampler.batch(step)
                self._put(batch)
                for number in self.loader.numbers(batch):
                    buffer = self._take_buffer(self.loader.size(batch.windows[number]))
                    if buffer is None:
                        return
                    self._put((self.loader.read(batch, number, buffer.bytes_B), buffer))
            self._put(None)
        except BaseException as error:  # the caller raises it
            self._put(error)

    def _put(self, found) -> None:
        with self._changed:
            self._ready.append(found)
            self._changed.notify_all()

    def _take_buffer(self, size: int) -> Buffer | None:
        """Return memory for a cell, once there may be one more; None when no more are wanted."""
        size = -(-size // BUFFER_STEP) * BUFFER_STEP
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._may_use(size))
            if self._closed:
                return None
            fitting = [buffer for buffer in self._free_buffers if len(buffer) >= size]
            if fitting:
                buffer = min(fitting, key=len)
                self._free_buffers.remove(buffer)
            else:
                if self._used_bytes + sum(map(len, self._free_buffers)) + size > self.limit:
                    self._free_buffers.clear()  # all too small
                buffer = Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned))
            self._used_bytes += len(buffer)
        if buffer.copy_done is not None:
            buffer.copy_done.synchronize()
        return buffer

    def _may_use(self, size: int) -> bool:
        waiting = sum(isinstance(found, tuple) for found in self._ready)
        return not waiting or (waiting < MAX_WAITING and self._used_bytes + size <= self.limit)
