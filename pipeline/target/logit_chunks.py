"""How many rows of logits exist at once: enough that a product is bound by arithmetic, within a bound of bytes.

Every chunk reads the whole head, V x D. Few rows, and reading it is most of the work; many, and their logits, float32
[X, V], of which about four live at once and six with the target's distribution, take the memory. The chunk decides the
order in which sums are taken, so a run keeps the rule that it began with, to the bit.

On a CPU more than 256 rows gain less than a tenth; 128 MB leave a vocabulary of 262,144 only 128 of them, which costs
about as much (`tests/bench/head.py` has the figures). On CUDA, not measured: 256 MB give 256 rows at 262,144 and 2,048
at 32,768; in bfloat16 X rows do X operations for every byte of the head read, and an H200 needs about 206 for its
multipliers to be what is waited for, an A100 153, so more rows would gain nothing there.

    X rows at once   V vocabulary   D hidden size
"""

import sys
from typing import NamedTuple


class ChunkLimit(NamedTuple):
    """At most so many bytes of one float32 [X, V], and no more rows than these."""

    bytes: int
    rows: int = sys.maxsize

    def rows_for(self, vocabulary: int) -> int:
        """Rows of logits at once, at least one."""
        return max(1, min(self.rows, self.bytes // (4 * vocabulary)))


# What a chunk is, by the number of the rule and the kind of device: "greedy" for the target's own tokens, where that
# has its own. Rules stay as they are: runs are trained by them.
RULES: dict[int, dict[str, ChunkLimit]] = {
    1: {"cpu": ChunkLimit(4 << 20), "cuda": ChunkLimit(256 << 20), "greedy": ChunkLimit(16 << 20)},
    2: {"cpu": ChunkLimit(128 << 20, rows=256), "cuda": ChunkLimit(256 << 20)},
}
NEWEST = max(RULES)


def chunk_rows(vocabulary: int, device: str, rule: int = NEWEST, greedy: bool = False) -> int:
    """Rows whose logits exist at once on a kind of device: a function of shapes only, so that a run repeats to the bit.

    greedy: for the target's own tokens, read from its final states.
    """
    chunks = RULES[rule]
    kind = "greedy" if greedy and "greedy" in chunks else device
    return chunks.get(kind, chunks["cuda"]).rows_for(vocabulary)


def chunk_blocks(slots: int, vocabulary: int, device: str, rule: int = NEWEST) -> int:
    """Blocks of so many slots whose logits exist at once, at least one: a block is never cut."""
    return max(1, chunk_rows(vocabulary, device, rule) // slots)
