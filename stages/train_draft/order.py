"""The sampler: order, windows, anchors and packing of each batch, pure functions of seed, epoch and sample ids.

Nothing here depends on ranks, workers, time or what ran before, so a resumed run sees the very batches it would have
seen, and adding samples to a cache leaves the order of the others as it was. Hashes are 64-bit and wrap around.

    n samples   T rows of a sample   N anchors   B samples of a global batch
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.runs.training_data import splitmix64

GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
WINDOW_STEP = 256  # rows: windows end at a multiple of it, as the cache's checksummed blocks do


def epoch_keys(low64_n: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return k_i, the pseudorandom key uint64 [n] of each sample in this epoch, from the low 64 bits of its id."""
    epoch_key = splitmix64(splitmix64(np.uint64(seed)) ^ np.uint64(epoch))
    return splitmix64(np.asarray(low64_n, np.uint64) ^ epoch_key)


def epoch_order(keys_n: np.ndarray, ids_n2: np.ndarray) -> np.ndarray:
    """Return the samples' indices by ascending (k_i, sample_id); ids are 128-bit numbers [n, 2], high word first."""
    return np.lexsort((ids_n2[:, 1], ids_n2[:, 0], keys_n))


def global_batch(order_n: np.ndarray, at: int, batch: int) -> np.ndarray:
    """Return the sample indices of global batch number `at` of an epoch: `batch` of them, or all if there are fewer."""
    return order_n[at * batch : (at + 1) * batch]


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


def forward_cost(config, rows: int, anchors_N: np.ndarray) -> int:
    """Return the multiply-adds of one forward over a sample's window, an exact integer from a DraftConfig's shapes.

    anchors_N: rows in the window. A block attends to the rows before its anchor and to itself.
    """
    H, V, b, depth = config.hidden_size, config.vocab_size, config.block_size, config.num_hidden_layers
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
