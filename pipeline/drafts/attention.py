"""The attention mask of slots, and attention under it, by groups of blocks for speed.

A slot of a block at anchor a attends to its document's context strictly before a, and to its own block: all of it on a
full layer; on a sliding layer of window W the context from a + slot - (W - 1) and the slots up to itself. This is
SpecForge's rule, which the serving engines execute. No row of the mask is empty, so no kernel makes a NaN.

    A query heads   G key/value heads   E head size   N blocks   S slots   Q = N * S queries   R context rows   L keys
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.drafts.blocks import Blocks, Group
from pipeline.drafts.draft import DraftKV

KV = tuple[Tensor, Tensor]  # keys and values [G, tokens, E]


def attend(q_AQE: Tensor, k_GLE: Tensor, v_GLE: Tensor, allowed_QL: Tensor | None) -> Tensor:
    """Return grouped-query attention [A, Q, E]: query head a reads key/value head a // (A / G). None: no mask."""
    A, Q, E = q_AQE.shape
    G = k_GLE.shape[0]
    # Query heads that share a key head are folded into the query axis: no copy of the keys, and any kernel can run it.
    folded_GQE = q_AQE.reshape(G, A // G * Q, E)
    mask = None if allowed_QL is None else allowed_QL.repeat(A // G, 1)
    out = F.scaled_dot_product_attention(folded_GQE[None], k_GLE[None], v_GLE[None], attn_mask=mask)
    return out[0].reshape(A, Q, E)


def visibility_mask(blocks: Blocks, rows: slice, first: int, last: int, window: int | None) -> Tensor:
    """Return the mask of blocks first .. last - 1: bool [(last - first) * S, rows + (last - first) * S], True where a
    slot attends to a context row of `rows`, then to a slot of these blocks. window: None on a full layer."""
    device = blocks.anchors_N.device
    N, S = last - first, blocks.labels_NS.shape[1]
    anchors_N1 = blocks.anchors_N[first:last, None]
    row_R = torch.arange(rows.start, rows.stop, device=device)
    context_NR = (row_R < anchors_N1) & (row_R >= blocks.starts_N[first:last, None])
    context_NSR = context_NR[:, None].expand(N, S, -1)
    slots_S = torch.arange(S, device=device)
    inside_SS = torch.ones(S, S, dtype=torch.bool, device=device)
    if window is not None:
        earliest_NS = anchors_N1 + slots_S - (window - 1)
        context_NSR = context_NSR & (row_R >= earliest_NS[..., None])
        inside_SS = inside_SS.tril()
    inside_NSNS = torch.eye(N, dtype=torch.bool, device=device)[:, None, :, None] & inside_SS[:, None]
    return torch.cat([context_NSR.reshape(N * S, -1), inside_NSNS.reshape(N * S, N * S)], dim=1)


class GroupedAttention:
    """The same attention group by group, over the context and slots that the group can attend to.

    Tensors are split, not sliced: the gradient of a slice is as large as the tensor it was sliced from.
    """

    def __init__(self, blocks: Blocks, windows: set[int | None]):
        slots = blocks.labels_NS.shape[1]
        self.groups = blocks.groups
        self.queries = [(group.last - group.first) * slots for group in self.groups]
        self.lengths = blocks.lengths
        starts = [0, *accumulate(self.lengths)]
        self.masks = {
            window: [_group_mask(blocks, group, starts, window) for group in self.groups] for window in windows
        }

    def __call__(self, q_AQE: Tensor, context: KV, slots: KV, window: int | None, layer: int) -> Tensor:
        """Return the heads' outputs [A, Q, E] of layer number `layer`, from the context's and the slots' keys and
        values."""
        context_k, context_v = (values.split(self.lengths, dim=1) for values in context)
        slots_k, slots_v = (values.split(self.queries, dim=1) for values in slots)
        outs = []
        for index, (group, q_AqE) in enumerate(zip(self.groups, q_AQE.split(self.queries, dim=1), strict=True)):
            k_GLE = torch.cat([context_k[group.document][:, : group.rows], slots_k[index]], dim=1)
            v_GLE = torch.cat([context_v[group.document][:, : group.rows], slots_v[index]], dim=1)
            outs.append(attend(q_AqE, k_GLE, v_GLE, self.masks[window][index]))
        return torch.cat(outs, dim=1)


def _group_mask(blocks: Blocks, group: Group, starts: list[int], window: int | None) -> Tensor:
    first = starts[group.document]
    return visibility_mask(blocks, slice(first, first + group.rows), group.first, group.last, window)


class DecodeAttention:
    """Attention while decoding: one block of each text over the text's kv cache, or the window's part of it.

    The context rows are each text's new ones, end to end: every layer adds their keys and values to the text's cache.
    Prefixes differ in length, so texts attend one after the other; all else is batched.
    """

    def __init__(self, slots: int, caches: Sequence[DraftKV], new_rows: Sequence[int], device: torch.device):
        self.slots, self.caches, self.new_rows, self.device = slots, caches, new_rows, device

    def __call__(self, q_AQE: Tensor, context: KV, slots: KV, window: int | None, layer: int) -> Tensor:
        """As `GroupedAttention.__call__`."""
        new_k, new_v = (values.split(self.new_rows, dim=1) for values in context)
        slots_k, slots_v = (values.split(self.slots, dim=1) for values in slots)
        outs = []
        for text, q_ASE in enumerate(q_AQE.split(self.slots, dim=1)):
            context_kv = self.caches[text].extend(layer, new_k[text], new_v[text])
            allowed = None if window is None else self._window(context_kv[0].shape[1], window)
            k_GLE = torch.cat([context_kv[0], slots_k[text]], dim=1)
            v_GLE = torch.cat([context_kv[1], slots_v[text]], dim=1)
            outs.append(attend(q_ASE, k_GLE, v_GLE, allowed))
        return torch.cat(outs, dim=1)

    def _window(self, start: int, window: int) -> Tensor:
        slots_S = torch.arange(self.slots, device=self.device)
        earliest_S1 = (start + slots_S - (window - 1))[:, None]
        context_SR = torch.arange(start, device=self.device) >= earliest_S1
        return torch.cat([context_SR, slots_S <= slots_S[:, None]], dim=1)
