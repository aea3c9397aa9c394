"""The data loader: the states of each step's cells, read from the cache by a thread ahead of need.

The layout of a batch is known before its states are read: only the rows of each sample's window, and straight to their
place in the cell. The target's final states are read only for losses that learn from them.

    K layers   R rows of a cell   F of them that keep `final`   D hidden size
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.cache.layout import FINAL
from pipeline.cache.reader import Layer, Part
from pipeline.drafts import Cell
from stages.train_draft.batches import Batch, Sampler, SampleWindow
from stages.train_draft.copy_stream import CopyStream
from stages.train_draft.states import StatesInPieces

ALIGNMENT = 4  # bytes: of where a column's states begin in a buffer
# Of states: the cell in use and those prefetched. However large, at least one is prefetched; two where the cell in use
# leaves its memory when the next is copied.
PREFETCH_BYTES = 1 << 30
MAX_WAITING = 8  # cells prefetched at most, and batches: a small cache should not be in memory a second time
BUFFER_STEP = 16 << 20  # buffers are multiples of this, so that one fits many cells
CPU = torch.device("cpu")


class BatchLoader:
    """Reads the states of a sampler's batches.

    keep_encoded: leave the states of lossy codecs undecoded until their cell is moved to the device that trains.
    layers: those to read, by default the draft's. rank, ranks: of a batch's cells j, only those with j mod `ranks` =
    `rank` are read.
    """

    def __init__(
        self,
        sampler: Sampler,
        keep_encoded: bool = False,
        rank: int = 0,
        ranks: int = 1,
        layers: Sequence[int] | None = None,
    ):
        self.sampler, self.cache = sampler, sampler.cache
        self.rank, self.ranks = rank, ranks
        self.layers = tuple(layers or sampler.config.target_layer_ids)
        groups = [self.layers, *[(FINAL,)] * sampler.config.needs_final_states]
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
                states[name] = StatesInPieces(shape, final, self.cache.read_encoded(part_B, parts, layers, codec))
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
        yield "aux_KRD", self.layers, [window.part for window in windows]
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
    from it; there a cell that had been read when the one before was asked for comes as a `CopiedCell`. limit: bytes of
    states in memory. waited: seconds the caller has waited for data. An error while reading a cell is raised when the
    caller asks for that cell. Call `close` at the end.

    With `keep` or `train.echo` a batch's cells are read once, and are valid until the first step that uses others is
    asked for. As much as two batches may then be in memory, whatever the limit: while one is used, the next is read.
    None is then copied ahead.
    """

    def __init__(
        self,
        loader: BatchLoader,
        start: int,
        stop: int,
        device: torch.device = CPU,
        limit: int = PREFETCH_BYTES,
        keep: bool = False,
    ):
        self.loader, self.limit, self.device = loader, limit, device
        self.start, self.keeps = start, keep or loader.sampler.train.echo > 1
        self._kept: list[tuple[Cell, Buffer]] = []  # the cells read of the batch in use, where they are kept
        self._most_waiting = MAX_WAITING
        self.pinned = device.type == "cuda"
        self._copies = CopyStream(device) if self.pinned and not self.keeps else None
        self._ahead: deque = deque()  # the caller's, in order: taken from `_ready`, to the next cell, which is copied
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
                if not self._uses_kept(found):
                    while self._kept:
                        self._return_buffer(self._kept.pop()[1])
                self._current = found
                yield found, self._cells(found)
            elif self.keeps:  # a cell that nobody asked for yet
                self._kept.append(found)
            else:
                self._return_buffer(found[1])

    def close(self) -> None:
        """Return when the thread has ended; it begins nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        wait_for_copies(self._free_buffers)

    def _uses_kept(self, batch: Batch) -> bool:
        return batch.use > 0 and batch.step > self.start

    def _cells(self, batch: Batch) -> Iterator[Cell]:
        for at in range(len(self.loader.numbers(batch))):
            assert self._current is batch, f"cells of step {batch.step} are asked for after its batch"
            if self.keeps:
                if at == len(self._kept):
                    self._kept.append(self._take())
                yield self._kept[at][0]
                continue
            cell, buffer = self._take()
            self._copy_next()
            try:
                yield cell
            finally:
                self._return_buffer(buffer)

    def _take(self):
        """Return what comes next, once it is there; raise the error that came instead."""
        began = time.perf_counter()
        found = self._ahead.popleft() if self._ahead else self._next()
        self.waited += time.perf_counter() - began
        if isinstance(found, BaseException):
            raise found
        return found

    def _next(self):
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            found = self._ready.popleft()
            self._changed.notify_all()
        return found

    def _copy_next(self) -> None:
        """Begin to copy the next cell to the device, where it has been read."""
        while self._copies and self._ready:
            self._ahead.append(self._next())
            if isinstance(self._ahead[-1], tuple):
                cell, buffer = self._ahead[-1]
                if (copied := self._copies.copy(cell)) is not None:
                    self._return_buffer(buffer, copied.copied)
                    self._ahead[-1] = copied, None
                return

    def _return_buffer(self, buffer: Buffer | None, copied: "torch.cuda.Event | None" = None) -> None:
        """Let the thread use a buffer again; None: it does so already. copied: the event behind the copies from it, by
        default one behind all that was asked of the device."""
        if buffer is None:
            return
        if self.pinned and copied is None:
            copied = torch.cuda.Event()
            # the copy to the device may still be queued; `device` need not be the process' current one
            copied.record(torch.cuda.current_stream(self.device))
        buffer.copy_done = copied
        with self._changed:
            self._used_bytes -= len(buffer)
            self._free_buffers.append(buffer)
            self._changed.notify_all()

    def _run(self, steps: range) -> None:
        """In the thread: lay out each batch, then read its cells."""
        try:
            for step in steps:
                if not self._wait_for_turn():
                    return
                batch = self.loader.sampler.batch(step)
                self._put(batch)
                if self._uses_kept(batch):
                    continue
                numbers = self.loader.numbers(batch)
                sizes = [buffer_size(self.loader.size(batch.windows[number])) for number in numbers]
                if self.keeps:
                    self.limit = max(self.limit, 2 * sum(sizes))
                    self._most_waiting = max(self._most_waiting, len(sizes))
                for number, size in zip(numbers, sizes, strict=True):
                    buffer = self._take_buffer(size)
                    if buffer is None:
                        return
                    self._put((self.loader.read(batch, number, buffer.bytes_B), buffer))
            self._put(None)
        except BaseException as error:  # the caller raises it
            self._put(error)

    def _wait_for_turn(self) -> bool:
        """Wait until another batch may be laid out, of which this rank need not have a cell; False when none is
        wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._batches_waiting() < MAX_WAITING)
            return not self._closed

    def _put(self, found) -> None:
        with self._changed:
            self._ready.append(found)
            self._changed.notify_all()

    def _take_buffer(self, size: int) -> Buffer | None:
        """Return memory for a cell, once there may be one more; None when no more are wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._may_use(size))
            if self._closed:
                return None
            fitting, dropped = [buffer for buffer in self._free_buffers if len(buffer) >= size], []
            if fitting:
                buffer = min(fitting, key=len)
                self._free_buffers.remove(buffer)
                size = len(buffer)
            elif self._used_bytes + sum(map(len, self._free_buffers)) + size > self.limit:
                dropped, self._free_buffers = self._free_buffers, []  # all too small
            self._used_bytes += size
        wait_for_copies(dropped)
        dropped.clear()
        if not fitting:
            return Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned))
        wait_for_copies([buffer])
        return buffer

    def _batches_waiting(self) -> int:
        return sum(isinstance(found, Batch) for found in self._ready)

    def _may_use(self, size: int) -> bool:
        waiting = sum(isinstance(found, tuple) for found in self._ready)
        if waiting < (2 if self._copies else 1):
            return True
        return waiting < self._most_waiting and self._used_bytes + size <= self.limit


def wait_for_copies(buffers: Sequence[Buffer]) -> None:
    """Return once nothing is copied from buffers any more, which may then be written or freed: torch knows nothing of
    copies from views that numpy made of pinned memory, and gives what was freed to others."""
    for buffer in buffers:
        if buffer.copy_done is not None:
            buffer.copy_done.synchronize()


def buffer_size(size: int) -> int:
    """Return the size of a buffer for so many bytes."""
    return -(-size // BUFFER_STEP) * BUFFER_STEP
