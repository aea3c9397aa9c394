"""A target's embedding that lies in the host's memory, for a device that has none for it.

A draft's loss embeds few of the vocabulary's tokens: those of a cell's blocks. Their rows are gathered on the host and
copied before the forward; ids that were not named before, as in decoding, are waited for.

    D hidden size   V vocabulary   U tokens that are embedded
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.tensors import copied_without_wait


@dataclass(frozen=True)
class Rows:
    """Some of an embedding's rows [U, D] on a device, and where each token's is [V] int32, -1 for those that are not
    there: embedding them is an error, and no wrong row."""

    rows_UD: Tensor
    index_V: Tensor


def distinct(ids: Sequence[Tensor]) -> Tensor:
    """Return each id that is in any of several tensors on the host, once, [U]."""
    return torch.from_numpy(np.unique(np.concatenate([part.numpy().ravel() for part in ids])))


class HostEmbedding:
    """Embeds ids of any device by rows in the host's memory."""

    def __init__(self, embed_VD: Tensor):
        self.embed_VD = embed_VD
        self._rows: Rows | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the rows [..., D] of ids, on their device."""
        if self._rows is None:
            return F.embedding(ids.to(self.embed_VD.device), self.embed_VD).to(ids.device)
        return F.embedding(self._rows.index_V[ids], self._rows.rows_UD)

    @contextlib.contextmanager
    def of(self, ids: Sequence[Tensor], device: torch.device) -> Iterator[None]:
        """Embed these ids, which are on the host, and no others within the block, without a wait."""
        unique_U = distinct(ids)
        rows_UD = copied_without_wait(self.embed_VD.index_select(0, unique_U), device).to(device, non_blocking=True)
        index_V = torch.full((len(self.embed_VD),), -1, dtype=torch.int32, device=device)
        places_U = torch.arange(len(unique_U), dtype=torch.int32, device=device)
        index_V[copied_without_wait(unique_U, device).to(device, non_blocking=True)] = places_U
        self._rows = Rows(rows_UD, index_V)
        try:
            yield
        finally:
            self._rows = None
