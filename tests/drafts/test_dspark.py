"""DSpark: its heads by their equations, its loss by dense autograd, its blocks cut where it is not sure."""

import pytest
import torch
import torch.nn.functional as F
from draft_cases import H, V, all_blocks, assert_near, build, cell_of, dense_hidden, forced_logits, gradients, loss_of

from pipeline.drafts import BlockRequest, Sampling, init_weights, lay_blocks, metrics_of
from pipeline.errors import UsageError

KINDS = ("vanilla", "gated", "rnn")
every_kind = pytest.mark.parametrize("kind", KINDS)
both_inputs = pytest.mark.parametrize("with_markov", [False, True], ids=["hidden", "hidden+markov"])
RANK = 8


def dspark(kind: str = "vanilla", **options):
    return build("dspark", markov_head_type=kind, **options)


def states_of(draft, cell):
    blocks = all_blocks(draft, cell)
    return blocks, draft.hidden(cell, blocks)


# Heads


@every_kind
def test_the_markov_head_is_its_equations(kind):
    draft, cell = dspark(kind), cell_of(30)
    head = draft.markov_head
    with torch.no_grad():
        blocks, hidden = states_of(draft, cell)
        found = draft.logits(hidden, blocks.prev_NS)
        for n in (0, 4):
            state = torch.zeros(RANK)
            for k in range(5):
                h, e = hidden[n, k], head.markov_w1.weight[blocks.prev_NS[n, k]]
                if kind == "vanilla":
                    z = e
                elif kind == "gated":
                    z = torch.sigmoid(head.gate_proj.weight @ torch.cat([h, e]) + head.gate_proj.bias) * e
                else:
                    joint = head.joint_proj.weight @ torch.cat([state, e, h]) + head.joint_proj.bias
                    keep, new, out = joint.chunk(3)
                    z = torch.tanh(out)
                    state = torch.sigmoid(keep) * state + (1 - torch.sigmoid(keep)) * torch.tanh(new)
                wanted = draft.target.head_VD @ h + head.markov_w2.weight @ z
                assert_near(found["final"][n, k], wanted, 1e-5)
                assert_near(found["base"][n, k], draft.target.head_VD @ h, 1e-5)


@every_kind
def test_parameters_are_the_published_ones(kind):
    names = {"markov_w1.weight": (V, RANK), "markov_w2.weight": (V, RANK)}
    if kind == "gated":
        names |= {"gate_proj.weight": (RANK, H + RANK), "gate_proj.bias": (RANK,)}
    if kind == "rnn":
        names |= {"joint_proj.weight": (3 * RANK, 2 * RANK + H), "joint_proj.bias": (3 * RANK,)}
    wanted = {f"markov_head.{name}": shape for name, shape in names.items()}
    for options, width in (({}, H), ({"confidence_head_with_markov": True}, H + RANK)):
        heads = wanted | {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
        state = dspark(kind, **options).state_dict()
        assert {name: tuple(w.shape) for name, w in state.items() if name.startswith(("markov", "conf"))} == heads
    assert not any(name.startswith("conf") for name in dspark(kind, enable_confidence_head=False).state_dict())


def test_weights_start_as_published():
    draft = dspark("rnn", markov_rank=64)
    init_weights(draft, 0)
    for name in ("markov_w1", "markov_w2", "joint_proj"):
        weight = getattr(draft.markov_head, name).weight
        assert (
            float(weight.detach().std()) == pytest.approx(0.02, rel=0.1) and abs(float(weight.detach().mean())) < 2e-3
        )
    assert not draft.markov_head.joint_proj.bias.any() and not draft.confidence_head.proj.bias.any()


@every_kind
def test_teacher_forced_logits_are_those_of_the_rollout_fed_the_same_tokens(kind):
    draft, cell = dspark(kind), cell_of(30)
    anchors = torch.tensor([4, 11, 20])
    blocks = lay_blocks(cell, anchors, draft.config)
    with torch.no_grad():
        hidden = draft.hidden(cell, blocks)
        rolled = forced_logits(draft, hidden, cell.ids_R[anchors[:, None] + torch.arange(6)])
        assert_near(rolled, draft.logits(hidden, blocks.prev_NS)["final"], 1e-5)
        own = draft.rollout(hidden, cell.ids_R[anchors])
        prev = torch.cat([cell.ids_R[anchors][:, None], own[:, :-1]], dim=1)
        assert torch.equal(draft.logits(hidden, prev)["final"].argmax(-1), own)
    assert own.shape == (3, 5)  # a token for every slot, the anchor's own included


# Loss


def dense(draft, cell, blocks) -> torch.Tensor:
    """The published loss over whole logits, by autograd (SpecForge and DeepSpec: one weight sum for all terms)."""
    config, weights, labels = draft.config, blocks.weights_NS.double(), blocks.labels_NS
    hidden = dense_hidden(draft, cell, blocks)
    z, out = draft.correction(hidden, blocks.prev_NS)
    q = draft.target.cap(hidden @ draft.target.head_VD.T + z @ out.T).softmax(-1)
    p = draft.target.logits(cell.final_FD[cell.final_at_R[blocks.final_row_NS].clamp(min=0)]).softmax(-1)
    ce, l1 = -q.gather(-1, labels[..., None])[..., 0].log(), (q - p).abs().sum(-1)
    features = hidden
    if config.confidence_head_with_markov:
        features = torch.cat([hidden, draft.markov_head.markov_w1(blocks.prev_NS)], dim=-1)
    logits = draft.confidence_head.proj(features)[..., 0]
    kept = (1 - l1.detach() / 2).clamp(0, 1)
    bce = F.binary_cross_entropy_with_logits(logits, kept, reduction="none")
    terms = config.alpha_ce * ce + config.alpha_l1 * l1 + config.alpha_confidence * bce
    return (weights * terms).sum() / weights.sum()


@every_kind
@both_inputs
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_loss_and_every_gradient_are_those_of_dense_autograd(kind, with_markov, softcap):
    options = {"confidence_head_with_markov": with_markov, "alpha_ce": 0.2, "alpha_l1": 0.7, "alpha_confidence": 1.3}
    draft = dspark(kind, softcap=softcap, **options).double()
    draft.target = draft.target.to(dtype=torch.float64)
    cell = cell_of(30, 12)
    cell = type(cell)(**(vars(cell) | {"final_FD": cell.final_FD.double()}))
    blocks = all_blocks(draft, cell)
    loss, wanted = loss_of(draft, cell, blocks), dense(draft, cell, blocks)
    assert loss.terms.keys() == {"ce", "l1", "confidence"} == draft.denominators(blocks).keys()
    torch.testing.assert_close(loss.total, wanted, rtol=1e-9, atol=0)
    found = gradients(draft, loss.total)
    for name, gradient in gradients(draft, wanted).items():
        assert (found[name] - gradient).norm() <= 1e-7 * gradient.norm(), name  # attention's tables are float32
        assert bool(gradient.any()), name


@both_inputs
def test_the_confidence_s_gradient_reaches_what_it_reads_and_no_more(with_markov):
    cell, found = cell_of(30), []
    for alpha in (1.0, 3.0):
        draft = dspark(alpha_confidence=alpha, confidence_head_with_markov=with_markov)
        found.append(gradients(draft, loss_of(draft, cell, all_blocks(draft, cell)).total))
    moved = {name for name, gradient in found[0].items() if not torch.allclose(gradient, found[1][name], rtol=1e-4)}
    assert "fc.weight" in moved and "confidence_head.proj.weight" in moved
    assert ("markov_head.markov_w1.weight" in moved) == with_markov
    assert "markov_head.markov_w2.weight" not in moved  # what it learns is a constant


def test_the_confidence_s_error_is_logged_by_the_loss_s_weights():
    draft, cell = dspark(), cell_of(30, 12)
    with torch.no_grad():
        blocks, hidden = states_of(draft, cell)
        loss = loss_of(draft, cell, blocks, metrics=True)
        sure = draft.confidence(hidden, blocks.prev_NS).sigmoid()
        teacher = draft.target.logits(cell.final_FD[cell.final_at_R[blocks.final_row_NS]]).softmax(-1)
        kept = torch.minimum(draft.logits(hidden, blocks.prev_NS)["final"].softmax(-1), teacher).sum(-1)
    weights = blocks.weights_NS
    figures = metrics_of(loss.sums, loss.terms, draft.denominators(blocks))
    wanted = float(((sure - kept).abs() * weights).sum() / weights.sum())
    assert figures["confidence_abs_error"] == pytest.approx(wanted, rel=1e-5)
    assert {"ce_loss", "l1_loss", "confidence_loss", "slot_ce", "accuracy", "accept_len_tf"} <= figures.keys()
    reach = torch.where(blocks.scored_NS, kept, 1.0).cumprod(-1) * blocks.scored_NS
    wanted = 1 + float(reach.sum() / blocks.scored_NS.any(-1).sum())
    assert figures["tau_probabilistic"] == pytest.approx(wanted, rel=1e-5)


def test_a_confidence_head_learns_beside_plain_cross_entropy_too():
    draft, cell = dspark(objective="ce", enable_confidence_head=True), cell_of(30)
    blocks = all_blocks(draft, cell)
    loss = loss_of(draft, cell, blocks)
    assert loss.terms.keys() == {"final", "confidence"}
    assert all(bool(gradient.any()) for gradient in gradients(draft, loss.total).values())


# Decoding


def unsure(**options):
    """A draft whose confidences lie around a half."""
    draft = dspark("rnn", **options)
    with torch.no_grad():
        draft.confidence_head.proj.weight *= 0.3
    return draft


def request(draft, cell, anchor: int):
    return BlockRequest(cell.aux_KRD[:, :anchor], int(cell.ids_R[anchor]), anchor, draft.new_kv())


def proposed(draft, cell, anchor: int, **options):
    return draft.propose([request(draft, cell, anchor)], **options)[0]


@both_inputs
def test_a_block_is_cut_before_the_first_token_it_is_not_sure_of(with_markov):
    draft, cell = unsure(confidence_head_with_markov=with_markov), cell_of(30)
    cuts = set()
    for anchor in range(3, 25):
        whole = proposed(draft, cell, anchor).ids_P
        hidden = draft.block_hidden([request(draft, cell, anchor)])
        prev = torch.cat([cell.ids_R[anchor : anchor + 1], whole[:-1]])
        with torch.no_grad():
            sure = draft.confidence(hidden, prev[None])[0].sigmoid()
        for threshold in (0.0, 2.0, *(sure + 1e-4).tolist()):
            wanted = next((k for k in range(5) if threshold > 0 and sure[k] < threshold), 5)
            found = proposed(draft, cell, anchor, threshold=threshold)
            assert torch.equal(found.ids_P, whole[:wanted]) and found.q_PV is None
            cuts.add(wanted)
    assert cuts == set(range(6)), "not every length came up"


def test_a_cut_block_says_what_its_tokens_were_drawn_from():
    draft, cell = unsure(confidence_head_with_markov=True), cell_of(30)
    lengths = set()
    for seed in range(12):
        sampling = Sampling(0.7, [torch.Generator().manual_seed(seed)])
        found = proposed(draft, cell, 9, sampling=sampling, threshold=0.4)
        assert found.q_PV.shape == (len(found.ids_P), V)
        lengths.add(len(found.ids_P))
    assert len(lengths) > 1


@pytest.mark.parametrize(
    "method, options", [("dflash", {}), ("domino", {}), ("dspark", {"enable_confidence_head": False})]
)
def test_a_draft_without_confidence_cannot_cut(method, options):
    draft, cell = build(method, **options), cell_of(30)
    with pytest.raises(UsageError, match=r"0\.5; leave the threshold out"):
        proposed(draft, cell, 9, threshold=0.5)
