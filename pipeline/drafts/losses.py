"""The LM head fused with its loss, a chunk of blocks at a time, the gradient computed in the forward.

Logits over the vocabulary are the largest tensors of training: they exist for one chunk only, and are overwritten with
their gradient there. So the head costs two matrix products, where checkpointing costs three. Corrected logits are one
concatenated linear, [W_head | W_out] [h ; z]; base and corrected loss share the chunk's logits and the target's own.
`target/head.py` decides the size of a chunk.

    N blocks   S slots   D hidden size   V vocabulary   U rank of the correction   X slots of a chunk
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.drafts.norm_and_rope import at_least_float32
from pipeline.drafts.objectives import Objective
from pipeline.target.head import TargetHead


class _ChunkedHead(torch.autograd.Function):
    """total = objective of head(hidden), head(hidden) + z W_out^T, or both."""

    @staticmethod
    def forward(ctx, hidden_NSD, z_NSU, out_VU, target, objective, blocks, want_grad):
        d_hidden = torch.empty_like(hidden_NSD) if want_grad else None
        d_z = torch.empty_like(z_NSU) if want_grad and z_NSU is not None else None
        d_out = torch.zeros_like(out_VU, dtype=at_least_float32(out_VU.dtype)) if d_z is not None else None
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
        grads = (None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return *grads, None, None, None, None


def _chunk(hidden_NSD, pair, target, objective, part, want_grad):
    """Add one chunk's losses to `objective`; return the gradients of hidden, z and W_out, None without `want_grad`."""
    shape, dtype = hidden_NSD.shape[:2], target.head_VD.dtype
    h_XD = hidden_NSD.flatten(0, 1).to(dtype)
    final_XV = raw_XV = h_XD @ target.head_VD.T
    if pair is not None:
        z_XU, out_VU = pair[0].flatten(0, 1).to(dtype), pair[1].to(dtype)
        final_XV = torch.addmm(raw_XV, z_XU, out_VU.T)
    soft = objective.soft_labels(part, target)
    logits = {"base": raw_XV, "final": final_XV}
    d_XV = {
        kind: _kind(kind, logits_XV.unflatten(0, shape), target, objective, part, soft, want_grad)
        for kind, logits_XV in logits.items()
        if kind in objective.scales
    }
    if not want_grad:
        return None
    d_raw_XV = d_XV["base"] + d_XV["final"] if "base" in d_XV else d_XV["final"]
    d_hidden = (d_raw_XV @ target.head_VD).unflatten(0, shape)
    if pair is None:
        return d_hidden, None, None
    return d_hidden, (d_XV["final"] @ out_VU).unflatten(0, shape), d_XV["final"].T @ z_XU


def _kind(kind, raw_NSV, target, objective, part, soft, want_grad):
    """Add the loss of one kind of logits; return its gradient [X, V] by the uncapped logits, in their dtype."""
    logits_NSV = target.cap(raw_NSV.to(at_least_float32(raw_NSV.dtype)))
    d_NSV = objective.add_chunk(kind, part, logits_NSV, want_grad, soft)
    if d_NSV is None:
        return None
    if target.logit_softcap is not None:
        d_NSV = d_NSV * (1 - (logits_NSV / target.logit_softcap) ** 2)
    return d_NSV.flatten(0, 1).to(raw_NSV.dtype)


def head_loss(
    hidden_NSD: Tensor,
    target: TargetHead,
    objective: Objective,
    correction: tuple[Tensor, Tensor] | None,
    blocks: int,
) -> Tensor:
    """Return the total loss (scalar) of the head's logits; its gradients are computed when this returns.

    The objective scores the kinds of logits that it has scales for, after the soft cap: "base" = head(hidden) and
    "final" = [head | W_out] [hidden ; z]. Without `correction` = (z [N, S, U], W_out [V, U]) final is head(hidden). The
    target's weights get no gradient. blocks: how many blocks have their logits in memory at once.
    """
    z_NSU, out_VU = correction or (None, None)
    inputs = [tensor for tensor in (hidden_NSD, z_NSU, out_VU) if tensor is not None]
    want_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _ChunkedHead.apply(hidden_NSD, z_NSU, out_VU, target, objective, blocks, want_grad)
