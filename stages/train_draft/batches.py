"""Global batches: what the stream names, laid out as cells with their blocks, and then read from the cache.

Only ids and masks decide how a batch is laid out. So the states are read last: of a window no more than its rows, and
each straight to its place in the cell.

T rows of a sample   K layers   R rows of a cell   D hidden size
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import HiddenCache
from pipeline.cache.int8 import decode
from pipeline.cache.int8_files import Encoded
from pipeline.drafts import Blocks, Cell, DraftConfig, eligible_anchors, lay_blocks, pack
from pipeline.recipe import TrainSection
from pipeline.split import Split
from stages.train_draft.ahead import CPU, Ahead
from stages.train_draft.stream import (
    Piece,
    draw_anchors,
    draw_window,
    epoch_keys,
    epoch_order,
    global_batch,
    pack_cells,
    piece_cost,
)


@dataclass(frozen=True)
class Rows:
    """A sample, or a window of it, without its states. `first` is the true position of its first row."""

    index: int  # of the sample in the cache
    ids: Tensor  # [T]
    mask: Tensor  # [T] bool
    first: int
    anchors: np.ndarray  # rows
    name: str

    @property
    def aux(self) -> Tensor:
        """No layer yet, [0, T, 0]: where the states go is known before they are read."""
        return torch.empty(0, len(self.ids), 0)


@dataclass(frozen=True)
class Laid:
    """A cell whose states are still to be read: `parts` of the cache (sample, first row, stop), end to end."""

    cell: Cell
    blocks: Blocks
    parts: list[tuple[int, int, int]]


@dataclass(frozen=True)
class CodedCell:
    """A cell whose states [K, R, D] are still int8: (layer's place, first row, rows) each. Moving it decodes them."""

    cell: Cell
    shape: tuple[int, int, int]
    coded: list[tuple[int, int, Encoded]]

    def to(self, device: torch.device | str) -> Cell:
        """The cell on a device, its states decoded there: half the bytes to copy, and nothing for the host to do."""
        dtype = getattr(torch, self.coded[0][2].dtype)
        aux_KRD = torch.empty(self.shape, dtype=dtype, device=device)
        for k, at, held in self.coded:
            decode(held, device, aux_KRD[k, at : at + len(held)])
        return replace(self.cell.to(device), aux_KRD=aux_KRD)


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
    """All batches of a run by number of step; see `stream.py` for what decides them.

    `coded` leaves states that are kept as int8 so, until their cell is moved to the device that trains.
    """

    def __init__(self, cache: HiddenCache, split: Split, config: DraftConfig, train: TrainSection, coded: bool = False):
        self.cache, self.config, self.train = cache, config, train
        self.coded = coded and cache.is_encoded(config.target_layer_ids)
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

    def _shape(self, laid: Laid) -> tuple[int, int, int]:
        return len(self.config.target_layer_ids), len(laid.cell.ids_R), self.cache.hidden_size

    def size(self, laid: Laid) -> int:
        """Bytes of a cell's states, as they are read."""
        K, R, D = self._shape(laid)
        if self.coded:
            return self.cache.encoded_bytes(R, self.config.target_layer_ids)
        return K * R * D * self.cache.dtype.itemsize

    def read(self, laid: Laid, memory_B: Tensor | None = None) -> AnyCell:
        """Read a cell's states, into the first bytes of `memory_B` if given. Raises what `HiddenCache.fill` does."""
        if memory_B is None:
            memory_B = torch.empty(self.size(laid), dtype=torch.uint8)
        if self.coded:
            held = self.cache.read_encoded(memory_B, laid.parts, self.config.target_layer_ids)
            return CodedCell(laid.cell, self._shape(laid), held)
        aux_KRD = memory_B[: self.size(laid)].view(self.cache.dtype).view(self._shape(laid))
        self.cache.fill(aux_KRD, laid.parts, self.config.target_layer_ids)
        return replace(laid.cell, aux_KRD=aux_KRD)

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
        return Rows(
            index=index,
            ids=torch.from_numpy(ids[start:stop].astype(np.int64)),
            mask=mask_T[start:stop],
            first=start,
            anchors=draw_anchors(valid_T, key, self.train.anchors, first=start),
            name=self.cache.samples.hex(index),
        )

    def _pack(self, samples: list[Rows]) -> list[list[int]]:
        pieces = [
            Piece(len(sample.ids), len(sample.anchors), piece_cost(self.config, len(sample.ids), sample.anchors))
            for sample in samples
        ]
        return pack_cells(pieces, self.train.context, self.train.cell_anchors, self.train.cells)

    def _lay(self, samples: list[Rows]) -> Laid:
        cell = pack(samples, [sample.name for sample in samples], [sample.first for sample in samples])
        starts = cell.starts_M.tolist()
        anchors = [torch.from_numpy(sample.anchors + start) for sample, start in zip(samples, starts, strict=True)]
        anchors_N = torch.cat(anchors)
        blocks = lay_blocks(cell, anchors_N, torch.ones_like(anchors_N, dtype=torch.bool), self.config)
        parts = [(sample.index, sample.first, sample.first + len(sample.ids)) for sample in samples]
        return Laid(cell, blocks, parts)
