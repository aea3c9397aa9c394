"""The optimisers' steps and the rate, against what everybody means by them."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from stages.train_draft.optimizers import AdamW, Muon, orthogonalize
from stages.train_draft.step import lr_factor


def test_the_rate_rises_over_the_warmup_and_falls_as_published():
    assert [lr_factor(s, 100, 0.04, "cosine") for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(4, 100, 0.04, "cosine") == 1.0
    assert lr_factor(52, 100, 0.04, "cosine") == pytest.approx(0.5)
    assert lr_factor(99, 100, 0.04, "cosine") == pytest.approx(0.5 * (1 + np.cos(np.pi * 95 / 96)))
    assert lr_factor(0, 1, 0.04, "cosine") == 1.0


def test_wsd_stays_and_falls_over_the_last_fifth():
    table = [lr_factor(s, 100, 0.04, "wsd") for s in range(100)]

    assert table[:4] == [0.25, 0.5, 0.75, 1.0] and set(table[3:81]) == {1.0}
    assert table[90] == pytest.approx(0.55)
    assert table[99] == pytest.approx(1 - 0.9 * 19 / 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_optimizer_is_the_one_everybody_means(dtype):
    ours, theirs = torch.nn.Linear(5, 3, dtype=dtype), torch.nn.Linear(5, 3, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    mine, reference = (
        AdamW(dict(ours.named_parameters())),
        torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.0),
    )
    for number in range(1, 6):
        for model in (ours, theirs):
            model.zero_grad()
            model(torch.full((2, 5), float(number), dtype=dtype)).square().sum().backward()
        mine.step(0.1)
        reference.step()

    for weight, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Five steps of 0.1, a handful of roundings each.
        torch.testing.assert_close(weight, expected, rtol=0, atol=5 * 0.1 * 32 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "rank"), [((6, 6), 6), ((4, 30), 4), ((30, 4), 2), ((5, 8), 0)])
def test_orthogonal_is_five_steps_of_muons_quintic(shape, rank, dtype):
    a, b, c = 3.4445, -4.7750, 2.0315
    chance = torch.Generator().manual_seed(0)
    left, right = (torch.randn(side, rank, generator=chance) for side in shape)
    matrix = left @ right.T

    wanted = matrix.double() / matrix.double().norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wanted @ wanted.T
        wanted = a * wanted + b * gram @ wanted + c * gram @ gram @ wanted

    found = orthogonalize(matrix.to(dtype))
    assert found.shape == matrix.shape and found.dtype == dtype
    # Five factors, each of a norm up to a, times a matrix of norm 1: what a product of them may be off by.
    bound = torch.finfo(dtype).eps * a**5
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound)


class OneLayer(nn.Module):
    """As much of a draft as Muon looks at: matrices of both kinds, and what is none."""

    fused_matrices = rows_of_ids = ()

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=11)
        self.wide, self.norm, self.long, self.head = (
            nn.Linear(8, 5),
            nn.LayerNorm(5),
            nn.Linear(5, 20),
            nn.Linear(20, 11),
        )


def test_muon_makes_torchs_steps_but_for_their_bfloat16():
    torch.manual_seed(0)
    model, lr = OneLayer(), 0.01
    ours, theirs = Muon(model), copy.deepcopy(model)
    assert [*ours.matrices] == ["wide.weight", "long.weight"]
    weights = [theirs.wide.weight, theirs.long.weight]
    reference = torch.optim.Muon(weights, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        before = [weight.detach().clone() for weight in ours.matrices.values()]
        for weight, other in zip(ours.matrices.values(), weights, strict=True):
            other.data.copy_(weight)
            other.grad = weight.grad.clone()
        ours.step(lr)
        reference.step()
        for weight, other, was in zip(ours.matrices.values(), weights, before, strict=True):
            assert torch.dist(weight, other) < 0.05 * torch.dist(weight, was)
