"""Checksums of a column: one for each block of each sample, and the `.arrow` file that stores them.

A (checksum) block is 256 rows of a sample, counted from the sample's first row in the column; each has an xxh3-64. It
is taken over the values, but in a lossy codec's column over the encoded rows: the codec's arrays one after the other,
then outliers (row of the sample, channel, bits), so that rows can be verified on the CPU and decoded on another device.

    n samples of the shard   m rows given   D width
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.cache.codecs.lossy import Encoded
from pipeline.cache.layout import CHECKSUM_ROWS
from pipeline.cache.samples import batch_bytes, read_batches, to_numpy
from pipeline.errors import CacheError

SCHEMA = pa.schema(
    [
        pa.field("ok", pa.bool_(), nullable=False),
        pa.field("blocks", pa.list_(pa.field("item", pa.uint64(), nullable=False)), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("escapes", pa.int32(), nullable=False),  # the sample's number of outliers, see `codecs/lossy.py`
    ]
)


class BlockHasher:
    """Computes the checksums of rows given in order: a digest at the end of every block and of every sample.

    `position` is the row of the column to begin with, the first of a block.
    """

    def __init__(self, bounds: np.ndarray, position: int = 0):
        self.blocks: list[tuple[int, int]] = []  # end of each block, and the first row of its sample
        for start, stop in pairwise(bounds.tolist()):
            ends = range(start + CHECKSUM_ROWS, stop + CHECKSUM_ROWS, CHECKSUM_ROWS)
            self.blocks += [(min(end, stop), start) for end in ends if min(end, stop) > position]
        self.digests: list[int] = []
        self.position = position
        self._open = xxhash.xxh3_64()
        self._behind: list[list] = []  # further arrays and outliers of the open block, hashed after its first array

    def update(self, rows: np.ndarray | Encoded) -> None:
        """Hash the next rows: C-contiguous [m, D], or encoded."""
        taken = 0
        while taken < len(rows):
            end, origin = self.blocks[len(self.digests)]
            count = min(end - self.position, len(rows) - taken)
            if isinstance(rows, Encoded):
                values, *behind = rows.span(taken, taken + count, taken - self.position + origin)
                self._behind = self._behind or [[] for _ in behind]
                for held, part in zip(self._behind, behind, strict=True):
                    held.append(part)
            else:
                values = rows[taken : taken + count]
            self._open.update(values)
            taken, self.position = taken + count, self.position + count
            if self.position == end:
                self._end()

    def _end(self) -> None:
        for held in self._behind:
            for part in held:
                self._open.update(np.ascontiguousarray(part))
            held.clear()
        self.digests.append(self._open.intdigest())
        self._open.reset()


def block_counts(bounds: np.ndarray) -> np.ndarray:
    """Blocks of each sample, int64 [n]."""
    return -(-np.diff(bounds) // CHECKSUM_ROWS)


def sums_bytes(bounds: np.ndarray, digests: list[int], refused: dict[int, str], outliers: np.ndarray) -> bytes:
    """Serialise a column's `.arrow` file: for each sample ok, block digests, refusal reason, number of outliers."""
    count = len(bounds) - 1
    ok = np.ones(count, bool)
    ok[list(refused)] = False
    starts = np.concatenate([[0], np.cumsum(block_counts(bounds))]).astype(np.int32)
    items = pa.array(np.array(digests, np.uint64))
    bits = pa.py_buffer(np.packbits(ok, bitorder="little"))
    columns = [
        pa.Array.from_buffers(pa.bool_(), count, [None, bits]),
        pa.Array.from_buffers(SCHEMA.field("blocks").type, count, [None, pa.py_buffer(starts)], children=[items]),
        pa.array([refused.get(row, "") for row in range(count)], pa.string()),
        pa.array(outliers.astype(np.int32)),
    ]
    return batch_bytes(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))


def read_sums(path: Path, bounds: np.ndarray) -> tuple[np.ndarray, ...]:
    """Read a column's `.arrow`: ok bool [n], digests uint64, each sample's first digest and outlier, int64 [n + 1]."""
    batches = read_batches(path, SCHEMA)
    if len(batches) != 1 or len(batches[0]) != len(bounds) - 1:
        raise CacheError(f"{path}: made for other samples; run `pipeline verify`")
    ok = np.array(batches[0].column("ok").to_pylist(), bool)
    lists = batches[0].column("blocks")
    digests, starts = to_numpy(lists.values).copy(), to_numpy(lists.offsets).astype(np.int64)
    counts = to_numpy(batches[0].column("escapes")).astype(np.int64)
    whole = np.array_equal(np.append(starts[0], np.diff(starts)), np.append(0, block_counts(bounds)))
    if not whole or len(digests) != starts[-1] or (counts < 0).any():
        raise CacheError(f"{path}: made for other samples; run `pipeline verify`")
    return ok, digests, starts, np.concatenate([[0], np.cumsum(counts)])
