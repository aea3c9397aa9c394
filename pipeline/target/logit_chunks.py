"""How many rows of logits are computed at once: enough to be compute-bound, within a limit of memory.

Every chunk reads the whole head, V x D. With few rows, reading it takes most of the time; with many, the float32 logits
[X, V], of which about four exist at once, and six with the target's distribution, take the memory. The chunk size
decides the order of summation, so a run keeps the rule that it began with, to repeat bit for bit.

On a CPU more than 256 rows gain less than a tenth; 128 MB allow a vocabulary of 262,144 only 128 rows, which costs
about as much (`tests/bench/head.py` has the figures). On CUDA, not measured: 256 MB allow 256 rows at 262,144 and 2,048
at 32,768; in bfloat16 X rows do X operations for every byte of the head read, and an H200 is compute-bound from about
206 on, an A100 from 153, so more rows would gain nothing there.

    X rows at once   V vocabulary   D hidden size
"""

import sys
from typing import NamedTuple


class ChunkLimit(NamedTuple):
    """A limit on a chunk of logits: bytes of one float32 [X, V], and rows X."""

    bytes: int
    rows: int = sys.maxsize

    def rows_for(self, vocabulary: int) -> int:
        """Return the rows of a chunk for a vocabulary size, at least one."""
        return max(1, min(self.rows, self.bytes // (4 * vocabulary)))


# Limits by the number of the rule and the kind of device; "greedy": for the target's greedy tokens, if it differs.
# Rules never change, since a run resumes with the one it began with.
RULES: dict[int, dict[str, ChunkLimit]] = {
    1: {"cpu": ChunkLimit(4 << 20), "cuda": ChunkLimit(256 << 20), "greedy": ChunkLimit(16 << 20)},
    2: {"cpu": ChunkLimit(128 << 20, rows=256), "cuda": ChunkLimit(256 << 20)},
}
NEWEST = max(RULES)


def chunk_rows(vocabulary: int, device: str, rule: int = NEWEST, greedy: bool = False) -> int:
    """Return how many rows of logits to compute at once: a function of shapes only, so that a run repeats bit for bit.

    greedy: for the target's greedy tokens, computed from its final states.
    """
    chunks = RULES[rule]
    kind = "greedy" if greedy and "greedy" in chunks else device
    return chunks.get(kind, chunks["cuda"]).rows_for(vocabulary)


def chunk_blocks(slots: int, vocabulary: int, device: str, rule: int = NEWEST) -> int:
    """Return how many blocks of so many slots fit a chunk, at least one: a block is never split."""
    return max(1, chunk_rows(vocabulary, device, rule) // slots)
