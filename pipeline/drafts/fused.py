"""What a draft computes entry by entry, with hand-written gradients: norms, rotation, gated product, cross-entropy.

A gradient by autograd takes about twice the passes over memory, a third of a training step's time beside the matrix
products. Results come in the dtype that the next product takes (`product_dtype`), rounded once where autocast would
convert them again for each product. Inside, all is float32 at least; the normed vector is rounded before its weight is
applied, as Hugging Face's Qwen3 does.

On a GPU each function below runs as one compiled kernel once `use_kernels` was called; what is written here is then
its definition.

    T tokens   A heads   E head size   D hidden size   I inner size   N blocks   S slots   V vocabulary
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.drafts.rope import Tables
from pipeline.matrix_products import product
from pipeline.tensors import at_least_float32, product_dtype

DISABLED = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")  # torch's own switches


@cache
def compiled(function: Callable) -> Callable:
    """Return a function compiled by torch for tensors of any size."""
    return torch.compile(function, dynamic=True)


@dataclass(frozen=True)
class Kernels:
    """How the functions of this module and attention run on one kind of device; anywhere else they run as written.

    compiled: from a function to its kernel. attend: as `flex.attend_by_ranges`; None: that one.
    """

    device_type: str = "cuda"
    compiled: Callable[[Callable], Callable] = compiled
    attend: Callable | None = None


kernels: Kernels | None = None  # in use


def use_kernels(chosen: Kernels | None) -> None:
    """Use compiled kernels from now on; None: none."""
    global kernels
    kernels = chosen
    if chosen == Kernels():
        import torch._inductor.config as inductor  # here: it takes a second

        inductor.deterministic = True  # else it may choose between kernels by their speed, in each process anew


def kernels_of(device: torch.device) -> str:
    """Return which kernels a run is to use on a device: "compiled" or "plain"."""
    possible = device.type == "cuda" and find_spec("triton") is not None
    return "compiled" if possible and not any(os.environ.get(name) == "1" for name in DISABLED) else "plain"


def compiles(device: torch.device) -> bool:
    """Return whether kernels are compiled for tensors on this device."""
    return kernels is not None and device.type == kernels.device_type


def fused(function: Callable) -> Callable:
    """Let `function` run as one compiled kernel where `use_kernels` asked for it."""

    @wraps(function)
    def run(tensor: Tensor, *others):
        return (kernels.compiled(function) if compiles(tensor.device) else function)(tensor, *others)

    return run


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / rms(x) over the last dimension."""
    return _Norm.apply(x, weight, eps, product_dtype(x))


def rotated_norm(x_TAE: Tensor, weight: Tensor, eps: float, tables: Tables) -> Tensor:
    """Return `rms_norm` of each head, then its halves rotated by its token's angles (NeoX style)."""
    cos_TE, sin_TE = tables
    return _RotatedNorm.apply(x_TAE, weight, eps, cos_TE[:, None], sin_TE[:, None], product_dtype(x_TAE))


def gated_down(gate_TI: Tensor, up_TI: Tensor, down_DI: Tensor) -> Tensor:
    """Return (silu(gate) * up) down^T [T, D]; the product in brackets is computed again for the gradient, not kept."""
    dtype = product_dtype(gate_TI)
    return _GatedDown.apply(gate_TI.to(dtype), up_TI.to(dtype), down_DI.to(dtype))


@fused
def cross_entropy(logits_NSV: Tensor, labels_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log softmax(logits) at the labels, and the logarithm of the sum of exp(logits), both [N, S]."""
    wide_NSV = logits_NSV.to(at_least_float32(logits_NSV.dtype))
    log_sum_NS = wide_NSV.logsumexp(-1)
    return log_sum_NS - wide_NSV.gather(-1, labels_NS[..., None])[..., 0], log_sum_NS


@fused
def overwrite_with_gradient(logits_NSV: Tensor, labels_NS: Tensor, log_sum_NS: Tensor, slope_NS: Tensor) -> None:
    """Overwrite logits with slope * (softmax(logits) - 1 at the label), of a `cross_entropy` the gradient."""
    tokens_V = torch.arange(logits_NSV.shape[-1], device=logits_NSV.device)
    q_NSV = (logits_NSV.to(log_sum_NS.dtype) - log_sum_NS[..., None]).exp()
    at_label_NSV = (tokens_V == labels_NS[..., None]).to(q_NSV.dtype)
    logits_NSV.copy_((q_NSV - at_label_NSV) * slope_NS[..., None])


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        out, unit, scale = _normed(x, weight, eps, dtype)
        ctx.save_for_backward(unit, scale, weight)
        ctx.dtype = x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        d_x, d_weight = _norm_gradients(grad, *ctx.saved_tensors, ctx.dtype)
        return d_x, d_weight, None, None


class _RotatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TAE, weight, eps, cos_T1E, sin_T1E, dtype):
        out_TAE, unit_TAE, scale = _normed_and_rotated(x_TAE, weight, eps, cos_T1E, sin_T1E, dtype)
        ctx.save_for_backward(unit_TAE, scale, weight, cos_T1E, sin_T1E)
        ctx.dtype = x_TAE.dtype
        return out_TAE

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TAE):
        d_x, d_weight = _rotated_norm_gradients(grad_TAE, *ctx.saved_tensors, ctx.dtype)
        return d_x, d_weight, None, None, None, None


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_TI, up_TI, down_DI):
        ctx.save_for_backward(gate_TI, up_TI, down_DI)
        return product(_gated(gate_TI, up_TI), down_DI.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        gate_TI, up_TI, down_DI = ctx.saved_tensors
        d_down_DI = product(grad_TD.T, _gated(gate_TI, up_TI))
        return *_gated_gradients(product(grad_TD, down_DI), gate_TI, up_TI), d_down_DI


@fused
def _normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    out, unit, scale = _norm_of(x, weight, eps, dtype)
    return out.to(dtype), unit, scale


@fused
def _norm_gradients(grad: Tensor, unit: Tensor, scale: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple:
    return _gradients_of_norm(grad.to(scale.dtype), unit, scale, weight, dtype)


@fused
def _normed_and_rotated(
    x_TAE: Tensor, weight: Tensor, eps: float, cos_T1E: Tensor, sin_T1E: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    out_TAE, unit_TAE, scale = _norm_of(x_TAE, weight, eps, dtype)
    return rotate(out_TAE, cos_T1E, sin_T1E).to(dtype), unit_TAE, scale


@fused
def _rotated_norm_gradients(
    grad_TAE: Tensor,
    unit_TAE: Tensor,
    scale: Tensor,
    weight: Tensor,
    cos_T1E: Tensor,
    sin_T1E: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    turned_TAE = rotate(grad_TAE, cos_T1E, -sin_T1E)  # a rotation's gradient is the inverse one
    return _gradients_of_norm(turned_TAE.to(scale.dtype), unit_TAE, scale, weight, dtype)


@fused
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


@fused
def _gated_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def _norm_of(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm, not rounded to `dtype` yet; x / rms(x), rounded to it; and 1 / rms(x)."""
    wide = x.to(at_least_float32(x.dtype))
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    unit = (wide * scale).to(dtype)
    return weight * unit, unit, scale


def _gradients_of_norm(
    grad: Tensor, unit: Tensor, scale: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the gradients by x, in its dtype, and by the weight."""
    unit, wide_weight = unit.to(scale.dtype), weight.to(scale.dtype)
    product = grad * unit
    along = (product * wide_weight).mean(-1, keepdim=True)
    d_x = (grad * wide_weight).addcmul_(unit, along, value=-1).mul_(scale)
    return d_x.to(dtype), product.flatten(0, -2).sum(0).to(weight.dtype)


def rotate(x_TAE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
    """Return heads with their halves rotated by their token's angles, in float32 at least."""
    left, right = x_TAE.to(at_least_float32(x_TAE.dtype)).chunk(2, dim=-1)
    out_left = (left * cos_T1E).addcmul_(right, sin_T1E, value=-1)
    return torch.cat([out_left, (right * cos_T1E).addcmul_(left, sin_T1E)], dim=-1)
