"""Which keys a slot may see, and attention over them: one dense mask for reference, groups of near blocks for speed.

A slot of a block at anchor a sees its document's context strictly before a, and its own block: all of it on a full
layer; on a sliding layer of window W the context from a + slot - (W - 1) and the slots up to itself. This is
SpecForge's rule, which the serving engines execute. A block that is padding sees itself only: no row is ever fully
masked, so no kernel makes a NaN.

    A query heads   G key/value heads   E head size   N blocks   S slots   Q = N * S queries   R context rows   L keys
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.drafts.blocks import Blocks

QUERIES_A_GROUP = 128


@dataclass(frozen=True)
class Group:
    """Blocks first .. last - 1, consecutive and of one document, and the context that any of them sees: the
    document's rows 0 .. rows - 1. Padding blocks belong to document 0."""

    first: int
    last: int
    document: int
    rows: int


def group_blocks(
    anchors: Sequence[int], documents: Sequence[int], slots: int, queries: int = QUERIES_A_GROUP
) -> tuple[Group, ...]:
    """Group consecutive blocks of one document, at most `queries` slots together. Right in any order of anchors,
    and quick where they ascend, since a group then meets few keys that most of its blocks cannot see.

    anchors: rows within their documents.
    """
    most = max(1, queries // slots)
    groups: list[Group] = []
    for block, (anchor, document) in enumerate(zip(anchors, documents, strict=True)):
        last = groups[-1] if groups else None
        if last and last.document == document and last.last - last.first < most:
            groups[-1] = Group(last.first, block + 1, document, max(last.rows, anchor))
        else:
            groups.append(Group(block, block + 1, document, anchor))
    return tuple(groups)


def attend(q_AQE: Tensor, k_GLE: Tensor, v_GLE: Tensor, allowed_QL: Tensor | None) -> Tensor:
    """Attention [A, Q, E] of grouped queries: query head a reads key/value head a // (A / G). None: all allowed."""
    A, Q, E = q_AQE.shape
    G = k_GLE.shape[0]
    # Heads that share keys become more queries: no copy of the keys, and every kernel takes it.
    folded_GQE = q_AQE.reshape(G, A // G * Q, E)
    mask = None if allowed_QL is None else allowed_QL.repeat(A // G, 1)
    out = F.scaled_dot_product_attention(folded_GQE[None], k_GLE[None], v_GLE[None], attn_mask=mask)
    return out[0].reshape(A, Q, E)


def visible(blocks: "Blocks", rows: slice, first: int, last: int, window: int | None) -> Tensor:
    """Whether each slot of blocks first .. last - 1 may see each context row of `rows`, then each slot of these
    blocks: bool [(last - first) * S, rows + (last - first) * S]. `window`: the layer's, None on a full layer."""
    device = blocks.anchors_N.device
    N, S = last - first, blocks.labels_NS.shape[1]
    anchors_N1 = blocks.anchors_N[first:last, None]
    row_R = torch.arange(rows.start, rows.stop, device=device)
    context_NR = (row_R < anchors_N1) & (row_R >= blocks.starts_N[first:last, None]) & blocks.keep_N[first:last, None]
    context_NSR = context_NR[:, None].expand(N, S, -1)
    slots_S = torch.arange(S, device=device)
    inside_SS = torch.ones(S, S, dtype=torch.bool, device=device)
    if window is not None:
        earliest_NS = anchors_N1 + slots_S - (window - 1)
        context_NSR = context_NSR & (row_R >= earliest_NS[..., None])
        inside_SS = inside_SS.tril()
    inside_NSNS = torch.eye(N, dtype=torch.bool, device=device)[:, None, :, None] & inside_SS[:, None]
    return torch.cat([context_NSR.reshape(N * S, -1), inside_NSNS.reshape(N * S, N * S)], dim=1)


class Dense:
    """The reference: every query against every key, under one boolean mask a kind of layer."""

    def __init__(self, blocks: "Blocks", rows: int, windows: set[int | None]):
        N = len(blocks.anchors_N)
        self.masks = {window: visible(blocks, slice(0, rows), 0, N, window) for window in windows}

    def __call__(self, q_AQE, context, own, window: int | None) -> Tensor:
        """Attention [A, Q, E]; `context` and `own` are the keys and values of the rows and of the slots, [G, ., E]."""
        k_GLE, v_GLE = (torch.cat(pair, dim=1) for pair in zip(context, own, strict=True))
        return attend(q_AQE, k_GLE, v_GLE, self.masks[window])


class Grouped:
    """The same, group by group: attention meets the context that a group can see and the group's own slots.

    Tensors are split, not sliced: the gradient of a slice is as large as what it was cut from.
    """

    def __init__(self, blocks: "Blocks", windows: set[int | None]):
        slots = blocks.labels_NS.shape[1]
        self.groups = blocks.groups
        self.queries = [(group.last - group.first) * slots for group in self.groups]
        self.lengths = blocks.lengths
        starts = [0, *accumulate(self.lengths)]
        self.masks = {
            window: [_group_mask(blocks, group, starts, window) for group in self.groups] for window in windows
        }

    def __call__(self, q_AQE, context, own, window: int | None) -> Tensor:
        """As `Dense.__call__`."""
        far_k, far_v = (values.split(self.lengths, dim=1) for values in context)
        near_k, near_v = (values.split(self.queries, dim=1) for values in own)
        outs = []
        for index, (group, q_AqE) in enumerate(zip(self.groups, q_AQE.split(self.queries, dim=1), strict=True)):
            k_GLE = torch.cat([far_k[group.document][:, : group.rows], near_k[index]], dim=1)
            v_GLE = torch.cat([far_v[group.document][:, : group.rows], near_v[index]], dim=1)
            outs.append(attend(q_AqE, k_GLE, v_GLE, self.masks[window][index]))
        return torch.cat(outs, dim=1)


def _group_mask(blocks: "Blocks", group: Group, starts: list[int], window: int | None) -> Tensor:
    first = starts[group.document]
    return visible(blocks, slice(first, first + group.rows), group.first, group.last, window)


class Decode:
    """One block of each text after its own committed prefix: all of it on a full layer, the window's share on a sliding
    one. Prefixes differ in length, so texts attend one after the other; all else is done for all at once."""

    def __init__(self, slots: int, starts: Sequence[int], device: torch.device):
        self.slots, self.starts, self.device = slots, starts, device

    def __call__(self, q_AQE, context, own, window: int | None) -> Tensor:
        """As `Dense.__call__`, but `context` has keys and values for each text; row r of them is position r."""
        near_k, near_v = (values.split(self.slots, dim=1) for values in own)
        outs = []
        for start, q_ASE, far, *near in zip(
            self.starts, q_AQE.split(self.slots, dim=1), context, near_k, near_v, strict=True
        ):
            k_GLE, v_GLE = (torch.cat(pair, dim=1) for pair in zip(far, near, strict=True))
            outs.append(attend(q_ASE, k_GLE, v_GLE, None if window is None else self._window(start, window)))
        return torch.cat(outs, dim=1)

    def _window(self, start: int, window: int) -> Tensor:
        slots_S = torch.arange(self.slots, device=self.device)
        earliest_S1 = (start + slots_S - (window - 1))[:, None]
        context_SR = torch.arange(start, device=self.device) >= earliest_S1
        return torch.cat([context_SR, slots_S <= slots_S[:, None]], dim=1)
