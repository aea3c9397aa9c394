"""The LM head fused with its loss, a chunk of blocks at a time, the gradient computed in the forward.

Logits over the vocabulary are the largest tensors of training: they exist for one chunk only, and are overwritten with
their gradient there. So the head costs two matrix products, where checkpointing costs three. Corrected logits are one
concatenated linear, [W_head | W_out] [h ; z]; base and corrected loss share the chunk's logits and the target's own.

    N blocks   n blocks of a chunk   S slots   X slots of a chunk   D hidden size   V vocabulary
    U rank of a correction
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.drafts.objectives import Objective
from pipeline.matrix_products import product, write_product
from pipeline.target.head import TargetHead
from pipeline.tensors import at_least_float32

SLICE = 4096  # tokens of the vocabulary whose share of W_out's gradient a CPU adds at once, in its cache


class ChunkMemory:
    """Memory for the tensors [X, V] of a chunk, used again by the next: a CPU takes several times as long to get memory
    of that size from the system as to fill it."""

    def __init__(self, slots: int, like: Tensor):
        self.slots, self.like, self.named = slots, like, {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return the memory of that name as [..., V], in float32 or wider where no dtype is given."""
        if name not in self.named:
            dtype = dtype or at_least_float32(self.like.dtype)
            self.named[name] = self.like.new_empty((self.slots, shape[-1]), dtype=dtype)
        return self.named[name][: shape[:-1].numel()].view(shape)

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write the elementwise product to `out`, rounded to its dtype; `left` may be overwritten."""
        if left.dtype != out.dtype and left.device.type == "cpu":  # which would convert into new memory
            out.copy_(left.mul_(right))
        else:
            torch.mul(left, right, out=out)

    def softmax(self, logits: Tensor, function: Callable = torch.softmax) -> Tensor:
        """Return the softmax of logits in float32 or wider: on a CPU, which computes row by row, in their own memory
        where that is wide enough."""
        wide = at_least_float32(logits.dtype)
        if logits.device.type != "cpu":
            out = self.take("q", logits.shape)
        elif logits.dtype == wide:
            out = logits
        else:  # it would convert into new memory
            logits = out = self.take("q", logits.shape).copy_(logits)
        return function(logits, -1, dtype=wide, out=out)


class HeadLoss(torch.autograd.Function):
    """The total loss (scalar) of the head's logits; its gradients are computed when `apply` returns.

        HeadLoss.apply(hidden_NSD, z_NSU, out_VU, target, objective, blocks)

    The objective scores the kinds of logits that it has scales for, after the soft cap: "base" = head(hidden) and
    "final" = [head | W_out] [hidden ; z]. Without a correction (z and W_out None) final is head(hidden). The target's
    weights get no gradient. blocks: how many blocks have their logits in memory at once.
    """

    @staticmethod
    def forward(ctx, hidden_NSD, z_NSU, out_VU, target: TargetHead, objective: Objective, blocks: int) -> Tensor:
        head_VD, corrected = target.head_VD, z_NSU is not None
        want_grad = any(ctx.needs_input_grad[:2])  # not W_out's, which is a parameter also where nothing is learned
        d_hidden = torch.empty_like(hidden_NSD) if want_grad else None
        d_z = torch.empty_like(z_NSU) if want_grad and corrected else None
        d_out_UV = (
            torch.zeros_like(out_VU.T, dtype=at_least_float32(out_VU.dtype), memory_format=torch.contiguous_format)
            if d_z is not None
            else None
        )
        head_out_VU = out_VU.to(head_VD.dtype) if corrected else None
        scored = [kind for kind in ("base", "final") if kind in objective.scales]
        kinds = ["base", "final"] if corrected else scored
        memory = ChunkMemory(min(blocks, len(hidden_NSD)) * hidden_NSD.shape[1], head_VD)
        for first in range(0, len(hidden_NSD), blocks):
            part = slice(first, first + blocks)
            shape = torch.Size((*hidden_NSD[part].shape[:2], len(head_VD)))
            raw = {kind: memory.take(kind, shape, head_VD.dtype).flatten(0, 1) for kind in kinds}  # [X, V] each
            write_product(raw[kinds[0]], hidden_NSD[part].flatten(0, 1).to(head_VD.dtype), head_VD.T)
            if corrected:
                z_XU = z_NSU[part].flatten(0, 1).to(head_VD.dtype)
                write_product(raw["final"], z_XU, head_out_VU.T, added_TO=raw["base"])
            elif len(kinds) > 1:
                raw["final"].copy_(raw["base"])
            soft = objective.soft_labels(part, target, memory)
            for kind in scored:
                raw_NSV = logits_NSV = raw[kind].view(shape)
                if target.logit_softcap is not None:
                    logits_NSV = target.cap(raw_NSV.to(at_least_float32(raw_NSV.dtype)))
                    slope_NSV = 1 - (logits_NSV / target.logit_softcap) ** 2
                measured = objective.measure(kind, part, logits_NSV, memory, soft)
                objective.add_chunk(kind, part, logits_NSV, measured, memory, soft, want_grad)
                if target.logit_softcap is not None:
                    raw_NSV.copy_(logits_NSV.mul_(slope_NSV))
            if d_z is not None:
                d_z[part] = product(raw["final"], head_out_VU).view_as(d_z[part])
                _add_products(d_out_UV, z_XU.T, raw["final"])
            if want_grad:
                d_sum_XV = raw["final"] if len(scored) == 1 else raw["final"].add_(raw["base"])
                d_hidden[part] = product(d_sum_XV, head_VD).view_as(d_hidden[part])
        ctx.grads = d_hidden, d_z, None if d_out_UV is None else d_out_UV.T.to(out_VU.dtype)
        return objective.total()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grads = ctx.grads
        if graph_is_kept():
            return *(None if made is None else made * grad.to(made.dtype) for made in grads), None, None, None
        ctx.grads = None
        return *(None if made is None else made.mul_(grad.to(made.dtype)) for made in grads), None, None, None


def _add_products(sums_UV: Tensor, z_UX: Tensor, d_logits_XV: Tensor) -> None:
    """Add z d_logits to the sums: W_out's gradient the other way round, whose smaller factor is then the one that
    oneDNN copies."""
    tokens = SLICE if sums_UV.device.type == "cpu" else sums_UV.shape[1]
    for sums_UT, d_logits_XT in zip(sums_UV.split(tokens, 1), d_logits_XV.split(tokens, 1), strict=True):
        sums_UT += product(z_UX, d_logits_XT)


def graph_is_kept() -> bool:
    """Return whether the graph of this backward pass may be walked again: then its tensors must stay as they are."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # torch's own, not public
    return asked is None or asked()
