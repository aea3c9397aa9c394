"""Objectives: each is its formula, its gradient is autograd's, and no chunk or kind of logits changes that."""

import pytest
import torch
from draft_cases import LargestTensor, all_blocks, build, cell_of, gradients, head_loss, loss_of

from pipeline.drafts import metrics_of, objectives
from pipeline.drafts.blocks import dpace_weights
from pipeline.drafts.head_loss import ChunkMemory
from pipeline.drafts.objectives import OBJECTIVES, Objective, TargetStates
from pipeline.errors import DataError
from pipeline.target.head import TargetHead

N, S, D, V, U, F = 6, 3, 5, 11, 4, 20
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
soft_objectives = pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "ce"])


def values_of(name: str, logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each term [N, S] by its definition, over whole distributions."""
    log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    ce = -log_q.gather(-1, labels[..., None])[..., 0]
    kl, accept = (p * (log_p - log_q)).sum(-1), torch.minimum(p, q).sum(-1)
    share = torch.exp(-3 * accept.detach())
    return {
        "ce": {"": ce},
        "kl": {"": kl},
        "tv": {"": 0.5 * (q - p).abs().sum(-1)},
        "lk-alpha": {"": -accept.log()},
        "lk-hybrid": {"": share * kl + (1 - share) * (1 - accept)},
        "dspark": {"ce": ce, "l1": (q - p).abs().sum(-1)},
    }[name]


class Problem:
    """Two kinds of logits of a few slots, and the final states they learn from."""

    def __init__(self, name: str, softcap: float | None = None, kinds=("final", "base"), dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.leaves = draw(N, S, D), draw(N, S, U), draw(V, U)
        self.target = TargetHead(draw(V, D), draw(V, D), logit_softcap=softcap)
        self.labels = torch.randint(0, V, (N, S), generator=generator)
        self.weights = torch.rand(N, S, generator=generator) * (torch.rand(N, S, generator=generator) > 0.3)
        self.teacher = TargetStates(draw(F, D), torch.randint(0, F, (N, S), generator=generator))
        self.name = name
        self.scales = {kind: {part: 0.3 + 0.2 * at for at, part in enumerate(OBJECTIVES[name])} for kind in kinds}
        self.scales["final"] = {part: 2 * scale for part, scale in self.scales["final"].items()}

    def objective(self, weigh=None, **options) -> Objective:
        weigh = weigh or (lambda part, ce_NS: self.weights[part])
        return Objective(self.labels, weigh, self.scales, self.name, self.teacher, **options)

    def fused(self, *leaves, blocks: int = 4, objective: Objective | None = None):
        return head_loss(leaves[0], self.target, objective or self.objective(), tuple(leaves[1:]) or None, blocks)

    def plain(self, *leaves, weights=None):
        weights = self.weights if weights is None else weights
        raw = leaves[0] @ self.target.head_VD.T
        logits = {"base": raw, "final": raw + leaves[1] @ leaves[2].T if leaves[1:] else raw}
        teacher, total = self.target.logits(self.teacher.final_FD[self.teacher.at_NS]), 0
        for kind, parts in self.scales.items():
            values = values_of(self.name, self.target.cap(logits[kind]), teacher, self.labels)
            total = total + sum(scale * (weights * values[part]).sum() for part, scale in parts.items())
        return total


def with_gradients(function, leaves):
    fresh = [leaf.clone().requires_grad_() for leaf in leaves]
    value = function(*fresh)
    return value.detach(), torch.autograd.grad(value, fresh)


@every_objective
@pytest.mark.parametrize("blocks", [1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kinds", [("final", "base"), ("final",)])
def test_value_and_gradient_are_those_of_the_formula_under_autograd(name, softcap, kinds, blocks):
    problem = Problem(name, softcap, kinds)
    for leaves in (problem.leaves, problem.leaves[:1]):
        found, found_grads = with_gradients(lambda *given: problem.fused(*given, blocks=blocks), leaves)
        wanted, wanted_grads = with_gradients(problem.plain, leaves)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
        for ours, theirs in zip(found_grads, wanted_grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "lk-hybrid"])  # whose share has no gradient
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(name, softcap):
    problem = Problem(name, softcap)
    assert torch.autograd.gradcheck(problem.fused, [leaf.clone().requires_grad_() for leaf in problem.leaves])


@every_objective
@pytest.mark.parametrize("kind", ["dpace", "dpace-cumulative-confidence-only", "dpace-continuation-value-only"])
def test_weights_by_confidence_are_constants_for_every_objective_and_each_kind_has_its_own(name, kind):
    problem, scored = Problem(name), torch.rand(N, S, generator=torch.Generator().manual_seed(1)) > 0.2
    frozen = []

    def weigh(part, ce_NS):
        frozen.append(dpace_weights(ce_NS, scored[part], 0.5, kind))
        return frozen[-1]

    found, grads = with_gradients(
        lambda *given: problem.fused(*given, objective=problem.objective(weigh)), problem.leaves
    )
    base, final = torch.cat(frozen[::2]), torch.cat(frozen[1::2])
    assert not torch.allclose(base, final)

    def plain(*leaves):
        both, total = problem.scales, 0
        for which, weights in (("base", base), ("final", final)):
            problem.scales = {which: both[which]}
            total = total + problem.plain(*leaves, weights=weights)
        problem.scales = both
        return total

    wanted, wanted_grads = with_gradients(plain, problem.leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sure", [30.0, 12.0, 0.0])
@pytest.mark.parametrize("wrong", [0.0, 25.0])
@soft_objectives
def test_float32_keeps_the_gradient_of_a_draft_that_knows_nothing_or_is_sure_of_another_token(name, wrong, sure):
    """Such a draft is kept with probability 1e-5 or 1e-11: a sum of signs would cancel there."""
    v = 50_000
    logits = 0.1 * torch.randn(1, 1, v, generator=torch.Generator().manual_seed(0))
    logits[..., 3] = wrong
    teacher = torch.zeros(1, 1, v)
    teacher[..., 7] = sure
    exact = logits.double().requires_grad_()
    values = values_of(name, exact, teacher.double(), torch.tensor([[7]]))
    wanted = torch.autograd.grad(sum(value.sum() for value in values.values()), exact)[0]

    objective = every_slot(name, torch.tensor([[7]]), TargetStates(teacher[0], torch.zeros(1, 1, dtype=torch.long)))
    found = gradient_of(objective, logits, teacher)
    assert (found.double() - wanted).norm() < 1e-3 * wanted.norm()


def every_slot(name: str, labels: torch.Tensor, teacher: TargetStates, kinds=("final",), **options) -> Objective:
    """All weights and scales 1."""
    scales = {kind: dict.fromkeys(OBJECTIVES[name], 1.0) for kind in kinds}
    return Objective(labels, lambda part, ce_NS: torch.ones_like(ce_NS), scales, name, teacher, **options)


def gradient_of(objective: Objective, logits_NSV: torch.Tensor, teacher_NSV: torch.Tensor | None = None):
    """The gradient of all blocks' final logits. The target's are made of its states by a head that passes them on."""

    class Same:
        logits = staticmethod(lambda states: teacher_NSV)

    whole, memory = slice(0, len(logits_NSV)), ChunkMemory(logits_NSV.shape[:-1].numel(), logits_NSV)
    soft = None if teacher_NSV is None else objective.soft_labels(whole, Same(), memory)
    gradient_NSV = logits_NSV.detach().clone()  # which overwrites the logits
    measured = objective.measure("final", whole, gradient_NSV, memory, soft)
    objective.add_chunk("final", whole, gradient_NSV, measured, memory, soft)
    return gradient_NSV


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_compiled_form_of_cross_entropy_is_the_same(softcap, monkeypatch):
    problem = Problem("ce", softcap)
    wanted, wanted_grads = with_gradients(problem.fused, problem.leaves)
    monkeypatch.setattr(objectives, "compiles", lambda device: True)
    found, grads = with_gradients(problem.fused, problem.leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["ce", "dspark"])
def test_a_token_that_the_draft_holds_impossible_still_has_a_loss(name):
    logits = torch.full((1, 1, V), -500.0)
    logits[..., 0] = 0.0
    teacher = TargetStates(torch.randn(1, D), torch.zeros(1, 1, dtype=torch.long))
    objective = every_slot(name, torch.tensor([[7]]), teacher)
    gradient_of(objective, logits, torch.zeros(1, 1, V) if name == "dspark" else None)
    assert float(objective.slot_values()["ce"]) == 500.0


def test_identical_distributions_cost_nothing_and_pull_nowhere():
    for name in ("kl", "tv", "lk-alpha", "lk-hybrid"):
        problem = Problem(name, kinds=("final",))
        hidden = problem.teacher.final_FD[problem.teacher.at_NS]
        total, (gradient,) = with_gradients(problem.fused, [hidden])
        assert abs(float(total)) < 1e-12 and float(gradient.abs().max()) < 1e-12, name


def test_a_target_that_is_certain_makes_lk_alpha_the_cross_entropy():
    sure, hard = Problem("lk-alpha", kinds=("final",)), Problem("ce", kinds=("final",))
    logits = torch.full((1, N, S, V), -1e4, dtype=torch.float64)[0].scatter(-1, sure.labels[..., None], 1e4)
    draft = torch.randn(N, S, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    soft, hard = sure.objective(), hard.objective()
    found, wanted = gradient_of(soft, draft, logits), gradient_of(hard, draft)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(soft.numerators["final"], hard.numerators["final"])


@soft_objectives
def test_neither_the_draft_s_nor_the_teacher_s_logits_of_all_tokens_ever_exist(name):
    generator = torch.Generator().manual_seed(0)
    n, v = 40, 1000
    hidden = torch.randn(n, S, D, generator=generator, requires_grad=True)
    z, out = (torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((n, S, U), (v, U)))
    head = torch.randn(v, D, generator=generator)
    teacher = TargetStates(torch.randn(F, D, generator=generator), torch.randint(0, F, (n, S), generator=generator))
    labels = torch.zeros(n, S, dtype=torch.long)
    objective = every_slot(name, labels, teacher, ("base", "final"), record_accept=True, metrics=True)
    with LargestTensor() as largest:
        head_loss(hidden, TargetHead(head, head), objective, (z, out), blocks=2).backward()
    assert largest.elements == max(2 * S * v, v * D)


@every_objective
def test_softmaxes_are_float32_whatever_the_arithmetic(name):
    narrow, wide = (Problem(name, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    wide.leaves = [leaf.float() for leaf in narrow.leaves]
    wide.target = narrow.target.to(dtype=torch.float32)
    wide.teacher = TargetStates(narrow.teacher.final_FD.float(), narrow.teacher.at_NS)
    found, grads = with_gradients(narrow.fused, narrow.leaves)
    wanted, wide_grads = with_gradients(wide.fused, wide.leaves)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_grads = with_gradients(wide.fused, wide.leaves)
    for total, those in ((found, grads), (cast, cast_grads)):
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, wanted, rtol=2e-2, atol=0)
        for ours, theirs in zip(those, wide_grads, strict=True):
            assert (ours.float() - theirs).norm() < 4e-2 * theirs.norm()


# In whole drafts


METHODS = {"dflash": {}, "domino": {}, "dspark": {"enable_confidence_head": True}}
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
@soft_objectives
def test_every_method_learns_every_objective(method, name):
    draft, cell = build(method, objective=name), cell_of(30, 12)
    blocks = all_blocks(draft, cell)
    loss = loss_of(draft, cell, blocks, 0.4, metrics=True)
    with torch.no_grad():
        logits = draft.logits(draft.hidden(cell, blocks), blocks.prev_NS)
        teacher = draft.target.logits(cell.final_FD[cell.final_at_R[blocks.final_row_NS]])
    kinds = {"final": 0.6, "base": 0.4} if method == "domino" else {"final": 1.0}
    alphas = {"ce": 0.1, "l1": 0.9, "": 1.0}
    total = 0
    for kind, share in kinds.items():
        for part, values in values_of(name, logits[kind], teacher, blocks.labels_NS).items():
            key = part if kind == "final" and part else f"{kind}_{part}" if part else kind
            numerator = (values * blocks.weights_NS).sum()
            torch.testing.assert_close(loss.terms[key], numerator, rtol=1e-5, atol=0)
            total += share * alphas[part] * numerator / blocks.weights_NS.sum()
    if method == "dspark":
        total += loss.terms["confidence"] / blocks.weights_NS.sum()
    torch.testing.assert_close(loss.total.float(), total, rtol=1e-5, atol=0)
    figures = metrics_of(loss.sums, loss.terms, draft.denominators(blocks))
    accept = torch.minimum(logits["final"].softmax(-1), teacher.softmax(-1)).sum(-1)
    assert figures["accept_prob"] == pytest.approx(float(accept[blocks.scored_NS].mean()), rel=1e-5)
    agree = (logits["final"].argmax(-1) == teacher.argmax(-1))[blocks.scored_NS]
    assert figures["teacher_agreement"] == pytest.approx(float(agree.float().mean()))
    assert 1 <= figures["tau_probabilistic"] <= 1 + draft.config.proposals
    for gradient in gradients(draft, loss.total).values():
        assert bool(gradient.isfinite().all()) and bool(gradient.any())


@every_method
@pytest.mark.parametrize("kind", ["dpace", "dpace-continuation-value-only"])
@pytest.mark.parametrize("name", ["ce", "lk-hybrid"])
def test_every_method_may_weigh_by_confidence(method, kind, name):
    draft, cell = build(method, weighting=kind, objective=name), cell_of(30, 12)
    blocks = all_blocks(draft, cell)
    assert {float(den) for den in draft.denominators(blocks).values()} == {2.0}  # samples
    loss = loss_of(draft, cell, blocks, 0.4)
    parts = [draft.loss(cell, part, {"lambda_base": 0.4}, draft.denominators(blocks)) for part in blocks.split(7)]
    torch.testing.assert_close(sum(part.total for part in parts), loss.total, rtol=1e-6, atol=0)
    found = gradients(draft, loss.total)
    wanted = gradients(
        draft, sum(draft.loss(cell, p, {"lambda_base": 0.4}, draft.denominators(blocks)).total for p in blocks.split(7))
    )
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= 1e-5 * gradient.norm(), key


def test_only_soft_targets_need_the_teacher():
    def needs(method, **options):
        return build(method, **options).config.needs_final_states

    assert not needs("dflash") and not needs("domino") and needs("dspark")
    assert needs("dflash", objective="kl") and needs("domino", objective="dspark")
    assert not needs("dspark", objective="ce")
    assert needs("dspark", objective="ce", enable_confidence_head=True)
    assert not needs("domino", objective="dspark", alpha_l1=0.0)


@every_method
def test_a_cell_without_final_states_is_refused_and_plain_cross_entropy_does_not_ask(method):
    cell = cell_of(30, 12)
    bare = type(cell)(**(vars(cell) | {"final_FD": None, "final_at_R": None}))
    soft, hard = build(method, objective="kl"), build(method, objective="ce")
    with pytest.raises(DataError, match="final"):
        loss_of(soft, bare, all_blocks(soft, bare))
    blocks = all_blocks(hard, bare)
    assert torch.equal(loss_of(hard, bare, blocks).total, loss_of(hard, cell, blocks).total)


@every_method
def test_a_missing_teacher_is_refused_when_blocks_are_laid_and_never_taken_for_zero(method):
    draft, cell = build(method, objective="kl"), cell_of(30, 12)
    blocks = all_blocks(draft, cell)
    row = int(blocks.final_row_NS[blocks.scored_NS][3])
    lost = cell.final_at_R.clone()
    lost[row] = -1
    damaged = type(cell)(**(vars(cell) | {"final_at_R": lost}))
    with pytest.raises(DataError, match=rf"s0 keeps no final state of row {row}\b"):
        all_blocks(draft, damaged)
    assert bool(loss_of(draft, damaged, blocks).total.isnan())


def test_the_teacher_of_a_label_is_the_row_before_it():
    for method, shift in (("dflash", False), ("dflash", True), ("dspark", True)):
        draft, cell = build(method, shift), cell_of(30, 12)
        blocks = all_blocks(draft, cell)
        assert torch.equal(cell.ids_R[blocks.final_row_NS + 1][blocks.scored_NS], blocks.labels_NS[blocks.scored_NS])
        assert not blocks.final_row_NS[~blocks.scored_NS].any()
