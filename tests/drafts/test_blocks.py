"""Cells and blocks: anchors, labels, weights and masks, by the worked example and by property."""

import math
from types import SimpleNamespace

import pytest
import torch

from pipeline.drafts import DraftConfig, draft_config, eligible_anchors, lay_blocks, pack
from pipeline.drafts.backbone import visibility_mask
from pipeline.drafts.blocks import Group, group_blocks, slot_decay
from pipeline.drafts.objectives import metrics_of, slot_sums

MASK = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 1, 1]).bool()
GUESS = 99  # the mask token


def config(method: str = "dflash", shift: bool = False, block: int = 4, **more) -> DraftConfig:
    domino = {"pure_draft_prefix_len": 0, "emb_dim": 4, "gru_hidden_dim": 4} if method == "domino" else {}
    shape = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": 100,
        "rope_theta": 1e4,
        "max_position_embeddings": 128,
        "num_target_layers": 6,
        "target_layer_ids": (1, 3),
        "mask_token_id": GUESS,
        "gamma": 2.0,
    }
    return draft_config(**{"method": method, "shift_label": shift, "block_size": block, **shape, **domino, **more})


def sample(first: int, mask: torch.Tensor):
    """Tokens first, first + 1, ...: a label names its position."""
    return SimpleNamespace(ids=first + torch.arange(len(mask)), mask=mask, aux=torch.zeros(2, len(mask), 8))


def example(method: str, shift: bool):
    cell = pack([sample(10, MASK)], ["a"])
    return lay_blocks(cell, torch.tensor([5, 8]), config(method, shift))


def test_worked_example_anchors():
    assert eligible_anchors(MASK).nonzero().flatten().tolist() == [3, 4, 5, 8]


@pytest.mark.parametrize(
    "method, shift, first, second",
    [
        ("dflash", False, [0, 1, 0, math.exp(-1)], [0, 1, 0, 0]),
        ("domino", False, [0, 1, 0, math.exp(-1)], [0, 1, 0, 0]),
        ("domino", True, [1, 0, math.exp(-1), math.exp(-1.5)], [1, 0, 0, 0]),
        ("dflash", True, [1, 0, math.exp(-1), math.exp(-1.5)], [1, 0, 0, 0]),
        ("dspark", True, [1.0, 0, 0, 0], [1.0, 0, 0, 0]),  # nothing after the gap
    ],
)
def test_worked_example_weights(method, shift, first, second):
    blocks = example(method, shift)
    torch.testing.assert_close(blocks.weights_NS, torch.tensor([first, second]))
    assert torch.equal(blocks.scored_NS, blocks.weights_NS > 0)


def test_worked_example_labels_and_noise():
    same, shifted = example("dflash", False), example("domino", True)
    assert same.labels_NS[0].tolist() == [15, 16, 17, 18]
    assert shifted.labels_NS[0].tolist() == [16, 17, 18, 19]
    assert same.prev_NS[0].tolist() == shifted.prev_NS[0].tolist() == [15, 16, 17, 18]
    assert same.input_ids_NS.tolist() == [[15, GUESS, GUESS, GUESS], [18, GUESS, GUESS, GUESS]]
    assert same.positions_NS.tolist() == [[5, 6, 7, 8], [8, 9, 10, 11]]


def test_worked_example_mask():
    blocks = example("dflash", False)
    allowed = visibility_mask(blocks, slice(0, 10), 0, 2, None)
    assert allowed.shape == (8, 18)
    for query in range(4):
        assert allowed[query].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13]
    for query in range(4, 8):
        assert allowed[query].nonzero().flatten().tolist() == [*range(8), 14, 15, 16, 17]


@pytest.mark.parametrize(
    "right, length", [([True, True, False, False], 2), ([True, False, True, True], 4), ([False, True, True, True], 1)]
)
def test_worked_example_accept_length(right, length):
    blocks = example("domino", True)
    sums = slot_sums({"correct": torch.tensor([right, right])[:1]}, blocks.scored_NS[:1])
    assert metrics_of(sums, {}, {})["accept_len_tf"] == length


def test_worked_example_decay_sums():
    def total(block, shift, gamma):
        return float(slot_decay(config("domino", shift, block, gamma=gamma))[int(not shift) :].sum())

    assert total(16, False, 7.0) == pytest.approx(6.6306, abs=5e-5)
    assert total(16, True, 7.0) == pytest.approx(6.7479, abs=5e-5)
    assert total(7, True, 4.0) == pytest.approx(3.7352, abs=5e-5)


def test_without_gamma_nothing_decays():
    blocks = lay_blocks(pack([sample(10, MASK)], ["a"]), torch.tensor([5]), config(gamma=None))
    assert blocks.weights_NS.tolist() == [[0, 1, 0, 1]]


def test_labels_and_prefixes_never_leave_the_document():
    on = torch.ones(4, dtype=torch.bool)
    cell = pack([sample(10, on), sample(20, on), sample(30, on)], ["a", "b", "c"])
    blocks = lay_blocks(cell, torch.tensor([2, 3, 4, 10]), config("domino", True))

    assert blocks.doc_N.tolist() == [0, 0, 1, 2]
    assert blocks.scored_NS.tolist() == [
        [True, False, False, False],
        [False] * 4,
        [True] * 3 + [False],
        [True] + [False] * 3,
    ]
    assert blocks.labels_NS[0].tolist() == [13, 13, 13, 13]  # those after the first are not scored
    assert blocks.prev_NS.tolist() == [[12, 13, 13, 13], [13] * 4, [20, 21, 22, 23], [32, 33, 33, 33]]


def test_final_states_are_found_by_row_in_every_document():
    mask = torch.tensor([0, 0, 1, 1, 0, 0]).bool()
    parts = [sample(10, mask), sample(20, mask)]
    for at, part in enumerate(parts):
        part.final_rows = torch.tensor([1, 2, 3, 4])
        part.final = torch.full((4, 8), float(100 * at)) + part.final_rows[:, None]
    cell = pack(parts, ["a", "b"], final=True)
    assert cell.final_at_R.tolist() == [-1, 0, 1, 2, 3, -1, -1, 4, 5, 6, 7, -1]
    assert cell.final_FD[cell.final_at_R[[2, 8]], 0].tolist() == [2, 102]
    same, shifted = (
        lay_blocks(cell, torch.tensor([2, 8]), config(method, method == "domino")) for method in ("dflash", "domino")
    )
    assert same.final_row_NS.tolist() == [[0, 2, 0, 0], [0, 8, 0, 0]]
    assert shifted.final_row_NS.tolist() == [[2, 0, 0, 0], [8, 0, 0, 0]]


def test_a_block_sees_its_own_document_only():
    on = torch.ones(4, dtype=torch.bool)
    cell = pack([sample(10, on), sample(20, on)], ["a", "b"])
    blocks = lay_blocks(cell, torch.tensor([6]), config())
    assert visibility_mask(blocks, slice(0, 8), 0, 1, None)[0].nonzero().flatten().tolist() == [4, 5, 8, 9, 10, 11]


def test_a_block_without_context_sees_itself():
    blocks = lay_blocks(pack([sample(10, MASK)], ["a"]), torch.tensor([0]), config())
    assert visibility_mask(blocks, slice(0, 10), 0, 1, None)[2].nonzero().flatten().tolist() == [10, 11, 12, 13]


def test_a_sliding_layer_sees_a_window_and_no_later_slot():
    blocks = lay_blocks(pack([sample(10, MASK)], ["a"]), torch.tensor([8]), config())
    allowed = visibility_mask(blocks, slice(0, 10), 0, 1, window=4)
    assert [row.nonzero().flatten().tolist() for row in allowed] == [
        [5, 6, 7, 10],
        [6, 7, 10, 11],
        [7, 10, 11, 12],
        [10, 11, 12, 13],
    ]


def test_a_window_of_a_sample_keeps_true_positions():
    cell = pack([sample(10, MASK), sample(40, MASK)], ["a", "b"], offsets=[0, 256])
    blocks = lay_blocks(cell, torch.tensor([15]), config())
    assert cell.pos_R.tolist() == [*range(10), *range(256, 266)]
    assert blocks.positions_NS.tolist() == [[261, 262, 263, 264]]


def test_groups_hold_near_blocks_of_one_document():
    groups = group_blocks([1, 5, 9, 2, 4], [0, 0, 0, 1, 1], slots=4, queries=8)
    assert groups == (Group(0, 2, 0, 5), Group(2, 3, 0, 9), Group(3, 5, 1, 4))


def test_groups_cover_every_block_once_in_any_order():
    anchors, documents = [9, 0, 4, 3, 3, 8, 0], [1, 1, 0, 0, 1, 1, 0]
    groups = group_blocks(anchors, documents, slots=3, queries=6)
    assert [block for group in groups for block in range(group.first, group.last)] == list(range(7))
    for group in groups:
        for block in range(group.first, group.last):
            assert documents[block] == group.document and anchors[block] <= group.rows


def test_unscored_slots_are_neutral_in_the_accept_length():
    scored = torch.tensor([[True, False, True, True], [False] * 4])
    sums = slot_sums({"correct": torch.tensor([[True, False, True, False]] * 2)}, scored)
    assert (
        float(sums["accept"]) == 3 and float(sums["blocks"]) == 1
    )  # 2 and the target's own; the empty block counts not
    assert sums["correct_S"].tolist() == [1, 0, 1, 0] and sums["scored_S"].tolist() == [1, 0, 1, 1]


def test_metrics_of_summed_cells_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    scored, right = (torch.rand(12, 4, generator=generator) > 0.4 for _ in range(2))
    whole = slot_sums({"correct": right, "base_correct": ~right}, scored)
    parts = [
        slot_sums({"correct": right[p], "base_correct": ~right[p]}, scored[p]) for p in (slice(0, 5), slice(5, 12))
    ]
    summed = {name: parts[0][name] + parts[1][name] for name in whole}
    assert metrics_of(summed, {}, {}) == metrics_of(whole, {}, {})
    assert {"accuracy", "base_accuracy", "base_accept_len_tf", "slot_accuracy"} <= metrics_of(whole, {}, {}).keys()
