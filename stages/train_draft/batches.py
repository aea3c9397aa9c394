"""Global batches: what the stream names, read from the cache and laid out as cells with their blocks.

T rows of a sample   K layers   D hidden size
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import HiddenCache
from pipeline.drafts import Blocks, Cell, DraftConfig, eligible_anchors, lay_blocks, pack
from pipeline.recipe import TrainSection
from pipeline.split import Split
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

AHEAD = 2  # batches prepared while one is computed


@dataclass(frozen=True)
class Rows:
    """A sample, or a window of it. `first` is the true position of its first row."""

    ids: Tensor  # [T]
    mask: Tensor  # [T] bool
    aux: Tensor  # [K, T, D]
    first: int
    anchors: np.ndarray  # rows
    name: str


@dataclass(frozen=True)
class Batch:
    """One optimiser step's cells. `names` are sample ids in hex, `rows` context rows of all cells."""

    step: int
    epoch: int
    cells: list[tuple[Cell, Blocks]]
    names: list[str]
    rows: int


class Stream:
    """All batches of a run by number of step; see `stream.py` for what decides them."""

    def __init__(self, cache: HiddenCache, split: Split, config: DraftConfig, train: TrainSection):
        self.cache, self.config, self.train = cache, config, train
        self.low64 = cache.samples.low64[split.train]
        self.ids = cache.samples.sample_id[split.train]
        self.indices = split.train
        self.per_epoch = max(1, len(split.train) // train.batch)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def batch(self, step: int, alone: bool = False) -> Batch:
        """Read and lay out the batch of `step`; `alone` gives every sample a cell of its own."""
        epoch, at = divmod(step, self.per_epoch)
        keys, order = self._order(epoch)
        chosen = global_batch(order, at, self.train.batch)
        samples = [self._rows(int(self.indices[number]), int(keys[number])) for number in chosen]
        cells = [[number] for number in range(len(samples))] if alone else self._pack(samples)
        return Batch(
            step=step,
            epoch=epoch,
            cells=[self._cell([samples[number] for number in numbers]) for numbers in cells],
            names=[sample.name for sample in samples],
            rows=sum(len(sample.ids) for sample in samples),
        )

    def ahead(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps start to stop - 1, prepared by one thread at most AHEAD steps early."""
        waiting: deque = deque()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as thread:
            try:
                for step in range(start, stop):
                    while len(waiting) < AHEAD and step + len(waiting) < stop:
                        waiting.append(thread.submit(self.batch, step + len(waiting)))
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and order of the samples in an epoch; the last one is kept."""
        held = self._epoch
        if held is None or held[0] != epoch:
            keys = epoch_keys(self.low64, self.train.seed, epoch)
            held = self._epoch = (epoch, keys, epoch_order(keys, self.ids))
        return held[1:]

    def _rows(self, index: int, key: int) -> Rows:
        """Read a sample, cut its window and draw its anchors."""
        sample = self.cache.read(index, layers=self.config.target_layer_ids)
        start, stop = draw_window(eligible_anchors(sample.mask).numpy(), key, self.train.context)
        window = slice(start, stop)
        valid_T = eligible_anchors(sample.mask[window]).numpy()
        anchors = draw_anchors(valid_T, key, self.train.anchors, first=start)
        return Rows(
            ids=sample.ids[window],
            mask=sample.mask[window],
            aux=sample.aux[:, window],
            first=start,
            anchors=anchors,
            name=self.cache.samples.hex(index),
        )

    def _pack(self, samples: list[Rows]) -> list[list[int]]:
        pieces = [
            Piece(len(sample.ids), len(sample.anchors), piece_cost(self.config, len(sample.ids), sample.anchors))
            for sample in samples
        ]
        return pack_cells(pieces, self.train.context, self.train.cell_anchors, self.train.cells)

    def _cell(self, samples: list[Rows]) -> tuple[Cell, Blocks]:
        cell = pack(samples, [sample.name for sample in samples], [sample.first for sample in samples])
        starts = cell.starts_M.tolist()
        anchors = [torch.from_numpy(sample.anchors + start) for sample, start in zip(samples, starts, strict=True)]
        anchors_N = torch.cat(anchors)
        return cell, lay_blocks(cell, anchors_N, torch.ones_like(anchors_N, dtype=torch.bool), self.config)
