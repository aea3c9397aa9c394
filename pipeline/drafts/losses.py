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

from pipeline.drafts.objectives import Objective
from pipeline.target.head import TargetHead
from pipeline.tensors import at_least_float32


class HeadLoss(torch.autograd.Function):
    """The total loss (scalar) of the head's logits; its gradients are computed when `apply` returns.

        HeadLoss.apply(hidden_NSD, z_NSU, out_VU, target, objective, blocks)

    The objective scores the kinds of logits that it has scales for, after the soft cap: "base" = head(hidden) and
    "final" = [head | W_out] [hidden ; z]. Without a correction (z and W_out None) final is head(hidden). The target's
    weights get no gradient. blocks: how many blocks have their logits in memory at once.
    """

    @staticmethod
    def forward(ctx, hidden_NSD, z_NSU, out_VU, target: TargetHead, objective: Objective, blocks: int) -> Tensor:
        dtype, corrected = target.head_VD.dtype, z_NSU is not None
        want_grad = any(ctx.needs_input_grad[:2])  # not W_out's, which is a parameter also where nothing is learned
        d_hidden = torch.empty_like(hidden_NSD) if want_grad else None
        d_z = torch.empty_like(z_NSU) if want_grad and corrected else None
        d_out = torch.zeros_like(out_VU, dtype=at_least_float32(out_VU.dtype)) if d_z is not None else None
        head_out_VU = out_VU.to(dtype) if corrected else None
        for first in range(0, len(hidden_NSD), blocks):
            part = slice(first, first + blocks)
            shape = hidden_NSD[part].shape[:2]
            raw = {"base": hidden_NSD[part].flatten(0, 1).to(dtype) @ target.head_VD.T}  # [X, V] each
            z_XU = z_NSU[part].flatten(0, 1).to(dtype) if corrected else None
            raw["final"] = torch.addmm(raw["base"], z_XU, head_out_VU.T) if corrected else raw["base"]
            soft, d_raw = objective.soft_labels(part, target), {}
            for kind in [kind for kind in raw if kind in objective.scales]:
                logits_NSV = target.cap(raw[kind].to(at_least_float32(raw[kind].dtype))).unflatten(0, shape)
                d_NSV = objective.add_chunk(kind, part, logits_NSV, want_grad, soft)
                d_raw[kind] = _by_raw_logits(d_NSV, logits_NSV, target, raw[kind].dtype) if want_grad else None
                del logits_NSV, d_NSV
            if want_grad:
                d_sum_XV = d_raw["base"] + d_raw["final"] if "base" in d_raw else d_raw["final"]
                d_hidden[part] = (d_sum_XV @ target.head_VD).unflatten(0, shape)
                del d_sum_XV
            if d_z is not None:
                d_z[part] = (d_raw["final"] @ head_out_VU).unflatten(0, shape)
                d_out += d_raw["final"].T @ z_XU
            del raw, soft, d_raw  # before the next chunk's are made
        ctx.save_for_backward(d_hidden, d_z, None if d_out is None else d_out.to(out_VU.dtype))
        return objective.total()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grads = (None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return *grads, None, None, None


def _by_raw_logits(d_NSV: Tensor, logits_NSV: Tensor, target: TargetHead, dtype: torch.dtype) -> Tensor:
    """Return the gradient [X, V] by the logits before the soft cap, in their dtype, from that by those after."""
    if target.logit_softcap is not None:
        d_NSV = d_NSV * (1 - (logits_NSV / target.logit_softcap) ** 2)
    return d_NSV.flatten(0, 1).to(dtype)
