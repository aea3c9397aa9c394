"""The acceptance rules of speculative decoding: greedy comparison, and lossless rejection sampling.

Rejection sampling keeps proposal x of a slot with probability min(1, p(x) / q(x)), p being the target's distribution
there and q the one that x was drawn from. The first one rejected is replaced by a draw from max(p - q, 0), normalised;
after a block kept whole comes a draw from p (Leviathan et al., arXiv:2211.17192, algorithm 1 and appendix A.1). The
tokens are then distributed as the target's own, whatever q is, on two conditions: x was drawn from this very q, and
whether a slot proposes anything at all depends on the tokens before it only, never on x.

    P proposals   N = P + 1 rows, after the anchor and after each proposal   V vocabulary
"""

import torch
from torch import Tensor

from pipeline.drafts import Proposal
from pipeline.evaluation.accept_length import agree
from pipeline.sampling import draw, uniforms


def accept_greedy(proposal: Proposal, logits_NV: Tensor) -> list[int]:
    """Return the proposals before the first that is not the target's likeliest token, and that token."""
    return agree(proposal.ids_P.tolist(), logits_NV.argmax(-1).tolist())


def rejection_sample(
    proposal: Proposal, logits_NV: Tensor, temperature: float, generator: torch.Generator
) -> list[int]:
    """Return the proposals kept and one token of the target's own, together distributed as softmax(logits / T) says.

    A proposal without q is that of a greedy draft: one-hot, so it is kept with probability p(x), and a replacement is
    drawn from p without x. Takes P + 1 numbers off the generator, whatever is kept: the last one is for the draw, since
    a number that has refused a proposal is no longer uniform.
    """
    p_NV = (logits_NV.double() / temperature).softmax(-1)
    count, uniform_N = len(proposal.ids_P), uniforms(len(p_NV), generator)
    q_PV = one_hot(proposal.ids_P, p_NV) if proposal.q_PV is None else proposal.q_PV.to(p_NV)
    p_P, q_P = (rows_PV.gather(-1, proposal.ids_P[:, None])[:, 0] for rows_PV in (p_NV[:count], q_PV))
    kept_P = uniform_N[:count].to(p_P) * q_P < p_P  # without a division: q may be next to 0, and p exactly 0
    kept = int(kept_P.long().cumprod(0).sum())
    weights_V = p_NV[kept] if kept == count else residual(p_NV[kept], q_PV[kept])
    return [*proposal.ids_P[:kept].tolist(), int(draw(weights_V[None], uniform_N[-1:]))]


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """Return the weights [V] that a replacement is drawn from: what p has over q.

    Where rounding leaves nothing, p and q are equal but for it, and p itself serves: a refusal there has a chance of
    about 1e-16, or 1e-7 where q is float32.
    """
    left_V = (p_V - q_V).clamp(min=0)
    return left_V if left_V.any() else p_V


def one_hot(ids_P: Tensor, p_NV: Tensor) -> Tensor:
    """Return what a greedy draft draws from [P, V]."""
    return torch.zeros_like(p_NV[: len(ids_P)]).scatter_(-1, ids_P[:, None], 1.0)
