"""The sampler: pure, independent of what else is in the cache, balanced."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.runs.training_data import splitmix64
from stages.train_draft.batches import (
    SampleCost,
    draw_anchors,
    draw_window,
    epoch_keys,
    epoch_order,
    forward_cost,
    pack_cells,
)

RNG = np.random.default_rng(0)


def sample_ids(count: int) -> tuple[np.ndarray, np.ndarray]:
    words = RNG.integers(0, 2**64, size=(count, 2), dtype=np.uint64)
    return words, words[:, 1]


def test_mix_is_the_finaliser_of_splitmix64():
    # the generator of that name returns finaliser(seed + golden); for seed 0 its first outputs are published
    golden = 0x9E3779B97F4A7C15
    outputs = splitmix64(np.array([golden, 2 * golden % 2**64, 3 * golden % 2**64], dtype=np.uint64))

    assert [int(word) for word in outputs] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_adding_samples_leaves_the_order_of_the_others():
    ids, low = sample_ids(200)
    some = np.sort(RNG.choice(200, 120, replace=False))

    whole = epoch_order(epoch_keys(low, seed=3, epoch=2), ids)
    part = epoch_order(epoch_keys(low[some], seed=3, epoch=2), ids[some])

    assert [i for i in whole if i in set(some)] == some[part].tolist()


def test_order_depends_on_ids_and_not_on_where_samples_lie():
    ids, low = sample_ids(50)
    shuffled = RNG.permutation(50)

    here = ids[epoch_order(epoch_keys(low, 0, 0), ids)]
    there = ids[shuffled][epoch_order(epoch_keys(low[shuffled], 0, 0), ids[shuffled])]

    assert here.tolist() == there.tolist()


def test_each_epoch_and_seed_has_its_own_order_and_every_sample_once():
    ids, low = sample_ids(64)

    orders = [epoch_order(epoch_keys(low, seed, epoch), ids).tolist() for seed in (0, 1) for epoch in (0, 1)]

    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(64)) for order in orders)


def test_equal_keys_are_ordered_by_sample_id():
    ids = np.array([[2, 0], [1, 5], [1, 9]], np.uint64)

    assert epoch_order(np.zeros(3, np.uint64), ids).tolist() == [1, 2, 0]


def test_anchors_are_the_valid_rows_of_smallest_hash():
    valid = np.zeros(40, bool)
    valid[[3, 4, 9, 20, 33]] = True
    key = 123456789
    ranked = sorted((3, 4, 9, 20, 33), key=lambda p: int(splitmix64((key + (p + 1) * 0x9E3779B97F4A7C15) % 2**64)))

    assert draw_anchors(valid, key, 2).tolist() == sorted(ranked[:2])
    assert draw_anchors(valid, key, 512).tolist() == [3, 4, 9, 20, 33]


def test_fewer_anchors_are_a_subset_and_a_window_keeps_their_rank():
    valid = RNG.random(600) < 0.6
    many, few = draw_anchors(valid, 7, 100), draw_anchors(valid, 7, 30)
    inside = draw_anchors(valid[256:], 7, 1000, first=256) + 256

    assert set(few) < set(many)
    assert inside.tolist() == np.flatnonzero(valid)[np.flatnonzero(valid) >= 256].tolist()
    best = draw_anchors(valid[256:], 7, 1, first=256)[0] + 256
    order = np.arange(600)[valid]
    words = splitmix64((7 + (order.astype(object) + 1) * 0x9E3779B97F4A7C15) % 2**64)
    assert best == min((word, p) for word, p in zip(words, order, strict=True) if p >= 256)[1]


def test_anchors_change_with_the_epoch():
    valid = np.ones(200, bool)
    drawn = {tuple(draw_anchors(valid, int(epoch_keys(np.array([5]), 0, epoch)[0]), 20)) for epoch in range(5)}

    assert len(drawn) == 5


def test_a_sample_that_fits_is_its_own_window():
    assert draw_window(np.ones(300, bool), key=1, context=300) == (0, 300)


@pytest.mark.parametrize(
    ("T", "context"), [(1000, 256), (1000, 512), (777, 300), (2048, 256), (513, 512), (61, 24), (300, 70)]
)
def test_windows_end_at_a_block_and_hold_an_anchor(T, context):
    for key in range(40):
        valid = np.zeros(T, bool)
        valid[RNG.integers(0, T - 1, size=2)] = True
        start, stop = draw_window(valid, key, context)

        assert 0 <= start < stop <= T and stop - start == context
        assert valid[start : stop - 1].any(), "an anchor and its next row are in the window"


def test_every_window_of_the_grid_comes_up():
    valid = np.ones(1000, bool)

    found = {draw_window(valid, int(key), 256) for key in splitmix64(np.arange(200, dtype=np.uint64))}

    assert found == {(0, 256), (256, 512), (512, 768), (744, 1000)}


def test_an_anchor_on_the_edge_of_every_window_still_gets_one():
    valid = np.zeros(600, bool)
    valid[255] = True  # rows 255 and 256 lie in different windows of 256

    start, stop = draw_window(valid, 0, 256)

    assert start <= 255 and stop >= 257 and stop - start == 256


def test_cells_hold_every_sample_once_within_their_bounds():
    for _ in range(20):
        costs = [SampleCost(int(r), int(a), int(r * a)) for r, a in RNG.integers(1, 100, size=(40, 2))]
        cells = pack_cells(costs, rows=300, anchors=200, cells=3)

        assert sorted(number for cell in cells for number in cell) == list(range(40))
        assert all(sum(costs[number].rows for number in cell) <= 300 for cell in cells)
        assert all(sum(costs[number].anchors for number in cell) <= 200 for cell in cells)


def test_packing_fills_well_and_balances():
    costs = [SampleCost(int(rows), 8, int(rows)) for rows in RNG.integers(20, 400, size=400)]
    total = sum(cost.rows for cost in costs)

    tight = pack_cells(costs, rows=3072, anchors=4096)
    even = [sum(costs[number].cost for number in cell) for cell in pack_cells(costs, 10**6, 10**6, cells=8)]

    assert total / (3072 * len(tight)) > 0.9
    assert max(even) <= 1.05 * min(even)


def test_no_cell_is_empty():
    assert pack_cells([SampleCost(1, 1, 1)], rows=10, anchors=10, cells=4) == [[0]]


def test_cost_counts_context_slots_and_attention_by_hand():
    shapes = {
        "hidden_size": 4,
        "vocab_size": 99,
        "proposable": 10,
        "block_size": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    shapes |= {"num_key_value_heads": 1, "head_dim": 3, "intermediate_size": 5, "target_layer_ids": (1, 2, 3)}
    hard, soft = (SimpleNamespace(**shapes, needs_final_states=reads) for reads in (False, True))

    # fc 7 x 12 x 4, context k and v 7 x 4 x 6; slots 4 x (q, o 48, k, v 24, mlp 60, head 40);
    # scores and values: 6 x 2 for each of 2 slots and (1 + 2) + (5 + 2) keys
    assert forward_cost(hard, 7, np.array([1, 5])) == 7 * 48 + 7 * 24 + 4 * (48 + 24 + 60 + 40) + 12 * 2 * 10
    assert forward_cost(soft, 7, np.array([1, 5])) == forward_cost(hard, 7, np.array([1, 5])) + 4 * 40, (
        "the head once more"
    )
