"""Properties that every draft method keeps: what it sees, what it is called, and that training and decoding agree."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from draft_cases import (
    HEADS,
    SLIDING,
    H,
    K,
    Sample,
    V,
    all_blocks,
    assert_near,
    both_shifts,
    both_windows,
    build,
    cell_of,
    dense_hidden,
    every_convention,
    every_method,
    fields,
    forced_logits,
    gradients,
    loss_of,
)

from pipeline.drafts import (
    DRAFTS,
    BlockRequest,
    Draft,
    Sampling,
    draft_config,
    init_weights,
    lay_blocks,
    metrics_of,
    pack,
)
from pipeline.drafts.backbone import RMSNorm
from pipeline.drafts.fused import gated_down, rotate
from pipeline.drafts.rope import rope_tables
from pipeline.errors import UsageError
from pipeline.target.head import NEWEST, RULES, ChunkLimit, TargetHead

# What it is called


@every_method
def test_parameters_have_the_published_names(method):
    layer = ["input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    layer += [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    names = {"fc.weight", "hidden_norm.weight", "norm.weight"}
    names |= {f"layers.{index}.{name}.weight" for index in range(2) for name in layer}
    if method == "domino":
        names |= {"prefix_gru.weight_ih_l0", "prefix_gru.weight_hh_l0", "embed_proj.0.weight", "embed_proj.2.weight"}
    if method == "dspark":
        names |= {f"markov_head.{name}.weight" for name in ("markov_w1", "markov_w2", "joint_proj")}
        names |= {"markov_head.joint_proj.bias", "confidence_head.proj.weight", "confidence_head.proj.bias"}
    assert build(method).state_dict().keys() == names


def test_attention_biases_exist_only_if_asked_for():
    biases = {
        name.rpartition(".")[0][-6:] for name in build("dflash", attention_bias=True).state_dict() if "bias" in name
    }
    assert biases == {"q_proj", "k_proj", "v_proj", "o_proj"}


@every_method
def test_weights_start_as_published_and_by_seed_alone(method):
    first, again, other = (build(method) for _ in range(3))
    init_weights(first, 3), init_weights(again, 3), init_weights(other, 4)
    state = first.state_dict()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, state[name])
    assert not torch.equal(other.fc.weight, first.fc.weight)
    assert float(first.fc.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert bool((first.norm.weight == 1).all())
    if method == "domino":
        bound = 1 / 16**0.5
        assert 0.9 * bound < float(first.prefix_gru.weight_ih_l0.detach().abs().max()) <= bound
        assert float(first.embed_proj[2].weight.detach().std()) == pytest.approx(
            0.02, rel=0.2
        )  # not zero: final != base at first


def test_a_head_of_another_target_is_refused():
    with pytest.raises(UsageError, match="vocabulary 64 and width 32, the target's head 60 and 32"):
        DRAFTS["dflash"](draft_config(**fields("dflash")), TargetHead(torch.zeros(60, H), torch.zeros(60, H)))


# What it sees


@every_method
@both_windows
def test_grouped_attention_equals_the_dense_mask(method, window):
    draft, cell = build(method, attention_bias=True, **window).double(), cell_of(23, 9, 60)
    blocks = all_blocks(draft, cell)
    assert len(blocks.groups) > 3, "a document should have more than one group"
    weights = torch.randn(*blocks.labels_NS.shape, H, dtype=torch.float64)
    draft.target = draft.target.to(dtype=torch.float64)
    grouped, dense = draft.hidden(cell, blocks), dense_hidden(draft, cell, blocks)
    assert_near(grouped, dense)
    used = {name for name, p in draft.named_parameters() if not name.startswith(HEADS)}
    ours = dict(zip(sorted(used), torch.autograd.grad((grouped * weights).sum(), by_name(draft, used)), strict=True))
    theirs = dict(zip(sorted(used), torch.autograd.grad((dense * weights).sum(), by_name(draft, used)), strict=True))
    for name in used:
        assert_near(ours[name], theirs[name])


def by_name(draft: Draft, names: set[str]) -> list[torch.Tensor]:
    parameters = dict(draft.named_parameters())
    return [parameters[name] for name in sorted(names)]


@both_windows
def test_grouped_attention_equals_the_dense_mask_in_float32(window):
    draft, cell = build("dflash", **window), cell_of(23, 9, 40)
    blocks = all_blocks(draft, cell)
    with torch.no_grad():
        assert_near(draft.hidden(cell, blocks), dense_hidden(draft, cell, blocks))


@every_method
@both_windows
def test_a_guess_does_not_change_when_the_anchor_or_later_rows_do(method, window):
    draft, cell = build(method, **window), cell_of(30)
    blocks = lay_blocks(cell, torch.tensor([12]), draft.config)
    changed = torch.cat([cell.aux_KRD[:, :12], torch.randn(K, 18, H)], dim=1)
    nearer = cell.aux_KRD.clone()
    nearer[:, 11] += 1
    with torch.no_grad():
        before = draft.hidden(cell, blocks)
        assert torch.equal(draft.hidden(_with(cell, changed), blocks), before)
        assert not torch.allclose(draft.hidden(_with(cell, nearer), blocks), before)


def _with(cell, aux_KRD):
    return replace(cell, aux_KRD=aux_KRD)


@every_method
def test_a_block_is_the_same_alone_and_among_others(method):
    draft, cell = build(method), cell_of(30, 12)
    blocks = all_blocks(draft, cell)
    with torch.no_grad():
        together = draft.hidden(cell, blocks)
        for n in (0, 7, len(together) - 1):
            alone = lay_blocks(cell, blocks.anchors_N[n : n + 1], draft.config)
            assert_near(together[n : n + 1], draft.hidden(cell, alone), 1e-5)


@every_method
def test_a_block_without_context_makes_no_nan(method):
    draft, cell = build(method, **SLIDING), cell_of(20, 11)
    blocks = lay_blocks(cell, torch.tensor([0, 20]), draft.config)
    with torch.no_grad():
        assert draft.hidden(cell, blocks).isfinite().all()


# Training and decoding agree


@every_convention
@both_windows
def test_the_training_layout_is_the_decode_loop(method, shift, window):
    draft, cell = build(method, shift, **window), cell_of(40)
    anchors = torch.tensor([3, 4, 9, 17, 30])
    blocks = lay_blocks(cell, anchors, draft.config)
    with torch.no_grad():
        training = draft.hidden(cell, blocks)
        proposals = draft.rollout(training, cell.ids_R[anchors])
    kv, other, held = draft.new_kv(), draft.new_kv(), 0
    for n, anchor in enumerate(anchors.tolist()):  # features arrive as verifications leave them, in pieces
        fresh = cell.aux_KRD[:, held:anchor]
        request = BlockRequest(fresh, int(cell.ids_R[anchor]), anchor, kv)
        assert_near(draft.block_hidden([request])[0], training[n], 1e-5)
        assert torch.equal(draft.propose([replace(request, kv=other)])[0].ids_P, proposals[n])
        held = anchor
    assert proposals.shape == (5, draft.config.proposals) == (5, 5 if shift else 4)


@every_convention
def test_a_drawn_proposal_says_what_each_token_was_drawn_from(method, shift):
    draft, cell, anchor = build(method, shift, softcap=4.0), cell_of(40), 17

    def request():
        return BlockRequest(cell.aux_KRD[:, :anchor], int(cell.ids_R[anchor]), anchor, draft.new_kv())

    def drawn(seed):
        return draft.propose([request()], Sampling(0.7, [torch.Generator().manual_seed(seed)]))[0]

    found, again = drawn(0), drawn(0)
    assert torch.equal(found.ids_P, again.ids_P) and torch.equal(found.q_PV, again.q_PV)
    assert len({tuple(drawn(seed).ids_P.tolist()) for seed in range(8)}) > 4
    anchors = cell.ids_R[anchor : anchor + 1]
    prev_NS = torch.cat([anchors, found.ids_P, found.ids_P[:1]])[None, : draft.config.block_size]
    with torch.no_grad():
        logits = draft.logits(draft.block_hidden([request()]), prev_NS)["final"][0, draft.config.first_slot :]
    assert_near(found.q_PV, (logits / 0.7).softmax(-1), 1e-5)


def test_features_of_another_place_are_a_bug():
    draft = build("dflash")
    with pytest.raises(AssertionError, match="kv holds 0 positions and 4 came, for an anchor at 5"):
        draft.propose([BlockRequest(torch.zeros(K, 4, H), 1, 5, draft.new_kv())])


@every_method
def test_proposals_do_not_depend_on_the_chunk(method, monkeypatch):
    draft, cell = build(method), cell_of(30, 12)
    blocks = all_blocks(draft, cell)
    with torch.no_grad():
        hidden, anchors = draft.hidden(cell, blocks), cell.ids_R[blocks.anchors_N]
        whole = draft.rollout(hidden, anchors)
        monkeypatch.setitem(RULES[NEWEST], "cpu", ChunkLimit(3 * 4 * 5 * V))
        assert torch.equal(draft.rollout(hidden, anchors), whole)


@both_shifts
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_teacher_forced_logits_are_those_of_the_rollout_fed_the_same_tokens(shift, prefix):
    draft, cell = build("domino", shift, pure_draft_prefix_len=prefix), cell_of(30)
    anchors = torch.tensor([4, 11, 20])
    blocks = lay_blocks(cell, anchors, draft.config)
    first, most = draft.config.first_slot, draft.config.proposals
    with torch.no_grad():
        hidden = draft.hidden(cell, blocks)
        forced = draft.logits(hidden, blocks.prev_NS)
        rolled = forced_logits(draft, hidden, cell.ids_R[anchors[:, None] + torch.arange(most + 1)])
        own, own_logits = draft.rollout_logits(hidden, cell.ids_R[anchors])
    assert_near(rolled, forced["final"][:, first:], 1e-5)
    assert torch.equal(own, own_logits.argmax(-1))
    corrected = (forced["final"] != forced["base"]).any(-1).any(0)
    assert corrected.tolist() == [k >= first + prefix for k in range(5)]


def test_the_rollout_reads_its_own_tokens():
    draft, cell = build("domino", pure_draft_prefix_len=0), cell_of(30)
    blocks = all_blocks(draft, cell)
    with torch.no_grad():
        hidden, anchors = draft.hidden(cell, blocks), cell.ids_R[blocks.anchors_N]
        own = draft.rollout(hidden, anchors)
        prev = torch.cat([anchors[:, None], own[:, :-1]], dim=1)
        assert torch.equal(draft.logits(hidden, prev)["final"].argmax(-1), own)
        assert not torch.equal(draft.logits(hidden, blocks.prev_NS)["final"].argmax(-1), own)


def test_the_gru_is_the_published_one():
    draft = build("domino")
    gru, e, state = draft.prefix_gru, torch.randn(4, H), torch.zeros(16)
    for step in e:
        reset_in, update_in, new_in = (gru.weight_ih_l0 @ step).chunk(3)
        reset_h, update_h, new_h = (gru.weight_hh_l0 @ state).chunk(3)
        update = torch.sigmoid(update_in + update_h)
        new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_h) * new_h)
        state = (1 - update) * new + update * state
    torch.testing.assert_close(gru(e[None])[0][0, -1], state)


def test_the_soft_cap_changes_no_proposal():
    plain, capped = build("domino"), build("domino", softcap=1.5)
    cell = cell_of(25)
    blocks = all_blocks(plain, cell)
    with torch.no_grad():
        hidden, anchors = plain.hidden(cell, blocks), cell.ids_R[blocks.anchors_N]
        logits = capped.logits(hidden, blocks.prev_NS)["final"]
        assert logits.abs().max() <= 1.5
        assert torch.equal(plain.rollout(hidden, anchors), capped.rollout(hidden, anchors))


# Losses


@every_convention
def test_the_loss_is_the_weighted_cross_entropy_of_its_logits(method, shift):
    draft, cell = build(method, shift, softcap=8.0, objective="ce"), cell_of(30, 12)
    blocks = all_blocks(draft, cell)
    with torch.no_grad():
        loss = loss_of(draft, replace(cell, final_FD=None, final_at_R=None), blocks, 0.4, metrics=True)
        logits = draft.logits(draft.hidden(cell, blocks), blocks.prev_NS)
    for kind, values in ((kind, logits[kind]) for kind in loss.terms):
        ce = F.cross_entropy(values.flatten(0, 1), blocks.labels_NS.flatten(), reduction="none")
        assert_near(loss.terms[kind], (ce * blocks.weights_NS.flatten()).sum(), 1e-5)
    share = {"final": 0.6, "base": 0.4} if method == "domino" else {"final": 1.0}
    wanted = sum(share[kind] * loss.terms[kind] for kind in share) / blocks.weights_NS.sum()
    assert_near(loss.total, wanted, 1e-5)
    figures = metrics_of(loss.sums, loss.terms, draft.denominators(blocks))
    right = (logits["final"].argmax(-1) == blocks.labels_NS) & blocks.scored_NS
    assert figures["accuracy"] == pytest.approx(float(right.sum() / blocks.scored_NS.sum()))
    assert 1 <= figures["accept_len_tf"] <= 1 + draft.config.proposals


@every_method
def test_cells_add_up_to_the_global_batch(method):
    draft, lengths = build(method), (30, 12, 21)
    whole = cell_of(*lengths)
    everything = all_blocks(draft, whole)
    dens = draft.denominators(everything)
    total = draft.loss(whole, everything, {"lambda_base": 0.3}, dens).total
    wanted = gradients(draft, total)
    parts = [pack([Sample(length, seed)], [f"s{seed}"], final=True) for seed, length in enumerate(lengths)]
    shares = [draft.loss(part, all_blocks(draft, part), {"lambda_base": 0.3}, dens).total for part in parts]
    found = gradients(draft, sum(shares))
    assert_near(sum(shares), total)
    for name, gradient in wanted.items():
        assert_near(found[name], gradient, 1e-5)


@every_method
def test_a_step_repeats_to_the_bit(method):
    draft, cell = build(method), cell_of(30, 12)
    blocks = all_blocks(draft, cell)
    first, second = (loss_of(draft, cell, blocks) for _ in range(2))
    assert torch.equal(first.total, second.total)
    again = gradients(draft, second.total)
    for name, gradient in gradients(draft, first.total).items():
        assert torch.equal(gradient, again[name]), name


def test_at_lambda_one_the_causal_head_gets_zero_gradients_and_not_none():
    draft, cell = build("domino"), cell_of(30)
    found = gradients(draft, loss_of(draft, cell, all_blocks(draft, cell), lambda_base=1.0).total)
    for name, gradient in found.items():
        assert bool(gradient.any()) == (not name.startswith(("prefix_gru", "embed_proj"))), name


@pytest.mark.parametrize("kind", ["dpace", "dpace-cumulative-confidence-only", "dpace-continuation-value-only"])
def test_dpace_divides_by_samples(kind):
    draft, cell = build("dflash", False, weighting=kind), cell_of(30, 12)
    blocks = all_blocks(draft, cell)
    assert float(draft.denominators(blocks)["final"]) == 2
    assert bool((blocks.weights_NS == blocks.scored_NS).all())  # gamma is ignored
    loss = loss_of(draft, cell, blocks)
    assert_near(loss.total, loss.terms["final"] / 2)
    assert float(loss.terms["final"]) != pytest.approx(
        float(loss_of(build("dflash", False), cell, blocks).terms["final"])
    )


# Lambda


def domino(start=1.0, decay=1.0):
    return build("domino", lambda_start=start, lambda_decay=decay)


def test_lambda_falls_as_published():
    whole, half = domino(decay=1.0), domino(decay=0.5)
    assert [whole.schedule(t, 1000)["lambda_base"] for t in (0, 250, 999)] == pytest.approx([1, 0.75, 0.001])
    assert [half.schedule(t, 1000)["lambda_base"] for t in (0, 250, 500, 999)] == pytest.approx([1, 0.5, 0, 0])
    assert domino(start=0.8).schedule(0, 1000)["lambda_base"] == 0.8
    assert domino(decay=0.0).schedule(1, 1000)["lambda_base"] == 0
    assert all(0 <= whole.schedule(t, 3)["lambda_base"] <= 1 for t in range(9))
    assert build("dflash").schedule(0, 1000) == {}


@pytest.mark.parametrize("total_steps", [None, 0])
def test_lambda_needs_the_number_of_steps(total_steps):
    with pytest.raises(UsageError, match=r"train\.steps"):
        domino().schedule(0, total_steps)


# Positions


def test_rope_tables_stay_exact_in_a_bfloat16_draft():
    draft = build("dflash").to(torch.bfloat16)
    positions = torch.tensor([0, 1, 4097, 40000])
    exact = positions.double()[:, None] / 1e4 ** (torch.arange(0, 12, 2).double() / 12)
    cos, sin = draft.tables(positions)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(
        cos.double(), exact.cos(), rtol=0, atol=3e-3
    )  # float32 angles; bfloat16 ones are off by 1
    torch.testing.assert_close(sin.double(), exact.sin(), rtol=0, atol=3e-3)
    assert not list(draft.buffers())


@every_method
def test_a_bfloat16_draft_trains_and_stays_near_its_float32_twin(method):
    wide, narrow = build(method), build(method).to(torch.bfloat16)
    narrow.target = narrow.target.to(dtype=torch.bfloat16)
    cell = cell_of(30, 12)
    blocks = all_blocks(wide, cell)
    found, wanted = loss_of(narrow, cell, blocks), loss_of(wide, cell, blocks)
    assert float(found.total.detach()) == pytest.approx(float(wanted.total.detach()), rel=2e-2)
    for name, gradient in gradients(narrow, found.total).items():
        assert gradient.dtype == torch.bfloat16 and bool(gradient.isfinite().all()), name


def test_the_norm_is_qwen3s():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    x = torch.randn(5, 12, dtype=torch.bfloat16) * 30
    ours, theirs = (kind(12, 1e-6).to(torch.bfloat16) for kind in (RMSNorm, Qwen3RMSNorm))
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.linspace(0.3, 2, 12))
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("rotated", [False, True])
def test_gradients_of_norms_with_and_without_rotation(rotated):
    norm, tables = RMSNorm(6, 1e-6).double(), None
    if rotated:
        tables = tuple(table.double() for table in rope_tables(torch.arange(4), 6, 100.0))
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x, tables)), (draw(4, 2, 6), draw(6))
    )


def test_the_gated_product_and_its_gradient():
    given = gate, up, down = draw(4, 6), draw(4, 6), draw(3, 6)
    torch.testing.assert_close(gated_down(*given), (torch.nn.functional.silu(gate) * up) @ down.T)
    assert torch.autograd.gradcheck(gated_down, given)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_rotation_turns_halves_and_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 12)

    def score(at, other):
        tables = (rope_tables(torch.tensor([position]), 12, 1e4) for position in (at, other))
        return float((rotate(q, *next(tables)) * rotate(k, *next(tables))).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(3, 7), rel=1e-2)
    turned = rotate(torch.eye(12)[None, :1], *rope_tables(torch.tensor([1]), 12, 1e4))[0, 0]
    assert turned.nonzero().flatten().tolist() == [0, 6]  # the pair is (0, E / 2): NeoX, not neighbours
