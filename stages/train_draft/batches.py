"""Which samples each step learns from: order, windows, anchors, and their packing into cells (micro-batches).

Pure functions of seed, epoch and sample ids: nothing depends on ranks, workers, time or what ran before, so a resumed
run sees the very batches it would have seen, and adding samples to a cache leaves the order of the others as it was.
Hashes are 64-bit and wrap around. Only ids and masks are read: `loader.py` reads the states.

    n samples   T rows of a sample   N anchors
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import HiddenCache
from pipeline.cache.reader import Part
from pipeline.drafts import Blocks, Cell, DraftConfig, eligible_anchors, lay_blocks, pack
from pipeline.runs.recipe import TrainSection
from pipeline.runs.training_data import Split, splitmix64

GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
READING = ("seed", "batch", "context", "echo")  # fields of [train] that decide what is read, and when
WINDOW_STEP = 256  # rows: windows end at a multiple of it, as the cache's checksummed blocks do


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

    def cost(self, config: DraftConfig) -> "SampleCost":
        rows = len(self.ids)
        return SampleCost(rows, len(self.anchors), forward_cost(config, rows, self.anchors))

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
    use: how many steps before this one used the same cells (`train.echo`), with other anchors.
    """

    step: int
    epoch: int
    cells: list[Cell]
    blocks: list[Blocks]
    windows: list[list[SampleWindow]]
    names: list[str]
    use: int = 0

    @property
    def rows(self) -> int:
        """Context rows of all cells."""
        return sum(len(cell.ids_R) for cell in self.cells)


class Sampler:
    """Lays out the batch of any step of a run. Reads ids and masks, no states; thread-safe."""

    def __init__(self, cache: HiddenCache, split: Split, config: DraftConfig, train: TrainSection):
        self.cache, self.indices, self.config, self.train = cache, split.train, config, train
        self.per_epoch = max(1, len(split.train) // train.batch)
        self._order = lru_cache(maxsize=1)(self._order)

    def batch(self, step: int, alone: bool = False) -> Batch:
        """Lay out the batch of `step`; `alone` gives every sample its own cell.

        With `train.echo` = e, steps s with the same s // e use the same windows in the same cells, as the first of them
        lays them out, and differ in their anchors.
        """
        train, (turn, use) = self.train, divmod(step, self.train.echo)
        epoch, at = divmod(turn, self.per_epoch)  # of what is read
        keys_n, order_n = self._order(epoch)
        chosen = order_n[at * train.batch : (at + 1) * train.batch]  # all, where there are fewer
        samples = [self._window(int(self.indices[number]), int(keys_n[number])) for number in chosen]
        packed = [[number] for number in range(len(samples))]
        if not alone:
            costs = [sample.cost(self.config) for sample in samples]
            packed = pack_cells(costs, train.context, train.cell_anchors, train.cells)
        if use:
            samples = [self._echo(samples[n], int(keys_n[number]), use) for n, number in enumerate(chosen)]
        windows = [[samples[number] for number in of_cell] for of_cell in packed]
        cells, blocks = zip(*map(self._lay_out, windows), strict=True)
        names, epoch = [sample.name for sample in samples], step // self.per_epoch
        return Batch(step, epoch, list(cells), list(blocks), windows, names, use)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys of the samples in an epoch, and their order."""
        samples = self.cache.samples
        keys_n = epoch_keys(samples.low64[self.indices], self.train.seed, epoch)
        return keys_n, epoch_order(keys_n, samples.sample_id[self.indices])

    def _window(self, index: int, key: int) -> SampleWindow:
        """Choose a sample's window and its anchors."""
        ids, mask = self.cache.tokens_of(index)
        mask_T = torch.from_numpy(mask)
        start, stop = draw_window(eligible_anchors(mask_T).numpy(), key, self.train.context)
        valid_T = eligible_anchors(mask_T[start:stop]).numpy()
        final_rows, final_first = None, 0
        if self.config.needs_final_states:
            kept, final_first = self.cache.final_rows(index, mask, start, stop)
            final_rows = torch.from_numpy(kept - start)
        return SampleWindow(
            index=index,
            ids=torch.from_numpy(ids[start:stop].astype(np.int64)),
            mask=mask_T[start:stop],
            first=start,
            anchors=draw_anchors(valid_T, key, self.train.anchors, first=start),
            name=self.cache.samples.hex(index),
            final_rows=final_rows,
            final_first=final_first,
        )

    def _echo(self, sample: SampleWindow, key: int, use: int) -> SampleWindow:
        """Return a window with the anchors of its further use number `use`."""
        valid_T = eligible_anchors(sample.mask).numpy()
        return replace(sample, anchors=draw_anchors(valid_T, echo_key(key, use), self.train.anchors, sample.first))

    def _lay_out(self, windows: list[SampleWindow]) -> tuple[Cell, Blocks]:
        """Return the cell of these windows, its states still to be read, and its blocks."""
        names, firsts = [window.name for window in windows], [window.first for window in windows]
        cell = pack(windows, names, firsts, final=self.config.needs_final_states)
        starts = zip(windows, cell.starts_M.tolist(), strict=True)
        anchors_N = torch.from_numpy(np.concatenate([window.anchors + start for window, start in starts]))
        return cell, lay_blocks(cell, anchors_N, self.config)


def epoch_keys(low64_n: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return k_i, the pseudorandom key uint64 [n] of each sample in this epoch, from the low 64 bits of its id."""
    epoch_key = splitmix64(splitmix64(np.uint64(seed)) ^ np.uint64(epoch))
    return splitmix64(np.asarray(low64_n, np.uint64) ^ epoch_key)


def epoch_order(keys_n: np.ndarray, ids_n2: np.ndarray) -> np.ndarray:
    """Return the samples' indices by ascending (k_i, sample_id); ids are 128-bit numbers [n, 2], high word first."""
    return np.lexsort((ids_n2[:, 1], ids_n2[:, 0], keys_n))


def echo_key(key: int, use: int) -> int:
    """Return the key that draws a sample's anchors when its states are used once more: `use` is 1, 2, ..."""
    return int(splitmix64(np.uint64(key) ^ np.uint64(2 * use)))  # even: the window is drawn by key ^ 1


def draw_anchors(valid_T: np.ndarray, key: int, count: int, first: int = 0) -> np.ndarray:
    """Return the anchors' rows, ascending: of the rows that `valid_T` marks, the `count` with the smallest hash.

    first: position in the sample of row 0 (a window's start). The position is hashed, so the window does not matter.
    """
    rows = np.flatnonzero(valid_T)
    with np.errstate(over="ignore"):
        salt = (rows + first + 1).astype(np.uint64) * GOLDEN_RATIO
        hashes = splitmix64(np.uint64(key) + salt)
    return np.sort(rows[np.argsort(hashes, kind="stable")[:count]])


def draw_window(valid_T: np.ndarray, key: int, context: int) -> tuple[int, int]:
    """Return the window [start, stop) of a sample of T rows: all of it, or `context` rows of a longer one.

    A window ends at a 256-row boundary or at the sample's end, and is chosen by hash among those that hold a valid
    anchor. At least one row of `valid_T` must be set.
    """
    T = len(valid_T)
    if context >= T:
        return 0, T
    first = -(-context // WINDOW_STEP) * WINDOW_STEP
    stops = np.append(np.arange(first, T, WINDOW_STEP), T)
    starts = stops - context
    before = np.concatenate([[0], np.cumsum(valid_T)])
    # an anchor's next row must be in the window too, hence stop - 1
    useful = np.flatnonzero(before[stops - 1] > before[starts])
    if not len(useful):  # anchors only on rows that no window of the grid holds with their next one
        anchor = int(np.flatnonzero(valid_T)[0])
        start = min(max(0, anchor + 2 - context), T - context)
        return start, start + context
    chosen = useful[int(splitmix64(np.uint64(key) ^ np.uint64(1))) % len(useful)]
    return int(starts[chosen]), int(stops[chosen])


@dataclass(frozen=True)
class SampleCost:
    """What a sample adds to a cell: rows, anchors (one block each), and the forward's cost in multiply-adds."""

    rows: int
    anchors: int
    cost: int


def forward_cost(config: DraftConfig, rows: int, anchors_N: np.ndarray) -> int:
    """Return the multiply-adds of one forward over a sample's window, an exact integer.

    anchors_N: rows in the window. A block attends to the rows before its anchor and to itself.
    """
    H, V, b, depth = config.hidden_size, config.proposable, config.block_size, config.num_hidden_layers
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    slots = len(anchors_N) * b
    context = rows * H * (len(config.target_layer_ids) * H + depth * 2 * kv)
    logits = H * V * (1 + config.needs_final_states)  # the draft's own, and the target's
    slot = depth * H * (2 * heads + 2 * kv + 3 * config.intermediate_size) + logits
    attention = depth * 2 * heads * b * int((np.asarray(anchors_N, np.int64) + b).sum())
    return context + slots * slot + attention


def pack_cells(costs: Sequence[SampleCost], rows: int, anchors: int, cells: int = 1) -> list[list[int]]:
    """Pack samples into cells (micro-batches) of at most `rows` rows and `anchors` anchors; return each cell's indices.

    Longest processing time first: samples go, by descending cost, to the cell with the least cost that can take them,
    or open a new one. At least `cells` cells are used when there are so many samples.
    """
    packed = [[] for _ in range(min(cells, len(costs)))]
    load = [[0, 0, 0] for _ in packed]  # cost, rows, anchors
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number].cost, number)):
        sample = costs[number]
        assert sample.rows <= rows and sample.anchors <= anchors, (
            f"{sample} fits no cell of {rows} rows, {anchors} anchors"
        )
        fitting = [
            cell
            for cell, (_, used_rows, used_anchors) in enumerate(load)
            if used_rows + sample.rows <= rows and used_anchors + sample.anchors <= anchors
        ]
        if not fitting:
            packed.append([])
            load.append([0, 0, 0])
            fitting = [len(packed) - 1]
        best = min(fitting, key=lambda cell: (load[cell][0], cell))
        packed[best].append(number)
        load[best] = [load[best][0] + sample.cost, load[best][1] + sample.rows, load[best][2] + sample.anchors]
    return [sorted(numbers) for numbers in packed]
