"""A draft vocabulary: which ids it has, what a draft learns and proposes of them, and how it is published."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from draft_cases import V, build, cell_of, fields

from pipeline.cache import HiddenCache
from pipeline.drafts import DRAFTS, Sampling, draft_config, lay_blocks
from pipeline.drafts.draft import BlockRequest
from pipeline.drafts.vocabulary import ids_of, most_frequent, within, write_maps
from pipeline.errors import UsageError
from pipeline.published import load_draft_folder
from pipeline.published.check import check_export
from pipeline.published.export import export
from pipeline.published.init_from import InitialDraft
from pipeline.runs.checkpoint import load_draft
from pipeline.runs.recipe import load_recipe, resolve
from stages.train_draft.run import run as train
from stages.train_draft.run import split_for

IDS = torch.tensor([1, 2, 5, 9, 20, 33, 40, 63])


def reduced(**changes):
    """A DFlash draft that may propose IDS only, and the same draft that may propose all."""
    small = build("dflash", shift=False, vocabulary=len(IDS), **changes)
    write_maps(IDS, small.d2t, small.t2d)
    whole = build("dflash", shift=False, **changes)
    whole.load_state_dict({name: t for name, t in small.state_dict().items() if name not in ("d2t", "t2d")})
    return small, whole


def test_the_most_frequent_ids_are_taken_in_ascending_order_and_the_lowest_of_equals():
    ids_W = most_frequent([np.array([7, 7, 3]), np.array([3, 7, 9, 4])], 12, 3)

    assert ids_W.tolist() == [3, 4, 7]  # 4 and 9 occur once each


def test_the_maps_name_every_id_and_none_else():
    d2t_W, t2d_V = torch.zeros(3, dtype=torch.long), torch.ones(8, dtype=torch.bool)
    write_maps(torch.tensor([1, 4, 6]), d2t_W, t2d_V)

    assert d2t_W.tolist() == [1, 3, 4]
    assert ids_of(d2t_W).tolist() == [1, 4, 6]
    assert t2d_V.nonzero()[:, 0].tolist() == [1, 4, 6]


def test_a_slot_whose_label_the_draft_has_not_is_neither_scored_nor_weighted():
    small, _ = reduced()
    cell = cell_of(24)
    blocks = lay_blocks(cell, torch.tensor([4, 11]), small.config)
    labels_NS = blocks.labels_NS.clone()
    labels_NS[0, 1], labels_NS[0, 2] = 9, 10
    found = within(replace(blocks, labels_NS=labels_NS), small.t2d)

    assert found.labels_NS[0, 1] == 3  # 9 is the fourth of IDS
    assert found.scored_NS[0, 1] == blocks.scored_NS[0, 1] and not found.scored_NS[0, 2]
    assert found.weights_NS[0, 1] == blocks.weights_NS[0, 1] and found.weights_NS[0, 2] == 0


@pytest.mark.parametrize("objective", ["ce", "kl"])
def test_the_loss_is_that_of_the_whole_head_with_every_other_id_ruled_out(objective):
    small, whole = reduced(objective=objective)
    cell = cell_of(30)
    cell = replace(cell, ids_R=IDS[torch.arange(30) % len(IDS)])  # every label can be proposed
    blocks = lay_blocks(cell, torch.tensor([3, 9, 20]), small.config)
    dens = small.denominators(blocks)
    found = small.loss(cell, blocks, {}, dens, metrics=True)

    logits_NSW = whole.logits(whole.hidden(cell, blocks), blocks.prev_NS)["final"][..., IDS]
    log_q_NSW = logits_NSW.log_softmax(-1)
    if objective == "ce":
        at_NS = (blocks.labels_NS[..., None] == IDS).long().argmax(-1)
        value_NS = -log_q_NSW.gather(-1, at_NS[..., None])[..., 0]
    else:
        at_NS = torch.where(blocks.scored_NS, cell.final_at_R[blocks.final_row_NS], 0)
        p_NSW = whole.target.logits(cell.final_FD[at_NS])[..., IDS].softmax(-1)
        value_NS = (p_NSW * (p_NSW.log() - log_q_NSW)).sum(-1)
    wanted = (value_NS * blocks.weights_NS).sum() / blocks.weights_NS.sum()

    torch.testing.assert_close(found.total.float(), wanted, rtol=2e-5, atol=1e-6)


def test_a_label_that_cannot_be_proposed_counts_as_a_miss_and_changes_no_gradient():
    small, _ = reduced()
    cell = cell_of(30)
    outside = replace(cell, ids_R=torch.full((30,), 10))
    blocks = lay_blocks(outside, torch.tensor([3, 9]), small.config)
    dens = {name: value + 1 for name, value in small.denominators(blocks).items()}
    found = small.loss(outside, blocks, {}, dens, metrics=True)
    found.total.backward()

    assert found.total.item() == 0
    assert all(weight.grad is None or not weight.grad.any() for weight in small.parameters())
    assert found.sums["correct_S"].sum() == 0 and found.sums["scored_S"].sum() > 0
    assert found.sums["accept"] == found.sums["blocks"]  # the target's own token, and nothing accepted


def test_every_proposal_is_an_id_of_the_vocabulary_and_its_probabilities_are_over_the_targets_ids():
    small, whole = reduced()
    features_KTD = torch.randn(3, 6, small.config.hidden_size, generator=torch.Generator().manual_seed(1))

    def ask(draft, sampling=None):
        return draft.propose([BlockRequest(features_KTD, 5, 6, draft.new_kv())], sampling)[0]

    greedy = ask(small)
    assert set(greedy.ids_P.tolist()) <= set(IDS.tolist())
    sampled = ask(small, Sampling(1.0, [torch.Generator().manual_seed(0)]))
    assert set(sampled.ids_P.tolist()) <= set(IDS.tolist())
    assert sampled.q_PV.shape == (len(sampled.ids_P), V)
    torch.testing.assert_close(sampled.q_PV.sum(-1), torch.ones(len(sampled.ids_P)))
    outside = torch.ones(V).bool()
    outside[IDS] = False
    assert not sampled.q_PV[:, outside].any()
    best_P = ask(whole, Sampling(1.0, [torch.Generator().manual_seed(0)])).q_PV[:, IDS].argmax(-1)
    assert torch.equal(greedy.ids_P, IDS[best_P])


@pytest.mark.parametrize("vocabulary", [V, V + 1])
def test_a_vocabulary_that_is_no_smaller_than_the_targets_is_refused(vocabulary):
    with pytest.raises(UsageError, match="leave it out to propose all"):
        draft_config(**fields("dflash", False, vocabulary=vocabulary))


@pytest.mark.parametrize("method", [name for name, draft in DRAFTS.items() if not draft.reduces_vocabulary])
def test_a_method_without_a_place_for_it_refuses_a_vocabulary_by_name(method):
    with pytest.raises(UsageError, match=f"vocabulary = 8 means nothing to {method}"):
        draft_config(**fields(method, True, vocabulary=8))


def test_a_run_counts_its_supervised_ids_and_its_export_is_read_back_with_both_maps(tiny_cache, tmp_path):
    sets = ("draft.method=dflash", "draft.vocabulary=12", "draft.block_size=4", "train.steps=4", "train.batch=4")
    run = train(tiny_cache, None, (*sets, "train.anchors=6"), tmp_path / "run", "cpu")
    store = HiddenCache.open(tiny_cache)
    draft = load_draft(run.run, store.head())
    split, counts = split_for(resolve(load_recipe(None, sets), store), store), np.zeros(draft.config.vocab_size, int)
    for ids, mask in map(store.tokens_of, map(int, split.train)):
        counts += np.bincount(ids[mask], minlength=len(counts))
    chosen = ids_of(draft.d2t).numpy()
    assert counts[chosen].sum() < counts.sum() and counts[chosen].min() >= np.delete(counts, chosen).max()

    with pytest.raises(UsageError, match=r"sglang has no place .* --format speculators"):
        export(run.run, tmp_path / "sglang")
    export(run.run, tmp_path / "out", "speculators")
    assert check_export(tmp_path / "out")["proposed_ids"] == 12
    opened = load_draft_folder(tmp_path / "out", store.head())
    assert torch.equal(opened.d2t, draft.d2t) and opened.config.vocabulary == 12
    started = InitialDraft(tmp_path / "out").weights_for(draft.config.model_copy(update={"vocabulary": None}))
    assert not started.fresh
