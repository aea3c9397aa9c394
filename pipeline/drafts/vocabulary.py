"""A draft vocabulary: the ids that a draft may propose, where these are fewer than the target's.

The head is most of a draft's work where the target's vocabulary is large, and most texts use little of it. A draft with
`draft.vocabulary = W` has the W ids that its training samples' replies use most, as EAGLE-3 does, and the target's head
at these ids only. It learns to tell them apart: slots whose label is another id are not learned from, and where the
target's distribution is learned, that distribution over these ids, normalised to 1. Another id is never proposed; the
target then writes it itself, so that decoding stays lossless and every measured accept length counts it as a miss.

Published beside the weights, as speculators has them: d2t, of each of the draft's ids the target's id minus it, and
t2d, whether an id of the target may be proposed.

    V vocabulary of the target   W ids that may be proposed
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.drafts.blocks import Blocks
from pipeline.target.head import TargetHead

MAPS = frozenset(("d2t", "t2d"))


def most_frequent(samples: Iterable[np.ndarray], vocabulary: int, count: int) -> Tensor:
    """Return the `count` ids that occur most often in samples of ids, ascending; among equals the lowest."""
    counts_V = np.zeros(vocabulary, np.int64)
    for ids_T in samples:
        counts_V += np.bincount(ids_T, minlength=vocabulary)
    return torch.from_numpy(np.sort(np.argsort(-counts_V, kind="stable")[:count]))


def write_maps(ids_W: Tensor, d2t_W: Tensor, t2d_V: Tensor) -> None:
    """Fill the two maps with ascending ids."""
    d2t_W.copy_(ids_W - torch.arange(len(ids_W)))
    t2d_V.zero_()
    t2d_V[ids_W.to(t2d_V.device)] = True


def ids_of(d2t_W: Tensor) -> Tensor:
    """Return the target's id of each of the draft's."""
    return d2t_W + torch.arange(len(d2t_W), device=d2t_W.device)


def within(blocks: Blocks, t2d_V: Tensor) -> Blocks:
    """Return blocks whose labels are the draft's ids; slots whose label it has not are neither scored nor weighted."""
    may_V = t2d_V.to(blocks.labels_NS.device)
    may_NS = may_V[blocks.labels_NS]
    labels_NS = (may_V.cumsum(0)[blocks.labels_NS] - 1).clamp_(min=0)
    return replace(
        blocks, labels_NS=labels_NS, scored_NS=blocks.scored_NS & may_NS, weights_NS=blocks.weights_NS * may_NS
    )


def missed(per_slot: dict[str, Tensor], may_NS: Tensor) -> dict[str, Tensor]:
    """Return what an objective recorded of every slot, with no slot right, and none accepted, whose label the draft
    has not."""
    masked = {"correct", "agree", "accept", "ce"}
    return {name: torch.where(may_NS, value, 0) if name in masked else value for name, value in per_slot.items()}


class HeadRows:
    """The target's head at a draft's ids, gathered once, and anew where the map or the head is another."""

    def __init__(self):
        self._of: TargetHead | None = None
        self._map_W, self._version, self._head = None, -1, None

    def head(self, target: TargetHead, d2t_W: Tensor) -> TargetHead:
        version = 0 if d2t_W.is_inference() else d2t_W._version  # it changes with the map's values
        if self._of is not target or self._map_W is not d2t_W or self._version != version:
            with torch.inference_mode(False), torch.no_grad():  # training may use what an evaluation has made
                rows_WD = target.head_VD[ids_of(d2t_W).to(target.head_VD.device)]
            self._head = TargetHead(rows_WD, rows_WD, logit_softcap=target.logit_softcap)
            self._of, self._map_W, self._version = target, d2t_W, version
        return self._head
