"""Global batches: what the stream names, laid out as cells with their blocks, and then read from the cache.

Only ids and masks decide how a batch is laid out. So the states are read last: of a window no more than its rows, and
each straight to its place in the cell. The target's final states are read for losses that learn from them, and for no
other.

T rows of a sample   K layers   R rows of a cell   F of them that keep `final`   D hidden size
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import HiddenCache
from pipeline.cache.codecs.int8 import decode
from pipeline.cache.codecs.int8_files import Encoded
from pipeline.cache.layout import FINAL
from pipeline.cache.reader import Layer, Part
from pipeline.drafts import Blocks, Cell, DraftConfig, eligible_anchors, lay_blocks, needs_teacher, pack
from pipeline.runs.recipe import TrainSection
from pipeline.runs.split import Split
from stages.train_draft.order import (
    Piece,
    draw_anchors,
    draw_window,
    epoch_keys,
    epoch_order,
    global_batch,
    pack_cells,
    piece_cost,
)
from stages.train_draft.prefetch import CPU, Ahead

ALIGNED = 4  # bytes: where the next states may begin


@dataclass(frozen=True)
class Rows:
    """A sample, or a window of it, without its states. `first` is the true position of its first row."""

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
        """Where its rows lie among the sample's that keep `final`."""
        return self.index, self.final_first, self.final_first + len(self.final_rows)

    @property
    def aux(self) -> Tensor:
        """No layer yet, [0, T, 0]: where the states go is known before they are read."""
        return torch.empty(0, len(self.ids), 0)

    @property
    def final(self) -> Tensor:
        """Likewise, [0, 0]."""
        return torch.empty(0, 0)


@dataclass(frozen=True)
class Region:
    """States that a cell has still to read: of each layer, `parts` of samples (which, first row, stop), end to end."""

    layers: tuple[Layer, ...]
    parts: list[Part]

    def shape(self, width: int) -> tuple[int, int, int]:
        """[K, R, D], K being 1 for `final`."""
        return len(self.layers), sum(stop - start for _, start, stop in self.parts), width

    def in_cell(self, states_KRD: Tensor) -> Tensor:
        """The states as a cell holds them: `final` as [F, D]."""
        return states_KRD[0] if FINAL in self.layers else states_KRD


@dataclass(frozen=True)
class Laid:
    """A cell whose states are still to be read: `regions` by the cell's field, `final_FD` where the loss reads it."""

    cell: Cell
    blocks: Blocks
    regions: dict[str, Region]


@dataclass(frozen=True)
class Coded:
    """States of a region that are still int8: (layer's place, first row, rows) each."""

    region: Region
    pieces: list[tuple[int, int, Encoded]]

    def to(self, device: torch.device | str) -> Tensor:
        """The states, decoded on a device."""
        _, _, held = self.pieces[0]
        shape = self.region.shape(held.values.shape[1])
        states_KRD = torch.empty(shape, dtype=getattr(torch, held.dtype), device=device)
        for k, at, held in self.pieces:
            decode(held, device, states_KRD[k, at : at + len(held)])
        return self.region.in_cell(states_KRD)


@dataclass(frozen=True)
class CodedCell:
    """A cell some of whose states, by field, are still int8. Moving it decodes them."""

    cell: Cell
    coded: dict[str, Coded]

    def to(self, device: torch.device | str) -> Cell:
        """The cell on a device, its states decoded there: half the bytes to copy, and nothing for the host to do."""
        return replace(self.cell.to(device), **{name: states.to(device) for name, states in self.coded.items()})


AnyCell = Cell | CodedCell


@dataclass(frozen=True)
class Cells(Sequence):
    """The cells of a batch, each read when it is asked for, so that no more than one need be in memory."""

    stream: "Stream"
    laid: list[Laid]

    def __len__(self) -> int:
        return len(self.laid)

    def __getitem__(self, number: int) -> tuple[AnyCell, Blocks]:
        laid = self.laid[number]
        return self.stream.read(laid), laid.blocks


@dataclass(frozen=True)
class Batch:
    """One optimiser step's cells. `names` are sample ids in hex, `rows` context rows of all cells.

    Every cell's blocks are known from the start. `cells` of a batch that was read ahead come one by one, once, and each
    is good until the next is asked for.
    """

    step: int
    epoch: int
    cells: Iterable[tuple[AnyCell, Blocks]]
    blocks: list[Blocks]
    names: list[str]
    rows: int


@dataclass(frozen=True)
class Plan:
    """A batch without states."""

    step: int
    epoch: int
    cells: list[Laid]
    names: list[str]
    rows: int

    def batch(self, cells: Iterable[tuple[AnyCell, Blocks]]) -> Batch:
        return Batch(self.step, self.epoch, cells, [laid.blocks for laid in self.cells], self.names, self.rows)


class Stream:
    """All batches of a run by number of step; see `order.py` for what decides them.

    `coded` leaves states that are kept as int8 so, until their cell is moved to the device that trains.
    """

    def __init__(self, cache: HiddenCache, split: Split, config: DraftConfig, train: TrainSection, coded: bool = False):
        self.cache, self.config, self.train = cache, config, train
        self.reads_final = needs_teacher(config)
        regions = [config.target_layer_ids, *[(FINAL,)] * self.reads_final]
        self._coded = {layers for layers in regions if coded and cache.is_encoded(layers)}
        self.low64 = cache.samples.low64[split.train]
        self.ids = cache.samples.sample_id[split.train]
        self.indices = split.train
        self.per_epoch = max(1, len(split.train) // train.batch)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def batch(self, step: int, alone: bool = False) -> Batch:
        """Lay out the batch of `step`, its cells to be read one by one; `alone` gives every sample its own."""
        plan = self.plan(step, alone)
        return plan.batch(Cells(self, plan.cells))

    def ahead(self, start: int, stop: int, device: torch.device = CPU) -> Ahead:
        """The batches of steps start to stop - 1 for a device, read while others are computed."""
        return Ahead(self, start, stop, device)

    def plan(self, step: int, alone: bool = False) -> Plan:
        """Lay out the batch of `step`. Safe for many threads."""
        epoch, at = divmod(step, self.per_epoch)
        keys, order = self._order(epoch)
        chosen = global_batch(order, at, self.train.batch)
        samples = [self._rows(int(self.indices[number]), int(keys[number])) for number in chosen]
        cells = [[number] for number in range(len(samples))] if alone else self._pack(samples)
        return Plan(
            step=step,
            epoch=epoch,
            cells=[self._lay([samples[number] for number in numbers]) for numbers in cells],
            names=[sample.name for sample in samples],
            rows=sum(len(sample.ids) for sample in samples),
        )

    def size(self, laid: Laid) -> int:
        """Bytes of a cell's states, as they are read."""
        return sum(map(self._bytes, laid.regions.values()))

    def _bytes(self, region: Region) -> int:
        K, R, D = region.shape(self.cache.hidden_size)
        if region.layers in self._coded:
            return -(-self.cache.encoded_bytes(R, region.layers) // ALIGNED) * ALIGNED
        return K * R * D * self.cache.dtype.itemsize

    def read(self, laid: Laid, memory_B: Tensor | None = None) -> AnyCell:
        """Read a cell's states, into the first bytes of `memory_B` if given. Raises what `HiddenCache.fill` does."""
        if memory_B is None:
            memory_B = torch.empty(self.size(laid), dtype=torch.uint8)
        plain, coded, at = {}, {}, 0
        for name, region in laid.regions.items():
            part_B = memory_B[at : at + self._bytes(region)]
            at += len(part_B)
            if region.layers in self._coded:
                coded[name] = Coded(region, self.cache.read_encoded(part_B, region.parts, region.layers))
            else:
                states_KRD = part_B.view(self.cache.dtype).view(region.shape(self.cache.hidden_size))
                self.cache.fill(states_KRD, region.parts, region.layers)
                plain[name] = region.in_cell(states_KRD)
        cell = replace(laid.cell, **plain)
        return CodedCell(cell, coded) if coded else cell

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and order of the samples in an epoch; the last one is kept."""
        held = self._epoch
        if held is None or held[0] != epoch:
            keys = epoch_keys(self.low64, self.train.seed, epoch)
            held = self._epoch = (epoch, keys, epoch_order(keys, self.ids))
        return held[1:]

    def _rows(self, index: int, key: int) -> Rows:
        """Cut a sample's window and draw its anchors."""
        ids, mask = self.cache.tokens_of(index)
        mask_T = torch.from_numpy(mask)
        start, stop = draw_window(eligible_anchors(mask_T).numpy(), key, self.train.context)
        valid_T = eligible_anchors(mask_T[start:stop]).numpy()
        kept, before = self.cache.final_rows(index, mask, start, stop) if self.reads_final else (None, 0)
        return Rows(
            index=index,
            ids=torch.from_numpy(ids[start:stop].astype(np.int64)),
            mask=mask_T[start:stop],
            first=start,
            anchors=draw_anchors(valid_T, key, self.train.anchors, first=start),
            name=self.cache.samples.hex(index),
            final_rows=None if kept is None else torch.from_numpy(kept - start),
            final_first=before,
        )

    def _pack(self, samples: list[Rows]) -> list[list[int]]:
        pieces = [
            Piece(len(sample.ids), len(sample.anchors), piece_cost(self.config, len(sample.ids), sample.anchors))
            for sample in samples
        ]
        return pack_cells(pieces, self.train.context, self.train.cell_anchors, self.train.cells)

    def _lay(self, samples: list[Rows]) -> Laid:
        firsts = [sample.first for sample in samples]
        cell = pack(samples, [sample.name for sample in samples], firsts, final=self.reads_final)
        starts = cell.starts_M.tolist()
        anchors = [torch.from_numpy(sample.anchors + start) for sample, start in zip(samples, starts, strict=True)]
        anchors_N = torch.cat(anchors)
        blocks = lay_blocks(cell, anchors_N, torch.ones_like(anchors_N, dtype=torch.bool), self.config)
        rows = [(sample.index, sample.first, sample.first + len(sample.ids)) for sample in samples]
        regions = {"aux_KRD": Region(self.config.target_layer_ids, rows)}
        if self.reads_final:
            regions["final_FD"] = Region((FINAL,), [sample.final_part for sample in samples])
        return Laid(cell, blocks, regions)
