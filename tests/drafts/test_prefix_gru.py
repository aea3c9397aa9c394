"""Domino's GRU, written out: torch's values and gradients, and those of bfloat16 at the width of an 8B target."""

import torch
from torch.nn.functional import cosine_similarity

from pipeline.drafts.domino import PrefixGRU

N, P = 6, 15
SMALL = 1e-9  # a loss's gradient by one entry of a fresh draft's state: float16 ends at 6e-8


def gru_of(width: int, size: int) -> PrefixGRU:
    torch.manual_seed(0)
    gru = PrefixGRU(width, size)
    for weight in gru.parameters():
        torch.nn.init.uniform_(weight, -gru.init_bound, gru.init_bound)
    return gru


def weight_grads(gru: torch.nn.Module, x_NPD: torch.Tensor, d_NPH: torch.Tensor) -> list[torch.Tensor]:
    gru.zero_grad()
    (gru(x_NPD)[0].to(d_NPH.dtype) * d_NPH).sum().backward()
    return [weight.grad.clone() for weight in gru.parameters()]


def test_values_states_and_gradients_are_those_of_torch_s_gru():
    gru = gru_of(5, 4).double()
    theirs = torch.nn.GRU(5, 4, bias=False, batch_first=True).double()
    theirs.load_state_dict(gru.state_dict())
    x_NPD, state_NH = torch.randn(N, P, 5).double(), torch.randn(N, 4).double()
    for found, wanted in zip(gru(x_NPD, state_NH), theirs(x_NPD, state_NH[None]), strict=True):
        torch.testing.assert_close(found, wanted.view_as(found), atol=1e-14, rtol=0)
    d_NPH = torch.randn(N, P, 4).double()
    for found, wanted in zip(weight_grads(gru, x_NPD, d_NPH), weight_grads(theirs, x_NPD, d_NPH), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_under_bfloat16_autocast_its_gradient_is_that_of_float32_at_the_width_of_an_8b_target():
    gru = gru_of(4096, 1024)
    x_NPD, d_NPH = torch.randn(N, P, 4096) * 0.03, torch.randn(N, P, 1024) * SMALL
    exact = weight_grads(gru, x_NPD, d_NPH)
    with torch.autocast("cpu", torch.bfloat16):
        found = weight_grads(gru, x_NPD, d_NPH)
    for ours, theirs in zip(found, exact, strict=True):
        assert cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999
        assert abs(ours.norm() / theirs.norm() - 1) < 0.01


def test_the_state_goes_on_where_tokens_come_one_by_one():
    gru, x_NPD, state = gru_of(5, 4), torch.randn(N, P, 5), None
    with torch.no_grad():
        whole_NPH, last_NH = gru(x_NPD)
        for token in range(P):
            found_N1H, state = gru(x_NPD[:, token : token + 1], state)
            torch.testing.assert_close(found_N1H[:, 0], whole_NPH[:, token])
    torch.testing.assert_close(state, last_NH)
