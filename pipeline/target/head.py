"""The target's frozen embedding and LM head: the only weights of the target that training uses.

Logits are computed for some rows at a time: enough to be compute-bound, within a limit of memory (`RULES`). Every chunk
of rows reads the whole head, V x D. With few rows, reading it takes most of the time; with many, the float32 logits
[X, V], of which about four exist at once, and six with the target's distribution, take the memory. The chunk size
decides the order of summation, so a run keeps the rule that it began with, to repeat bit for bit.

On a CPU more than 256 rows gain less than a tenth, and fewer than 128 lose one; between them 80 MB decide, so that a
step on a vocabulary of 151,936 takes 1.26 times the memory of one on 32,768 (`tests/bench/head.py` has the figures).
On CUDA, not measured: 256 MB allow 256 rows at 262,144 and 2,048 at 32,768; in bfloat16 X rows do X operations for
every byte of the head read, and an H200 is compute-bound from about 206 on, an A100 from 153, so more rows would gain
nothing there.

    D hidden size   V vocabulary, the head's padding rows included   X rows at once
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import UPGRADE, CacheError, VersionError, refuse_limit
from pipeline.json_files import parse_json
from pipeline.matrix_products import linear
from pipeline.target.host_embedding import HostEmbedding
from pipeline.tensors import at_least_float32, save_tensors

EMBEDDING, HEAD, FACTS = "embed_tokens.weight", "lm_head.weight", "target_head"

KNOWN_FACTS = {"embed_scale", "logit_softcap", "tied"}


@dataclass(frozen=True)
class TargetHead:
    """Embedding and LM head of the target, without gradients. Not a module, so that no draft's state_dict has them.

    embed_VD, head_VD: the same tensor when `tied`. embed_scale: multiplies the embeddings (Gemma). logit_softcap: c
    makes logits c * tanh(logits / c), None leaves them. on_host: embeds by `embed_VD` where that lies on the host and
    the head does not.
    """

    embed_VD: Tensor
    head_VD: Tensor
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    on_host: HostEmbedding | None = None

    def __post_init__(self):
        assert self.embed_VD.ndim == 2 and self.embed_VD.shape == self.head_VD.shape, (
            f"embedding {tuple(self.embed_VD.shape)} and head {tuple(self.head_VD.shape)}"
        )
        assert not self.embed_VD.requires_grad and not self.head_VD.requires_grad, "the target's weights are frozen"

    @property
    def tied(self) -> bool:
        return self.head_VD is self.embed_VD

    @property
    def vocab_size(self) -> int:
        return self.head_VD.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.head_VD.shape[1]

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings [..., D] of ids [...], scaled like the target's (the factor in the weights' dtype)."""
        found = F.embedding(ids, self.embed_VD) if self.on_host is None else self.on_host(ids)
        if self.embed_scale == 1.0:
            return found
        # Filled there: a copy would be waited for.
        return found * torch.full((), self.embed_scale, dtype=found.dtype, device=found.device)

    def embedding(self, ids: Sequence[Tensor] | None) -> contextlib.AbstractContextManager:
        """Within the block `embed` is asked for these ids, which are on the host, and no others: one that lies on the
        host then has their rows on the device, and nobody waits for them. None: of ids that are not known before."""
        if self.on_host is None or ids is None:
            return contextlib.nullcontext()
        return self.on_host.of(ids, self.head_VD.device)

    def with_embedding_on_host(self) -> "TargetHead":
        """Return the same with its embedding in the host's memory; the very same for a tied one, whose head it is."""
        if self.tied or self.on_host is not None:
            return self
        embed_VD = self.embed_VD.cpu()
        return replace(self, embed_VD=embed_VD, on_host=HostEmbedding(embed_VD))

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] before the soft cap, in the head's dtype. The cap does not change their argmax."""
        return linear(hidden.to(self.head_VD.dtype), self.head_VD)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of states [..., D] after the last norm, soft cap applied, float32 at least."""
        raw = self.raw_logits(hidden)
        return self.cap(raw.to(at_least_float32(raw.dtype)))

    def cap(self, logits: Tensor) -> Tensor:
        """Apply the soft cap, where the target has one."""
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TargetHead":
        """Return the head on another device or in another dtype; a tied one stays tied."""
        embed_VD = self.embed_VD.to(device=device, dtype=dtype)
        head_VD = embed_VD if self.tied else self.head_VD.to(device=device, dtype=dtype)
        return replace(self, embed_VD=embed_VD, head_VD=head_VD, on_host=None)

    def equals(self, other: "TargetHead") -> bool:
        """Return whether both give the same embeddings and logits to the bit, on whatever devices they are."""
        if (self.embed_scale, self.logit_softcap) != (other.embed_scale, other.logit_softcap):
            return False
        pairs = [(self.embed_VD, other.embed_VD)]
        if not (self.tied and other.tied):
            pairs.append((self.head_VD, other.head_VD))
        return all(
            ours_VD.dtype == theirs_VD.dtype
            and ours_VD.shape == theirs_VD.shape
            # some rows at a time: one copy of them on the other device
            and all(
                torch.equal(ours, theirs.to(ours.device))
                for ours, theirs in zip(ours_VD.split(8192), theirs_VD.split(8192), strict=True)
            )
            for ours_VD, theirs_VD in pairs
        )

    def save(self, path: Path) -> None:
        """Write as safetensors, the same bytes for the same head. Not atomic: the caller renames the file."""
        tensors = {EMBEDDING: self.embed_VD}
        if not self.tied:
            tensors[HEAD] = self.head_VD
        facts = {"embed_scale": self.embed_scale, "logit_softcap": self.logit_softcap, "tied": self.tied}
        # One key: safetensors writes several in the order of a randomly seeded map.
        save_tensors(tensors, path, metadata={FACTS: json.dumps(facts, sort_keys=True)})

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> "TargetHead":
        """Read what `save` wrote; dtype None keeps the stored one.

        CacheError when the file is not such a head, VersionError when it says more, which could change logits.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                facts = parse_json((file.metadata() or {})[FACTS])
                if unknown := sorted({*file.keys()} - {EMBEDDING, HEAD} | {*facts} - KNOWN_FACTS):
                    raise VersionError(f"{path}: its {unknown[0][:80]!r} is unknown to this version; {UPGRADE}")
                scale, cap = float(facts["embed_scale"]), facts["logit_softcap"]
                embed_VD = file.get_tensor(EMBEDDING)
                head_VD = embed_VD if facts["tied"] else file.get_tensor(HEAD)
                if embed_VD.ndim != 2 or embed_VD.shape != head_VD.shape or not embed_VD.is_floating_point():
                    raise ValueError(f"embedding {tuple(embed_VD.shape)} and head {tuple(head_VD.shape)}")
                head = cls(embed_VD, head_VD, scale, None if cap is None else float(cap))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            refuse_limit(path, error)
            raise CacheError(
                f"{path} is not a target's embedding and head ({type(error).__name__}: {error}); "
                "run `pipeline verify` on its cache, and capture again what it names"
            ) from error
        return head.to(dtype=dtype)


def logit_scale(target: dict) -> float:
    """Return the factor of the LM head's output: Granite states a divisor, Cohere and Falcon-H1 a multiplier."""
    if target.get("logits_scaling"):
        return 1.0 / target["logits_scaling"]
    return float(target.get("logit_scale") or target.get("lm_head_multiplier") or 1.0)


class ChunkLimit(NamedTuple):
    """A limit on a chunk of logits: bytes of one float32 [X, V], and the most and the fewest rows X, whatever the
    bytes."""

    bytes: int
    rows: int = sys.maxsize
    fewest: int = 1


# Limits by the number of the rule and the kind of device; "greedy": for the target's greedy tokens, if it differs.
# Rules never change, since a run resumes with the one it began with.
RULES: dict[int, dict[str, ChunkLimit]] = {
    1: {"cpu": ChunkLimit(4 << 20), "cuda": ChunkLimit(256 << 20), "greedy": ChunkLimit(16 << 20)},
    2: {"cpu": ChunkLimit(128 << 20, rows=256), "cuda": ChunkLimit(256 << 20)},
    3: {"cpu": ChunkLimit(80 << 20, rows=256, fewest=128), "cuda": ChunkLimit(256 << 20)},
}
NEWEST = max(RULES)


def chunk_rows(vocabulary: int, device: str, rule: int = NEWEST, greedy: bool = False) -> int:
    """Return how many rows of logits to compute at once: a function of shapes only, so that a run repeats bit for bit.

    greedy: for the target's greedy tokens, computed from its final states.
    """
    limits = RULES[rule]
    limit = limits["greedy"] if greedy and "greedy" in limits else limits.get(device, limits["cuda"])
    return max(limit.fewest, min(limit.rows, limit.bytes // (4 * vocabulary)))


def chunk_blocks(slots: int, vocabulary: int, device: str, rule: int = NEWEST) -> int:
    """Return how many blocks of so many slots fit a chunk, at least one: a block is never split."""
    return max(1, chunk_rows(vocabulary, device, rule) // slots)
