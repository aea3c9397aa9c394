"""The head and its loss in one step, a chunk of blocks at a time, the gradient made in the forward.

Logits over the vocabulary are the largest tensors of training: they exist for one chunk only, and are turned into
their own gradient there. So the head costs two multiplications, where checkpointing costs three. Corrected logits are
one concatenated linear, [W_head | W_out] [h ; z], whose two losses share the chunk.

    N blocks   S slots   D hidden size   V vocabulary   U rank of the correction   X slots of a chunk
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.drafts.elementwise import wide
from pipeline.target_head import TargetHead

# Bytes of one float32 [X, V] tensor; about four of them live at once. On a CPU they should stay near its caches.
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


def chunk_blocks(slots: int, vocabulary: int, device: torch.device) -> int:
    """Blocks whose logits exist at once: a function of shapes only, so that a run repeats to the bit."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * slots * vocabulary))


@dataclass
class CrossEntropies:
    """Weighted cross-entropies of one or more kinds of logits against the same labels.

    weigh: (blocks of the chunk, cross-entropy) -> weights [n, S], from outside or by the draft's own confidence.
    scales: a factor for each kind, coefficient / global denominator. After the chunks, `numerators` holds
    sum(weight * cross-entropy) for each kind, and `correct` whether the argmax was right where `metrics` asks for it.
    """

    labels_NS: Tensor
    weigh: Callable[[slice, Tensor], Tensor]
    scales: dict[str, float | Tensor]
    metrics: bool = False
    numerators: dict[str, Tensor] = field(default_factory=dict)
    correct: dict[str, list[Tensor]] = field(default_factory=dict)

    def chunk(self, kind: str, part: slice, logits_NSV: Tensor, want_grad: bool) -> Tensor | None:
        """Add one chunk; return scale * the gradient with respect to its logits."""
        labels_NS = self.labels_NS[part]
        if self.metrics:
            self.correct.setdefault(kind, []).append(logits_NSV.argmax(-1) == labels_NS)
        log_p_NSV = logits_NSV.log_softmax(-1)
        ce_NS = -log_p_NSV.gather(-1, labels_NS[..., None])[..., 0]
        weights_NS = self.weigh(part, ce_NS).to(ce_NS.dtype)
        self.numerators[kind] = self.numerators.get(kind, 0) + (weights_NS * ce_NS).sum()
        if not want_grad:
            return None
        scaled_NS1 = (weights_NS * self.scales[kind])[..., None]
        grad_NSV = log_p_NSV.exp_().mul_(scaled_NS1)
        return grad_NSV.scatter_add_(-1, labels_NS[..., None], -scaled_NS1)

    def total(self) -> Tensor:
        """Sum over kinds of scale * numerator."""
        return sum(self.scales[kind] * numerator for kind, numerator in self.numerators.items())


class _ChunkedHead(torch.autograd.Function):
    """total = objective(head(hidden)), or objective of head(hidden) and head(hidden) + z W_out^T."""

    @staticmethod
    def forward(ctx, hidden_NSD, z_NSU, out_VU, target, objective, blocks, want_grad):
        d_hidden = torch.empty_like(hidden_NSD) if want_grad else None
        d_z = torch.empty_like(z_NSU) if want_grad and z_NSU is not None else None
        d_out = torch.zeros_like(out_VU, dtype=wide(out_VU.dtype)) if d_z is not None else None
        for first in range(0, len(hidden_NSD), blocks):
            part = slice(first, first + blocks)
            pair = None if z_NSU is None else (z_NSU[part], out_VU)
            grads = _chunk(hidden_NSD[part], pair, target, objective, part, want_grad)
            if want_grad:
                d_hidden[part] = grads[0]
            if d_z is not None:
                d_z[part] = grads[1]
                d_out += grads[2]
        ctx.save_for_backward(d_hidden, d_z, None if d_out is None else d_out.to(out_VU.dtype))
        return objective.total()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        made = (None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return *made, None, None, None, None


def _chunk(hidden_NSD, pair, target, objective, part, want_grad):
    """Logits of one chunk, their losses, and the gradients of hidden, z and W_out."""
    shape, dtype = hidden_NSD.shape[:2], target.head_VD.dtype
    h_XD = hidden_NSD.flatten(0, 1).to(dtype)
    raw_XV = h_XD @ target.head_VD.T
    if pair is None:
        d_XV = _kind("final", raw_XV, shape, target, objective, part, want_grad)
        return ((d_XV @ target.head_VD).unflatten(0, shape), None, None) if want_grad else None
    z_XU, out_VU = pair[0].flatten(0, 1).to(dtype), pair[1].to(dtype)
    corrected_XV = torch.addmm(raw_XV, z_XU, out_VU.T)
    d_base = _kind("base", raw_XV, shape, target, objective, part, want_grad)
    d_final = _kind("final", corrected_XV, shape, target, objective, part, want_grad)
    if not want_grad:
        return None
    d_z, d_out = d_final @ out_VU, d_final.T @ z_XU
    d_hidden = (d_base + d_final) @ target.head_VD
    return d_hidden.unflatten(0, shape), d_z.unflatten(0, shape), d_out


def _kind(kind, raw_XV, shape, target, objective, part, want_grad):
    """Loss of one kind of logits; its gradient with respect to the uncapped logits, in their dtype."""
    logits_XV = target.cap(raw_XV.to(wide(raw_XV.dtype)))
    d_NSV = objective.chunk(kind, part, logits_XV.unflatten(0, shape), want_grad)
    if d_NSV is None:
        return None
    d_XV = d_NSV.flatten(0, 1)
    if target.logit_softcap is not None:
        d_XV = d_XV * (1 - (logits_XV / target.logit_softcap) ** 2)
    return d_XV.to(raw_XV.dtype)


def head_loss(
    hidden_NSD: Tensor,
    target: TargetHead,
    objective: CrossEntropies,
    correction: tuple[Tensor, Tensor] | None = None,
    blocks: int | None = None,
) -> Tensor:
    """Total loss (scalar) of the head's logits; its gradient is ready when this returns.

    objective: given the logits "final" = head(hidden), or with `correction` = (z [N, S, U], W_out [V, U]) both
    "base" = head(hidden) and "final" = [head | W_out] [hidden ; z], the soft cap on each sum. The target's weights
    get no gradient. blocks: how many at a time.
    """
    z_NSU, out_VU = correction or (None, None)
    if blocks is None:
        blocks = chunk_blocks(hidden_NSD.shape[1], target.vocab_size, hidden_NSD.device)
    inputs = [tensor for tensor in (hidden_NSD, z_NSU, out_VU) if tensor is not None]
    want_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _ChunkedHead.apply(hidden_NSD, z_NSU, out_VU, target, objective, blocks, want_grad)


def dpace_weights(ce_NS: Tensor, scored_NS: Tensor, alpha: float, kind: str) -> Tensor:
    """Weights [N, S] by the draft's own confidence (D-PACE, arXiv:2605.18810), without gradient.

    The chance P_k of reaching slot k is the product of the smoothed probabilities up to it; unscored slots are
    neutral there and weigh nothing. kind: "dpace" (chance times continuation value), or either factor alone.
    """
    confidence_NS = (1 - alpha) * torch.exp(-ce_NS.detach()) + alpha
    reach_NS = torch.where(scored_NS, confidence_NS, 1.0).cumprod(-1)
    ahead_NS = (reach_NS * scored_NS).flip(-1).cumsum(-1).flip(-1)
    if kind == "dpace":
        return ahead_NS * scored_NS
    if kind == "dpace-cumulative-confidence-only":
        return reach_NS * scored_NS
    assert kind == "dpace-continuation-value-only", kind
    return ahead_NS / reach_NS.clamp(min=torch.finfo(reach_NS.dtype).tiny) * scored_NS
