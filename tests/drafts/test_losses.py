"""The fused head and loss: equal to plain autograd over whole logits, which it never holds."""

import pytest
import torch
import torch.nn.functional as F
from draft_cases import LargestTensor, head_loss

from pipeline.drafts.blocks import dpace_weights
from pipeline.drafts.objectives import Objective
from pipeline.target.head import TargetHead

N, S, D, V, U = 7, 3, 5, 11, 4


class Problem:
    """A small head loss with two kinds of logits; `corrected` False leaves the base ones alone."""

    def __init__(self, dtype=torch.float32, softcap: float | None = None, corrected: bool = True):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.z, self.out = draw(N, S, D), draw(N, S, U), draw(V, U)
        self.target = TargetHead(draw(V, D), draw(V, D), logit_softcap=softcap)
        self.labels = torch.randint(0, V, (N, S), generator=generator)
        self.weights = torch.rand(N, S, generator=generator) * (torch.rand(N, S, generator=generator) > 0.3)
        self.scales = {"final": {"": 0.3}, "base": {"": 0.7}} if corrected else {"final": {"": 0.4}}
        self.corrected = corrected

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return (self.hidden, self.z, self.out) if self.corrected else (self.hidden,)

    def fused(self, *leaves, blocks: int = 2, objective: Objective | None = None):
        hidden, correction = leaves[0], tuple(leaves[1:]) or None
        return head_loss(hidden, self.target, objective or self.objective(), correction, blocks)

    def objective(self, metrics: bool = False) -> Objective:
        return Objective(self.labels, lambda part, ce_NS: self.weights[part], self.scales, metrics=metrics)

    def plain(self, *leaves):
        logits = {"final": leaves[0] @ self.target.head_VD.T}
        if self.corrected:
            logits = {"base": logits["final"], "final": logits["final"] + leaves[1] @ leaves[2].T}
        total = 0
        for kind, raw in logits.items():
            ce = F.cross_entropy(self.target.cap(raw).flatten(0, 1), self.labels.flatten(), reduction="none")
            total = total + self.scales[kind][""] * (self.weights.flatten() * ce).sum()
        return total


def gradients(function, leaves):
    fresh = [leaf.clone().requires_grad_() for leaf in leaves]
    value = function(*fresh)
    return value.detach(), torch.autograd.grad(value, fresh)


@pytest.mark.parametrize("blocks", [1, 2, 7, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("corrected", [False, True])
def test_fused_equals_plain_autograd(corrected, softcap, blocks):
    problem = Problem(torch.float64, softcap, corrected)
    found, found_grads = gradients(lambda *leaves: problem.fused(*leaves, blocks=blocks), problem.leaves)
    wanted, wanted_grads = gradients(problem.plain, problem.leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=0)  # the weights are float32
    for ours, theirs in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("corrected", [False, True])
def test_gradcheck(corrected, softcap):
    problem = Problem(torch.float64, softcap, corrected)
    assert torch.autograd.gradcheck(problem.fused, [leaf.clone().requires_grad_() for leaf in problem.leaves])


def test_the_gradient_follows_what_is_done_with_the_loss():
    problem = Problem()
    _, once = gradients(problem.fused, problem.leaves)
    _, scaled = gradients(lambda *leaves: -3 * problem.fused(*leaves), problem.leaves)
    for one, other in zip(once, scaled, strict=True):
        torch.testing.assert_close(other, -3 * one)


def test_numerators_and_rightness_come_without_a_gradient():
    problem = Problem()
    objective = problem.objective(metrics=True)
    with torch.no_grad():
        total = problem.fused(*problem.leaves, objective=objective)
    assert not total.requires_grad
    numerators = objective.numerators
    torch.testing.assert_close(total, 0.3 * numerators["final"] + 0.7 * numerators["base"])
    base_right = problem.target.logits(problem.hidden).argmax(-1) == problem.labels
    assert torch.equal(objective.slot_values()["base_correct"], base_right)


def test_logits_of_all_tokens_never_exist():
    generator = torch.Generator().manual_seed(0)
    n, v = 40, 1000
    hidden = torch.randn(n, S, D, generator=generator, requires_grad=True)
    z, out = (torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((n, S, U), (v, U)))
    head = torch.randn(v, D, generator=generator)
    objective = Objective(
        torch.zeros(n, S, dtype=torch.long),
        lambda part, ce: torch.ones_like(ce),
        {"final": {"": 1.0}, "base": {"": 1.0}},
    )
    with LargestTensor() as largest:
        head_loss(hidden, TargetHead(head, head), objective, (z, out), blocks=2).backward()
    assert largest.elements == max(2 * S * v, v * D)


def test_bfloat16_takes_the_softmax_in_float32():
    narrow, wide = Problem(torch.bfloat16), Problem(torch.float32)
    for name in ("hidden", "z", "out"):
        setattr(wide, name, getattr(narrow, name).float())
    wide.target = narrow.target.to(dtype=torch.float32)
    (found, grads), (wanted, wide_grads) = (gradients(p.fused, p.leaves) for p in (narrow, wide))
    assert found.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 3
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=0)
    for ours, theirs in zip(grads, wide_grads, strict=True):
        assert (ours.float() - theirs).norm() < 2e-2 * theirs.norm()


@pytest.mark.parametrize("kind", ["dpace", "dpace-cumulative-confidence-only", "dpace-continuation-value-only"])
def test_dpace_weights_by_their_definition(kind):
    ce, alpha = torch.tensor([0.0, 0.5, 2.0, 0.1, 1.0]), 0.5
    scored = torch.tensor([False, True, False, True, True])
    smooth = [(1 - alpha) * float(torch.exp(-ce[k])) + alpha if scored[k] else 1.0 for k in range(5)]
    reach = [float(torch.tensor(smooth[: k + 1]).prod()) for k in range(5)]
    ahead = [sum(reach[j] for j in range(k, 5) if scored[j]) for k in range(5)]
    wanted = {
        "dpace": ahead,
        "dpace-cumulative-confidence-only": reach,
        "dpace-continuation-value-only": [a / p for a, p in zip(ahead, reach, strict=True)],
    }[kind]
    found = dpace_weights(ce[None], scored[None], alpha, kind)[0]
    torch.testing.assert_close(found, torch.tensor(wanted) * scored)


def test_weights_by_confidence_are_constants_to_the_gradient():
    problem = Problem(torch.float64, corrected=False)
    scored = torch.ones(N, S, dtype=torch.bool)
    frozen = {}

    def weigh(part, ce_NS):
        frozen[part.start] = dpace_weights(ce_NS, scored[part], 0.5, "dpace")
        return frozen[part.start]

    objective = Objective(problem.labels, weigh, problem.scales)
    found = gradients(lambda hidden: problem.fused(hidden, objective=objective), problem.leaves)
    problem.weights = torch.cat([frozen[start] for start in sorted(frozen)])
    wanted = gradients(problem.plain, problem.leaves)
    torch.testing.assert_close(found, wanted)
