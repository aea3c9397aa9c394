"""The stream of training batches as a pure function: order of samples, windows, anchors, packing.

Nothing here depends on ranks, workers, time or what ran before, so a killed run goes on with the very batches it
would have had, and adding samples to a cache leaves the order of the others as it was. All hashing
is in 64-bit arithmetic that wraps.

    n samples   T rows of a sample   N anchors   B samples of a global batch
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.drafts import needs_teacher
from pipeline.runs.split import mix

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
BLOCK_ROWS = 256  # windows end at such a row, as the cache's checksums do


def epoch_keys(low64_n: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return k_i, the random word of each sample in this epoch, from the low 64 bits of its id."""
    epoch_key = mix(mix(np.uint64(seed)) ^ np.uint64(epoch))
    return mix(np.asarray(low64_n, np.uint64) ^ epoch_key)


def epoch_order(keys_n: np.ndarray, ids_n2: np.ndarray) -> np.ndarray:
    """Return the samples' indices by ascending (k_i, sample_id); ids are 128-bit numbers, high and low word."""
    return np.lexsort((ids_n2[:, 1], ids_n2[:, 0], keys_n))


def global_batch(order_n: np.ndarray, at: int, batch: int) -> np.ndarray:
    """Return the indices of batch `at` of an epoch: its `batch` samples of the order, or all when there are fewer."""
    return order_n[at * batch : (at + 1) * batch]


def draw_anchors(valid_T: np.ndarray, key: int, count: int, first: int = 0) -> np.ndarray:
    """Return the rows, ascending, of the min(count, valid) anchors with the smallest hash.

    `valid_T` marks the rows that may be anchors; `first` is the true position of row 0 (a window's start). The hash
    is of the true position, so a row keeps its rank whatever the window.
    """
    rows = np.flatnonzero(valid_T)
    with np.errstate(over="ignore"):
        salt = (rows + first + 1).astype(np.uint64) * GOLDEN
        hashes = mix(np.uint64(key) + salt)
    return np.sort(rows[np.argsort(hashes, kind="stable")[:count]])


def draw_window(valid_T: np.ndarray, key: int, context: int) -> tuple[int, int]:
    """Return the rows [start, stop) that a sample of T rows gives: all of it, or `context` of them.

    A longer sample's window ends at a 256-row boundary or at the sample's end, chosen by hash among those that hold a
    valid anchor. At least one row of `valid_T` must be set.
    """
    T = len(valid_T)
    if context >= T:
        return 0, T
    first = -(-context // BLOCK_ROWS) * BLOCK_ROWS
    stops = np.append(np.arange(first, T, BLOCK_ROWS), T)
    starts = stops - context
    before = np.concatenate([[0], np.cumsum(valid_T)])
    # an anchor's next row must be in the window too, hence stop - 1
    useful = np.flatnonzero(before[stops - 1] > before[starts])
    if not len(useful):  # anchors only on rows that no window of the grid holds with their next one
        anchor = int(np.flatnonzero(valid_T)[0])
        start = min(max(0, anchor + 2 - context), T - context)
        return start, start + context
    chosen = useful[int(mix(np.uint64(key) ^ np.uint64(1))) % len(useful)]
    return int(starts[chosen]), int(stops[chosen])


@dataclass(frozen=True)
class Piece:
    """What a sample brings to a cell: its rows, its blocks, and what they cost in multiply-adds."""

    rows: int
    anchors: int
    cost: int


def piece_cost(config, rows: int, anchors_N: np.ndarray) -> int:
    """Return the multiply-adds of one forward over a sample, from the shapes in a DraftConfig, as an exact integer.

    `anchors_N` are rows in the window: a block attends to so many context rows and to itself.
    """
    H, V, b, depth = config.hidden_size, config.vocab_size, config.block_size, config.num_hidden_layers
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    slots = len(anchors_N) * b
    context = rows * H * (len(config.target_layer_ids) * H + depth * 2 * kv)
    logits = H * V * (1 + needs_teacher(config))  # the draft's own, and the target's
    slot = depth * H * (2 * heads + 2 * kv + 3 * config.intermediate_size) + logits
    attention = depth * 2 * heads * b * int((np.asarray(anchors_N, np.int64) + b).sum())
    return context + slots * slot + attention


def pack_cells(pieces: Sequence[Piece], rows: int, anchors: int, cells: int = 1) -> list[list[int]]:
    """Share pieces out over cells of at most `rows` rows and `anchors` anchors; return each cell's piece numbers.

    Longest processing time first: each piece, by descending cost, goes to the least loaded cell that has room for it,
    and opens a new one where none has. At least `cells` cells are used when there are so many pieces.
    """
    held = [[] for _ in range(min(cells, len(pieces)))]
    load = [[0, 0, 0] for _ in held]  # cost, rows, anchors
    for number in sorted(range(len(pieces)), key=lambda number: (-pieces[number].cost, number)):
        piece = pieces[number]
        assert piece.rows <= rows and piece.anchors <= anchors, (
            f"{piece} fits no cell of {rows} rows, {anchors} anchors"
        )
        room = [
            cell
            for cell, (_, used_rows, used_anchors) in enumerate(load)
            if used_rows + piece.rows <= rows and used_anchors + piece.anchors <= anchors
        ]
        if not room:
            held.append([])
            load.append([0, 0, 0])
            room = [len(held) - 1]
        best = min(room, key=lambda cell: (load[cell][0], cell))
        held[best].append(number)
        load[best] = [load[best][0] + piece.cost, load[best][1] + piece.rows, load[best][2] + piece.anchors]
    return [sorted(numbers) for numbers in held]
