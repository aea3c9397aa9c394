"""A draft vocabulary: which ids it has, what a draft of each method that has one learns and proposes of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from draft_cases import V, assert_near, build, cell_of, fields, gradients

from pipeline.drafts import DRAFTS, Sampling, draft_config, lay_blocks
from pipeline.drafts.draft import BlockRequest
from pipeline.drafts.vocabulary import MAPS, carry_rows, ids_of, most_frequent, within, write_maps
from pipeline.errors import UsageError

IDS = torch.tensor([1, 2, 5, 9, 20, 33, 40, 63])
BARE = {"markov_rank": 0, "markov_head_type": "vanilla"}
CASES = {  # method, labels and options of each that reduces its vocabulary
    "dflash": ("dflash", False, {}),
    "dspark vanilla": ("dspark", True, {"markov_head_type": "vanilla", "confidence_head_with_markov": True}),
    "dspark gated": ("dspark", True, {"markov_head_type": "gated"}),
    "dspark rnn": ("dspark", True, {"markov_head_type": "rnn"}),
    "dspark without markov": ("dspark", True, BARE),
}
every_case = pytest.mark.parametrize("case", CASES)
OBJECTIVES = [(case, objective) for case in CASES for objective in ("ce", "kl", "dspark")]


def reduced(case="dflash", **changes):
    """A draft that may propose IDS only, and the same draft that may propose all."""
    method, shift, options = CASES[case]
    options = options | changes
    if options.get("objective") == "ce":
        options["confidence_head_with_markov"] = options["enable_confidence_head"] = None
    small = build(method, shift, vocabulary=len(IDS), **options)
    write_maps(IDS, small.d2t, small.t2d)
    whole = build(method, shift, **options)
    rows = {name: torch.zeros(V, tensor.shape[1]) for name, tensor in whole.state_dict().items() if is_of_ids(name)}
    state = {name: tensor for name, tensor in small.state_dict().items() if name not in MAPS}
    whole.load_state_dict(state | {name: full.index_copy(0, IDS, state[name]) for name, full in rows.items()})
    return small, whole


def is_of_ids(name: str) -> bool:
    return name == "markov_head.markov_w2.weight"


def ruled_out(whole):
    """The draft of all ids, made to choose among IDS: its logits of every other id count for nothing."""
    whole._choose = lambda raw_NV, sampling: IDS[raw_NV[:, IDS].argmax(-1)]
    return whole


def test_every_method_that_reduces_is_asked():
    assert {method for method, _, _ in CASES.values()} == {
        name for name, draft in DRAFTS.items() if draft.reduces_vocabulary
    }


def test_the_most_frequent_ids_are_taken_in_ascending_order_and_the_lowest_of_equals():
    ids_W = most_frequent([np.array([7, 7, 3]), np.array([3, 7, 9, 4])], 12, 3)

    assert ids_W.tolist() == [3, 4, 7]  # 4 and 9 occur once each


def test_the_maps_name_every_id_and_none_else():
    d2t_W, t2d_V = torch.zeros(3, dtype=torch.long), torch.ones(8, dtype=torch.bool)
    write_maps(torch.tensor([1, 4, 6]), d2t_W, t2d_V)

    assert d2t_W.tolist() == [1, 3, 4]
    assert ids_of(d2t_W).tolist() == [1, 4, 6]
    assert t2d_V.nonzero()[:, 0].tolist() == [1, 4, 6]


def test_rows_are_carried_by_their_ids_and_the_others_kept():
    from_WU, into_XU = torch.tensor([[10.0], [40.0], [60.0]]), torch.tensor([[-1.0], [-4.0], [-9.0]])

    some = carry_rows(torch.tensor([1, 4, 6]), from_WU, torch.tensor([2, 4, 9]), into_XU)
    of_all = carry_rows(None, torch.arange(5.0)[:, None], torch.tensor([1, 3]), into_XU[:2])

    assert some.tolist() == [[-1.0], [40.0], [-9.0]] and of_all.tolist() == [[1.0], [3.0]]
    assert into_XU[1] == -4


@every_case
def test_only_what_scores_proposals_has_fewer_rows(case):
    small, whole = reduced(case)
    mine, all_ = small.state_dict(), whole.state_dict()

    assert mine.keys() - all_.keys() == MAPS
    fewer = {name for name in all_ if mine[name].shape != all_[name].shape}
    assert fewer == {name for name in all_ if is_of_ids(name)}
    assert {name: tuple(tensor.shape) for name, tensor in mine.items()} == type(small).tensors(small.config)


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


def ruled_out_loss(whole, cell, blocks):
    """The loss over whole logits, by autograd, where every id but IDS is ruled out of draft and target alike."""
    config, hidden = whole.config, whole.hidden(cell, blocks)
    z, out = whole.correction(hidden, blocks.prev_NS) or (None, None)
    logits = hidden @ whole.target.head_VD.T + (0 if z is None else z @ out.T)
    outside = torch.ones(V).bool().index_fill(0, IDS, False)
    q = logits.masked_fill(outside, -torch.inf).softmax(-1)
    at = torch.where(blocks.scored_NS, cell.final_at_R[blocks.final_row_NS], 0)
    p = whole.target.logits(cell.final_FD[at]).masked_fill(outside, -torch.inf).softmax(-1)
    may = torch.isin(blocks.labels_NS, IDS)
    ce = -torch.where(may, q.gather(-1, blocks.labels_NS[..., None])[..., 0], 1.0).log()
    kl, l1 = (p[..., IDS] * (p[..., IDS] / q[..., IDS]).log()).sum(-1), (q - p).abs().sum(-1)
    value = {"ce": ce, "kl": kl, "dspark": 0.1 * ce + 0.9 * l1}[config.objective]
    if config.has_confidence:
        kept = (1 - l1.detach() / 2).clamp(0, 1)
        value = value + F.binary_cross_entropy_with_logits(
            whole.confidence(hidden, blocks.prev_NS), kept, reduction="none"
        )
    weights = blocks.weights_NS.double() * may
    return (weights * value).sum() / weights.sum()


@pytest.mark.parametrize(("case", "objective"), OBJECTIVES)
def test_loss_and_gradients_are_those_of_the_whole_head_with_every_other_id_ruled_out(case, objective):
    small, whole = (draft.double() for draft in reduced(case, objective=objective))
    small.target, whole.target = (draft.target.to(dtype=torch.float64) for draft in (small, whole))
    cell = cell_of(30)
    ids = IDS[torch.arange(30) % len(IDS)]
    ids[::4] = 10  # which cannot be proposed, and is the token before others
    cell = replace(cell, ids_R=ids, final_FD=cell.final_FD.double())
    blocks = lay_blocks(cell, torch.tensor([3, 9, 20]), small.config)
    found = small.loss(cell, blocks, {}, small.denominators(blocks), metrics=True)
    wanted = ruled_out_loss(whole, cell, blocks)

    assert small.config.has_confidence == (objective != "ce" and case != "dflash")
    torch.testing.assert_close(found.total, wanted, rtol=1e-9, atol=0)
    mine, theirs = gradients(small, found.total), gradients(whole, wanted)
    for name, gradient in mine.items():
        of_whole = theirs[name][IDS] if is_of_ids(name) else theirs[name]
        assert (gradient - of_whole).norm() <= 1e-7 * of_whole.norm() and bool(gradient.any()), name


@every_case
def test_a_label_that_cannot_be_proposed_counts_as_a_miss_and_changes_no_gradient(case):
    small, _ = reduced(case)
    cell = cell_of(30)
    outside = replace(cell, ids_R=torch.full((30,), 10))
    blocks = lay_blocks(outside, torch.tensor([3, 9]), small.config)
    found = small.loss(outside, blocks, {}, small.denominators(blocks), metrics=True)
    found.total.backward()

    assert found.total.item() == 0  # not NaN, though nothing in the batch is learned from
    assert all(weight.grad is None or not weight.grad.any() for weight in small.parameters())
    assert found.sums["correct_S"].sum() == 0 and found.sums["scored_S"].sum() > 0
    assert found.sums["accept"] == found.sums["blocks"]  # the target's own token, and nothing accepted


@every_case
def test_teacher_forced_logits_are_the_whole_drafts_and_no_other_id_has_any(case):
    small, whole = reduced(case)
    cell = cell_of(30)
    blocks = lay_blocks(cell, torch.tensor([4, 11, 20]), small.config)
    with torch.no_grad():
        hidden = small.hidden(cell, blocks)
        found, wanted = (draft.logits(hidden, blocks.prev_NS) for draft in (small, whole))
    outside = torch.ones(V).bool().index_fill(0, IDS, False)
    assert found.keys() == wanted.keys()
    for kind, logits in found.items():
        assert_near(logits[..., IDS], wanted[kind][..., IDS], 1e-5)
        assert bool((logits[..., outside] == -torch.inf).all())


def ask(draft, seed=1, **options):
    features_KTD = torch.randn(3, 6, draft.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    request = BlockRequest(features_KTD, 10, 6, draft.new_kv())  # an anchor that the draft itself cannot propose
    return draft.propose([request], **options)[0]


@every_case
def test_every_proposal_is_an_id_of_the_vocabulary_and_its_probabilities_are_over_the_targets_ids(case):
    small, whole = reduced(case)

    greedy = [ask(small, seed).ids_P.tolist() for seed in range(8)]
    assert greedy == [ask(ruled_out(whole), seed).ids_P.tolist() for seed in range(8)]  # after the target's ids
    chosen = {index for ids in greedy for index in ids}
    sampled = ask(small, sampling=Sampling(1.0, [torch.Generator().manual_seed(0)]))
    assert chosen | set(sampled.ids_P.tolist()) <= set(IDS.tolist()) and len(chosen) > 2
    assert sampled.q_PV.shape == (len(sampled.ids_P), V)
    torch.testing.assert_close(sampled.q_PV.sum(-1), torch.ones(len(sampled.ids_P)))
    outside = torch.ones(V).bool().index_fill(0, IDS, False)
    assert not sampled.q_PV[:, outside].any()


def test_a_block_is_cut_by_the_confidence_after_the_targets_ids():
    small, whole = reduced("dspark vanilla")
    with torch.no_grad():
        for draft in (small, whole):
            draft.confidence_head.proj.weight *= 0.1
    thresholds = np.linspace(0.05, 0.95, 19)
    found = [len(ask(small, threshold=float(threshold)).ids_P) for threshold in thresholds]

    assert found == [len(ask(ruled_out(whole), threshold=float(threshold)).ids_P) for threshold in thresholds]
    assert len(set(found)) > 1


@pytest.mark.parametrize("vocabulary", [V, V + 1])
@every_case
def test_a_vocabulary_that_is_no_smaller_than_the_targets_is_refused(case, vocabulary):
    method, shift, options = CASES[case]
    with pytest.raises(UsageError, match="leave it out to propose all"):
        draft_config(**fields(method, shift, vocabulary=vocabulary, **options))


@pytest.mark.parametrize("method", [name for name, draft in DRAFTS.items() if not draft.reduces_vocabulary])
def test_a_method_without_a_place_for_it_refuses_a_vocabulary_by_name(method):
    with pytest.raises(UsageError, match=f"vocabulary = 8 means nothing to {method}"):
        draft_config(**fields(method, True, vocabulary=8))
