"""Attention by flex attention sees what the masks of the other attention say."""

import shutil

import pytest
import torch
from draft_cases import all_blocks, build, cell_of

from pipeline.drafts import lay_blocks
from pipeline.drafts.backbone import GroupedAttention, visibility_mask
from pipeline.drafts.flex import TILE, FlexAttention, flex_mask, padded_size, visible_ranges


def seen(blocks, window: int | None, rows: int, slots: int) -> torch.Tensor:
    """Which of `rows` + `slots` keys each of `slots` queries attends to, by the BlockMask: its function, and the blocks
    of keys that a kernel visits, of which full ones are not masked."""
    mask = flex_mask(*visible_ranges(blocks, window, rows, slots), rows + slots)
    query, key = torch.arange(slots)[:, None], torch.arange(rows + slots)
    by_function = mask.mask_mod(None, None, query, key)
    visited = torch.zeros(slots // TILE, (rows + slots) // TILE, dtype=torch.long)
    for value, counts, indices in (
        (1, mask.kv_num_blocks, mask.kv_indices),
        (2, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for block, count in enumerate(counts[0, 0].tolist()):
            visited[block, indices[0, 0, block, :count].long()] = value
    visited = visited.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    return (by_function & (visited == 1)) | (visited == 2)


@pytest.mark.parametrize("block_size", [7, 16])
@pytest.mark.parametrize("window", [None, 5, 40, 300])
def test_a_slot_sees_its_context_and_its_block(window, block_size):
    draft = build("dspark", block_size=block_size)
    cell = cell_of(400, 37, 700)
    anchors = torch.cat([torch.arange(1, 396, 9), torch.arange(402, 434, 5), torch.arange(440, 1130, 6)])
    blocks = lay_blocks(cell, anchors, draft.config)
    R, Q = 1137, len(anchors) * block_size
    rows, slots = padded_size(R), padded_size(Q)

    found = seen(blocks, window, rows, slots)
    wanted = visibility_mask(blocks, slice(0, R), 0, len(anchors), window)
    assert torch.equal(found[:Q, :R], wanted[:, :R])
    assert torch.equal(found[:Q, rows : rows + Q], wanted[:, R:])
    assert not found[:Q, R:rows].any() and not found[:Q, rows + Q :].any()
    assert torch.equal(found[Q:].sum(-1), torch.ones(slots - Q, dtype=torch.long))  # padding sees itself


def test_sizes_are_padded_to_few():
    sizes = [padded_size(count) for count in range(1, 40_000)]
    assert all(size >= count and size % TILE == 0 for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 18 and all(size < 1.5 * count for count, size in enumerate(sizes, 1) if count > 2 * TILE)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_on_a_cpu_it_is_the_other_attention():
    draft = build("dflash", num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    cell = cell_of(150, 40)
    blocks = all_blocks(draft, cell)
    N, S = blocks.labels_NS.shape
    q = torch.randn(4, N * S, 32)
    context, slots = ([torch.randn(2, count, 32) for _ in range(2)] for count in (190, N * S))
    for window in (None, 24):
        with torch.no_grad():
            found, wanted = (
                attention(blocks, {window})(q, context, slots, window, 0)
                for attention in (FlexAttention, GroupedAttention)
            )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
