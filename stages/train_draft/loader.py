"""The data loader: each step's samples packed into cells (micro-batches) with their blocks, and read from the cache.

Only ids and masks decide a batch's layout, so the states are read last: only the rows of each sample's window, and
straight to their place in the cell. The target's final states are read only for losses that learn from them.

T rows of a sample   K layers   R rows of a cell   F of them that keep `final`   D hidden size
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import HiddenCache
from pipeline.cache.codecs.lossy import Encoded
from pipeline.cache.layout import FINAL
from pipeline.cache.reader import Layer, Part
from pipeline.drafts import Blocks, Cell, DraftConfig, eligible_anchors, lay_blocks, needs_final_states, pack
from pipeline.runs.recipe import TrainSection
from pipeline.runs.split import Split
from stages.train_draft.order import (
    SampleCost,
    draw_anchors,
    draw_window,
    epoch_keys,
    epoch_order,
    forward_cost,
    global_batch,
    pack_cells,
)
from stages.train_draft.prefetch import CPU, Prefetcher

ALIGNMENT = 4  # bytes: of where a column's states begin in a buffer


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

    @property
    def final_part(self) -> Part:
        """The window's range among the rows of the sample that keep `final`."""
        return self.index, self.final_first, self.final_first + len(self.final_rows)

    @property
    def aux(self) -> Tensor:
        """An empty [0, T, 0], which `pack` accepts: the states are read after the layout is known."""
        return torch.empty(0, len(self.ids), 0)

    @property
    def final(self) -> Tensor:
        """An empty [0, 0], likewise."""
        return torch.empty(0, 0)


@dataclass(frozen=True)
class StatesToRead:
    """One column group of a cell, still to be read: for each layer, `parts` of samples (index, first row, stop) end to
    end."""

    layers: tuple[Layer, ...]
    parts: list[Part]

    def shape(self, width: int) -> tuple[int, int, int]:
        """Return [K, R, D] for a hidden size `width`; K is 1 for `final`."""
        return len(self.layers), sum(stop - start for _, start, stop in self.parts), width

    def in_cell(self, states_KRD: Tensor) -> Tensor:
        """Return the states in the shape that a cell has them: `final` as [F, D]."""
        return states_KRD[0] if FINAL in self.layers else states_KRD


@dataclass(frozen=True)
class CellLayout:
    """A cell and its blocks, its states still to be read: `to_read` maps the cell's fields `aux_KRD` and, where the
    loss needs it, `final_FD`."""

    cell: Cell
    blocks: Blocks
    to_read: dict[str, StatesToRead]


@dataclass(frozen=True)
class EncodedStates:
    """States that were read but are still encoded. pieces: (index of the layer, first row, encoded rows)."""

    states: StatesToRead
    pieces: list[tuple[int, int, Encoded]]

    def to(self, device: torch.device | str) -> Tensor:
        """Return the states, decoded on a device."""
        _, _, encoded = self.pieces[0]
        shape = self.states.shape(encoded.width)
        states_KRD = torch.empty(shape, dtype=getattr(torch, encoded.dtype), device=device)
        for k, first, encoded in self.pieces:
            encoded.decode(device, states_KRD[k, first : first + len(encoded)])
        return self.states.in_cell(states_KRD)


@dataclass(frozen=True)
class EncodedCell:
    """A cell some of whose states are still encoded, by field name. `to` decodes them."""

    cell: Cell
    encoded: dict[str, EncodedStates]

    def to(self, device: torch.device | str) -> Cell:
        """Return the cell on a device, decoded there: half the bytes to copy, and no work for the host."""
        return replace(self.cell.to(device), **{name: states.to(device) for name, states in self.encoded.items()})


AnyCell = Cell | EncodedCell


@dataclass(frozen=True)
class LazyCells(Sequence):
    """The cells of a batch, each read when it is indexed, so that only one need be in memory."""

    loader: "BatchLoader"
    layouts: list[CellLayout]

    def __len__(self) -> int:
        return len(self.layouts)

    def __getitem__(self, number: int) -> tuple[AnyCell, Blocks]:
        layout = self.layouts[number]
        return self.loader.read(layout), layout.blocks


@dataclass(frozen=True)
class Batch:
    """One optimiser step's cells. names: sample ids in hex. rows: context rows of all cells.

    `blocks` are those of every cell, known before any is read. `cells` of a prefetched batch can be iterated once, and
    each is valid only until the next is asked for.
    """

    step: int
    epoch: int
    cells: Iterable[tuple[AnyCell, Blocks]]
    blocks: list[Blocks]
    names: list[str]
    rows: int


@dataclass(frozen=True)
class BatchLayout:
    """A batch whose states are not read yet."""

    step: int
    epoch: int
    cells: list[CellLayout]
    names: list[str]
    rows: int

    def batch(self, cells: Iterable[tuple[AnyCell, Blocks]]) -> Batch:
        return Batch(self.step, self.epoch, cells, [layout.blocks for layout in self.cells], self.names, self.rows)


class BatchLoader:
    """Makes the batch of any step of a run; `order.py` decides what is in it.

    keep_encoded: leave the states of lossy codecs undecoded until their cell is moved to the device that trains.
    """

    def __init__(
        self, cache: HiddenCache, split: Split, config: DraftConfig, train: TrainSection, keep_encoded: bool = False
    ):
        self.cache, self.config, self.train = cache, config, train
        self.reads_final = needs_final_states(config)
        groups = [config.target_layer_ids, *[(FINAL,)] * self.reads_final]
        self._encoded = {layers for layers in groups if keep_encoded and cache.is_encoded(layers)}
        self.low64 = cache.samples.low64[split.train]
        self.ids = cache.samples.sample_id[split.train]
        self.indices = split.train
        self.per_epoch = max(1, len(split.train) // train.batch)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def batch(self, step: int, alone: bool = False) -> Batch:
        """Return the batch of `step`, its cells read one by one; `alone` gives every sample a cell of its own."""
        layout = self.lay_out(step, alone)
        return layout.batch(LazyCells(self, layout.cells))

    def prefetch(self, start: int, stop: int, device: torch.device = CPU) -> Prefetcher:
        """Return the batches of steps start to stop - 1 for a device, each read while the one before is computed."""
        return Prefetcher(self, start, stop, device)

    def lay_out(self, step: int, alone: bool = False) -> BatchLayout:
        """Lay out the batch of `step` without reading a state. Thread-safe."""
        epoch, at = divmod(step, self.per_epoch)
        keys, order = self._order(epoch)
        chosen = global_batch(order, at, self.train.batch)
        samples = [self._window(int(self.indices[number]), int(keys[number])) for number in chosen]
        cells = [[number] for number in range(len(samples))] if alone else self._pack(samples)
        return BatchLayout(
            step=step,
            epoch=epoch,
            cells=[self._lay_out_cell([samples[number] for number in numbers]) for numbers in cells],
            names=[sample.name for sample in samples],
            rows=sum(len(sample.ids) for sample in samples),
        )

    def size(self, layout: CellLayout) -> int:
        """Return the bytes of a cell's states, as `read` leaves them in memory."""
        return sum(map(self._bytes, layout.to_read.values()))

    def _bytes(self, states: StatesToRead) -> int:
        K, R, D = states.shape(self.cache.hidden_size)
        if states.layers in self._encoded:
            return -(-self.cache.encoded_bytes(R, states.layers) // ALIGNMENT) * ALIGNMENT
        return K * R * D * self.cache.dtype.itemsize

    def read(self, layout: CellLayout, memory_B: Tensor | None = None) -> AnyCell:
        """Read a cell's states, into `memory_B` (uint8, `size` or more) if given; raises as `HiddenCache.fill`."""
        if memory_B is None:
            memory_B = torch.empty(self.size(layout), dtype=torch.uint8)
        decoded, encoded, at = {}, {}, 0
        for name, states in layout.to_read.items():
            part_B = memory_B[at : at + self._bytes(states)]
            at += len(part_B)
            if states.layers in self._encoded:
                encoded[name] = EncodedStates(states, self.cache.read_encoded(part_B, states.parts, states.layers))
            else:
                states_KRD = part_B.view(self.cache.dtype).view(states.shape(self.cache.hidden_size))
                self.cache.fill(states_KRD, states.parts, states.layers)
                decoded[name] = states.in_cell(states_KRD)
        cell = replace(layout.cell, **decoded)
        return EncodedCell(cell, encoded) if encoded else cell

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and order of the samples in an epoch; those of the last epoch asked for are cached."""
        cached = self._epoch
        if cached is None or cached[0] != epoch:
            keys = epoch_keys(self.low64, self.train.seed, epoch)
            cached = self._epoch = (epoch, keys, epoch_order(keys, self.ids))
        return cached[1:]

    def _window(self, index: int, key: int) -> SampleWindow:
        """Choose a sample's window and its anchors."""
        ids, mask = self.cache.tokens_of(index)
        mask_T = torch.from_numpy(mask)
        start, stop = draw_window(eligible_anchors(mask_T).numpy(), key, self.train.context)
        valid_T = eligible_anchors(mask_T[start:stop]).numpy()
        final_rows, final_first = self.cache.final_rows(index, mask, start, stop) if self.reads_final else (None, 0)
        return SampleWindow(
            index=index,
            ids=torch.from_numpy(ids[start:stop].astype(np.int64)),
            mask=mask_T[start:stop],
            first=start,
            anchors=draw_anchors(valid_T, key, self.train.anchors, first=start),
            name=self.cache.samples.hex(index),
            final_rows=None if final_rows is None else torch.from_numpy(final_rows - start),
            final_first=final_first,
        )

    def _pack(self, samples: list[SampleWindow]) -> list[list[int]]:
        costs = [
            SampleCost(len(sample.ids), len(sample.anchors), forward_cost(self.config, len(sample.ids), sample.anchors))
            for sample in samples
        ]
        return pack_cells(costs, self.train.context, self.train.cell_anchors, self.train.cells)

    def _lay_out_cell(self, samples: list[SampleWindow]) -> CellLayout:
        firsts = [sample.first for sample in samples]
        cell = pack(samples, [sample.name for sample in samples], firsts, final=self.reads_final)
        starts = cell.starts_M.tolist()
        anchors = [torch.from_numpy(sample.anchors + start) for sample, start in zip(samples, starts, strict=True)]
        anchors_N = torch.cat(anchors)
        blocks = lay_blocks(cell, anchors_N, torch.ones_like(anchors_N, dtype=torch.bool), self.config)
        rows = [(sample.index, sample.first, sample.first + len(sample.ids)) for sample in samples]
        to_read = {"aux_KRD": StatesToRead(self.config.target_layer_ids, rows)}
        if self.reads_final:
            to_read["final_FD"] = StatesToRead((FINAL,), [sample.final_part for sample in samples])
        return CellLayout(cell, blocks, to_read)
