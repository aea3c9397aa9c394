"""The backbone's attention in training by torch's flex attention: one compiled kernel a layer on a GPU.

A slot attends to two ranges of keys: context rows before its anchor, and slots of its own block. So the mask is four
numbers a slot, and which blocks of 128 keys the kernel visits follows from them; nothing of the size queries x keys
exists. Keys lie as [context rows, padding, slots, padding]. A kernel is compiled for its shapes: padding to few sizes
keeps their number small, and blocks of padding are never visited.

    R context rows   Q slots of all blocks   L keys   A query heads   G key/value heads   E head size
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.drafts import fused
from pipeline.drafts.backbone import KV
from pipeline.drafts.blocks import Blocks

TILE = 128  # queries and keys of a block of the mask
MOST_SHAPES = 64  # compiled for at most so many; torch's own limit of 8 would fall back to all scores in memory

Ranges = tuple[Tensor, Tensor]  # first key and the one after the last, int32 [Q]


def padded_size(count: int) -> int:
    """Return the next of 128, 256, 384, 512, 768, 1024 ...: powers of two, and half-way between two of them."""
    size = TILE
    while size < count:
        if size >= 2 * TILE and size + size // 2 >= count:
            return size + size // 2
        size *= 2
    return size


def visible_ranges(blocks: Blocks, window: int | None, first_slot_key: int, queries: int) -> tuple[Ranges, Ranges]:
    """Return the ranges of keys that each slot attends to, in the context and in its block.

    A slot of padding, from Q to `queries`, attends to itself: no row of a mask should be empty. window: None on a full
    layer.
    """
    N, S = blocks.labels_NS.shape
    device = blocks.anchors_N.device
    slots_S = torch.arange(S, device=device)
    anchors_NS, starts_NS = (rows[:, None].expand(N, S) for rows in (blocks.anchors_N, blocks.starts_N))
    first_NS = torch.arange(N, device=device)[:, None] * S + first_slot_key
    last_NS = first_NS + S
    if window is not None:
        starts_NS = torch.maximum(starts_NS, anchors_NS + slots_S - (window - 1))
        last_NS = first_NS + slots_S + 1
    own_Q = torch.arange(N * S, queries, device=device) + first_slot_key

    def whole(of_slots_NS: Tensor, of_padding_Q: Tensor) -> Tensor:
        return torch.cat([of_slots_NS.expand(N, S).flatten(), of_padding_Q]).int()

    none_Q = torch.zeros_like(own_Q)
    context = whole(torch.minimum(starts_NS, anchors_NS), none_Q), whole(anchors_NS, none_Q)
    return context, (whole(first_NS, own_Q), whole(last_NS, own_Q + 1))


def flex_mask(context: Ranges, own: Ranges, keys: int):
    """Return the BlockMask of these ranges over so many keys."""
    from torch.nn.attention.flex_attention import BlockMask  # here: it imports the compiler

    (context_first, context_stop), (own_first, own_stop) = context, own

    def visible(batch, head, query, key):
        in_context = (key >= context_first[query]) & (key < context_stop[query])
        return in_context | ((key >= own_first[query]) & (key < own_stop[query]))

    edges_B = torch.arange(0, keys, TILE, device=context_first.device)
    some_QB, all_QB = False, False
    for first_Q, stop_Q in (context, own):
        first_Q1, stop_Q1 = first_Q[:, None], stop_Q[:, None]
        some_QB = some_QB | ((first_Q1 < edges_B + TILE) & (stop_Q1 > edges_B) & (first_Q1 < stop_Q1))
        all_QB = all_QB | ((first_Q1 <= edges_B) & (stop_Q1 >= edges_B + TILE))
    some_qB, all_qB = some_QB.unflatten(0, (-1, TILE)).any(1), all_QB.unflatten(0, (-1, TILE)).all(1)
    lists = [*_listed(some_qB & ~all_qB), *_listed(all_qB)]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=TILE, mask_mod=visible, seq_lengths=(len(context_first), keys))


def _listed(wanted_qB: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of keys each block of queries wants [1, 1, q] and their indices in front [1, 1, q, B]."""
    order_qB = wanted_qB.int().argsort(dim=-1, descending=True, stable=True)
    return wanted_qB.sum(-1).int()[None, None], order_qB.int()[None, None]


@cache
def _compiled():
    import torch._dynamo.config
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    return torch.compile(flex_attention, dynamic=False)


def attend_by_ranges(q_AQE: Tensor, k_GLE: Tensor, v_GLE: Tensor, mask) -> Tensor:
    """Return attention [A, Q, E] under a BlockMask; query head a reads key/value head a // (A / G)."""
    return _compiled()(q_AQE[None], k_GLE[None], v_GLE[None], block_mask=mask, enable_gqa=True)[0]


class FlexAttention:
    """As `GroupedAttention`, in one kernel."""

    def __init__(self, blocks: Blocks, windows: set[int | None]):
        rows, slots = sum(blocks.lengths), blocks.labels_NS.numel()
        self.slots, self.slot_padding = slots, padded_size(slots) - slots
        self.row_padding = padded_size(rows) - rows
        keys, first_slot_key = padded_size(rows) + padded_size(slots), padded_size(rows)
        self.masks = {
            window: flex_mask(*visible_ranges(blocks, window, first_slot_key, padded_size(slots)), keys)
            for window in windows
        }

    def __call__(self, q_AQE: Tensor, context: KV, slots: KV, window: int | None, layer: int) -> Tensor:
        """As `GroupedAttention.__call__`."""
        k_GLE, v_GLE = (self._keys(*pair) for pair in zip(context, slots, strict=True))
        q_AQE = F.pad(q_AQE, (0, 0, 0, self.slot_padding))
        attend = (fused.kernels and fused.kernels.attend) or attend_by_ranges
        return attend(q_AQE, k_GLE, v_GLE, self.masks[window])[:, : self.slots]

    def _keys(self, context_GRE: Tensor, slots_GQE: Tensor) -> Tensor:
        def padding(count: int) -> Tensor:
            return slots_GQE.new_zeros(len(slots_GQE), count, slots_GQE.shape[2])

        return torch.cat([context_GRE, padding(self.row_padding), slots_GQE, padding(self.slot_padding)], dim=1)
