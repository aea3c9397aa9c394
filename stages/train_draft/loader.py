"""The data loader: each step's samples packed into cells (micro-batches) with their blocks, and read from the cache.

Only ids and masks decide a batch's layout, so the states are read last: only the rows of each sample's window, and
straight to their place in the cell. The target's final states are read only for losses that learn from them. A
background thread does both, in order, within a limit of bytes. `order.py` decides what is in a batch.

T rows of a sample   K layers   R rows of a cell   F of them that keep `final`   D hidden size
"""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import HiddenCache
from pipeline.cache.codecs.lossy import Encoded
from pipeline.cache.layout import FINAL
from pipeline.cache.reader import Layer, Part
from pipeline.drafts import Blocks, Cell, DraftConfig, eligible_anchors, lay_blocks, pack
from pipeline.runs.recipe import TrainSection
from pipeline.runs.training_data import Split
from stages.train_draft import order

ALIGNMENT = 4  # bytes: of where a column's states begin in a buffer
PREFETCH_BYTES = 1 << 30  # of states: the cell in use and those prefetched. At least one is prefetched, however large
MAX_WAITING = 8  # cells prefetched at most: a small cache should not be in memory a second time
BUFFER_STEP = 16 << 20  # buffers are multiples of this, so that one fits many cells
CPU = torch.device("cpu")


@dataclass(frozen=True)
class SampleWindow:
    """A sample, or a window of it, without its states. `first` is the position in the sample of its first row."""

    index: int  # of the sample in the cache
    ids: Tensor  # [T]
    mask: Tensor  # [T] bool
    first: int
    anchors: np.ndarray  # rows
    name: str
    final_rows: Tensor | None = None  # int64: rows that keep `final`; None where the loss reads none
    final_first: int = 0  # how many rows of the sample before this window keep it

    aux, final = torch.empty(0, 0, 0), torch.empty(0, 0)  # for `pack`: the states are read after the layout is known

    def cost(self, config: DraftConfig) -> order.SampleCost:
        """Return what the window adds to a cell."""
        rows = len(self.ids)
        return order.SampleCost(rows, len(self.anchors), order.forward_cost(config, rows, self.anchors))

    @property
    def part(self) -> Part:
        """The window's range among the rows of the sample."""
        return self.index, self.first, self.first + len(self.ids)

    @property
    def final_part(self) -> Part:
        """The window's range among the rows of the sample that keep `final`."""
        return self.index, self.final_first, self.final_first + len(self.final_rows)


@dataclass(frozen=True)
class Batch:
    """One optimiser step's samples, laid out in cells before any state is read.

    cells: without states, which `BatchLoader.read` adds. blocks, windows: those of each cell. names: sample ids in hex.
    """

    step: int
    epoch: int
    cells: list[Cell]
    blocks: list[Blocks]
    windows: list[list[SampleWindow]]
    names: list[str]

    @property
    def rows(self) -> int:
        """Context rows of all cells."""
        return sum(len(cell.ids_R) for cell in self.cells)


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
    """Makes the batch of any step of a run.

    keep_encoded: leave the states of lossy codecs undecoded until their cell is moved to the device that trains.
    """

    def __init__(
        self, cache: HiddenCache, split: Split, config: DraftConfig, train: TrainSection, keep_encoded: bool = False
    ):
        self.cache, self.config, self.train = cache, config, train
        self.reads_final = config.needs_final_states
        groups = [config.target_layer_ids, *[(FINAL,)] * self.reads_final]
        codecs = {layers: cache.lossy_codec(layers) for layers in groups if keep_encoded}
        self._encoded = {layers: codec for layers, codec in codecs.items() if codec}
        self.low64 = cache.samples.low64[split.train]
        self.ids = cache.samples.sample_id[split.train]
        self.indices = split.train
        self.per_epoch = max(1, len(split.train) // train.batch)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def batch(self, step: int, alone: bool = False) -> Batch:
        """Lay out the batch of `step`, reading no state; `alone` gives every sample its own cell. Thread-safe."""
        epoch, at = divmod(step, self.per_epoch)
        keys, samples_n = self._order(epoch)
        chosen = order.global_batch(samples_n, at, self.train.batch)
        samples = [self._window(int(self.indices[number]), int(keys[number])) for number in chosen]
        train, packed = self.train, [[number] for number in range(len(samples))]
        if not alone:
            costs = [sample.cost(self.config) for sample in samples]
            packed = order.pack_cells(costs, train.context, train.cell_anchors, train.cells)
        windows = [[samples[number] for number in of_cell] for of_cell in packed]
        cells, blocks = zip(*map(self._lay_out, windows), strict=True)
        return Batch(step, epoch, list(cells), list(blocks), windows, [sample.name for sample in samples])

    def read_all(self, batch: Batch) -> Iterator[Cell]:
        """Yield a batch's cells with their states, each read when it is asked for."""
        return (self.read(batch, number) for number in range(len(batch.cells)))

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
        yield "aux_KRD", self.config.target_layer_ids, [window.part for window in windows]
        if self.reads_final:
            yield "final_FD", (FINAL,), [window.final_part for window in windows]

    def _shape(self, layers: tuple[Layer, ...], parts: list[Part]) -> tuple[int, int, int]:
        return len(layers), sum(stop - start for _, start, stop in parts), self.cache.hidden_size

    def _bytes(self, layers: tuple[Layer, ...], shape: tuple[int, int, int]) -> int:
        K, R, D = shape
        if codec := self._encoded.get(layers):
            return -(-codec.buffer_bytes(shape) // ALIGNMENT) * ALIGNMENT
        return K * R * D * self.cache.dtype.itemsize

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and order of the samples in an epoch; those of the last epoch asked for are cached."""
        cached = self._epoch
        if cached is None or cached[0] != epoch:
            keys = order.epoch_keys(self.low64, self.train.seed, epoch)
            cached = self._epoch = (epoch, keys, order.epoch_order(keys, self.ids))
        return cached[1:]

    def _window(self, index: int, key: int) -> SampleWindow:
        """Choose a sample's window and its anchors."""
        ids, mask = self.cache.tokens_of(index)
        mask_T = torch.from_numpy(mask)
        start, stop = order.draw_window(eligible_anchors(mask_T).numpy(), key, self.train.context)
        valid_T = eligible_anchors(mask_T[start:stop]).numpy()
        final_rows, final_first = self.cache.final_rows(index, mask, start, stop) if self.reads_final else (None, 0)
        return SampleWindow(
            index=index,
            ids=torch.from_numpy(ids[start:stop].astype(np.int64)),
            mask=mask_T[start:stop],
            first=start,
            anchors=order.draw_anchors(valid_T, key, self.train.anchors, first=start),
            name=self.cache.samples.hex(index),
            final_rows=None if final_rows is None else torch.from_numpy(final_rows - start),
            final_first=final_first,
        )

    def _lay_out(self, windows: list[SampleWindow]) -> tuple[Cell, Blocks]:
        """Return the cell of these windows, its states still to be read, and its blocks."""
        names, firsts = [window.name for window in windows], [window.first for window in windows]
        cell = pack(windows, names, firsts, final=self.reads_final)
        starts = cell.starts_M.tolist()
        anchors = [torch.from_numpy(window.anchors + start) for window, start in zip(windows, starts, strict=True)]
        anchors_N = torch.cat(anchors)
        return cell, lay_blocks(cell, anchors_N, torch.ones_like(anchors_N, dtype=torch.bool), self.config)


@dataclass(eq=False)
class Buffer:
    """Memory for one cell's states. `copy_done`: the CUDA event after which it may be overwritten."""

    bytes_B: Tensor
    copy_done: "torch.cuda.Event | None" = None

    def __len__(self) -> int:
        return len(self.bytes_B)


class Prefetcher:
    """Iterates once over the batches of steps start to stop - 1, in order, as (batch, its cells with their states).

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
        self._left = start - 1  # the newest step of which no more cells are wanted
        self._thread = threading.Thread(target=self._run, args=(range(start, stop),), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Batch, Iterator[Cell]]]:
        while (batch := self._next_batch()) is not None:
            yield batch, self._cells(batch)
            self._leave(batch.step)

    def close(self) -> None:
        """Return when the thread has ended; it begins nothing more."""
        self._leave(math.inf)
        self._thread.join()

    def _next_batch(self) -> Batch | None:
        while isinstance(found := self._take(), tuple):  # a cell that nobody asked for
            self._return_buffer(found[1])
        return found

    def _cells(self, batch: Batch) -> Iterator[Cell]:
        for _ in batch.cells:
            assert self._left < batch.step, f"cells of step {batch.step} are asked for after its batch"
            cell, buffer = self._take()
            try:
                yield cell
            finally:
                self._return_buffer(buffer)

    def _leave(self, step: float) -> None:
        """Have no more cells read of the steps up to `step`."""
        with self._changed:
            self._left = step
            self._changed.notify_all()

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
                if self._left > step:
                    return
                batch = self.loader.batch(step)
                self._put(batch)
                for number, windows in enumerate(batch.windows):
                    buffer = self._take_buffer(step, self.loader.size(windows))
                    if buffer is None:
                        break
                    self._put((self.loader.read(batch, number, buffer.bytes_B), buffer))
            self._put(None)
        except BaseException as error:  # the caller raises it
            self._put(error)

    def _put(self, found) -> None:
        with self._changed:
            self._ready.append(found)
            self._changed.notify_all()

    def _take_buffer(self, step: int, size: int) -> Buffer | None:
        """Return memory for a cell of `step`, once there may be one more; None when none is wanted any more."""
        size = -(-size // BUFFER_STEP) * BUFFER_STEP
        with self._changed:
            self._changed.wait_for(lambda: self._left >= step or self._may_use(size))
            if self._left >= step:
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
