"""RMS norm and rotary positions (RoPE), with hand-written gradients: half of autograd's passes over memory, which
took a sixth of a training step on a CPU.

    T tokens   A heads   E head size
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.drafts.rope_scaling import RopeScaling

Tables = tuple[Tensor, Tensor]  # cos and sin [T, E / 2] of some positions


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for norms, angles, softmaxes and sums: float32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """Hugging Face's Qwen3 norm: variance and scaling in float32, back to the input's dtype, then the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps)


class _Norm(torch.autograd.Function):
    """weight * (x / rms(x))."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x_wide = x.to(at_least_float32(x.dtype))
        scale = x_wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        unit = (x_wide * scale).to(x.dtype)
        ctx.save_for_backward(unit, scale, weight)
        return weight * unit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unit, scale, weight = ctx.saved_tensors
        grad_wide, unit, weight_wide = grad.to(scale.dtype), unit.to(scale.dtype), weight.to(scale.dtype)
        product = grad_wide * unit
        along = (product @ weight_wide / len(weight))[..., None]
        d_x = (grad_wide * weight_wide).addcmul_(unit, along, value=-1).mul_(scale)
        return d_x.to(grad.dtype), product.flatten(0, -2).sum(0).to(weight.dtype), None


def rope_tables(positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tables:
    """Return cos and sin [..., E / 2] of positions [...], in float32 whatever the draft's dtype.

    Serving engines compute them so: tables rounded to bfloat16 would drift from theirs with the position.
    """
    angles = positions.float()[..., None] * frequencies(head_dim, theta, scaling, positions.device)
    if scaling is None or scaling.attention_factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * scaling.attention_factor, angles.sin() * scaling.attention_factor


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | str = "cpu") -> Tensor:
    """Return the angle per position of each pair of channels, radians, float32 [E / 2]."""
    exponent_F = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    plain_F = 1.0 / theta**exponent_F
    if scaling is None:
        return plain_F
    if scaling.rope_type == "linear":
        return plain_F / scaling.factor
    keep_F = _kept_llama3(plain_F, scaling) if scaling.rope_type == "llama3" else _kept_yarn(plain_F, theta, scaling)
    return plain_F * keep_F + plain_F / scaling.factor * (1 - keep_F)


def _kept_llama3(plain_F: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the fraction [E / 2] of each frequency that is not scaled: 1 for fast pairs, which turn often within the
    original length, 0 for slow ones."""
    turns_F = scaling.original_max_position_embeddings * plain_F / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns_F - low) / (high - low)).clamp(0, 1)


def _kept_yarn(plain_F: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Return the same by a ramp over the pairs (arXiv:2309.00071, equation 18), its ends rounded to whole pairs."""
    width = 2 * len(plain_F)

    def pair_that_turns(times: float) -> float:
        length = scaling.original_max_position_embeddings / (2 * math.pi * times)
        return width * math.log(length) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast or 32.0), pair_that_turns(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last += 0.001 * (first == last)
    pairs_F = torch.arange(len(plain_F), dtype=torch.float32, device=plain_F.device)
    return 1 - ((pairs_F - first) / (last - first)).clamp(0, 1)


def rotate(x_TAE: Tensor, tables: Tables) -> Tensor:
    """Rotate the halves of each head by its token's angles [T, E / 2] (NeoX style), in float32 at least."""
    cos_TE, sin_TE = tables
    return _Rotation.apply(x_TAE, cos_TE[:, None], sin_TE[:, None])


class _Rotation(torch.autograd.Function):
    """Rotation; its gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx, x_TAE, cos_T1E, sin_T1E):
        ctx.save_for_backward(cos_T1E, sin_T1E)
        return _turn(x_TAE, cos_T1E, sin_T1E)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TAE):
        cos_T1E, sin_T1E = ctx.saved_tensors
        return _turn(grad_TAE, cos_T1E, -sin_T1E), None, None


def _turn(x_TAE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
    out_TAE = torch.empty_like(x_TAE, dtype=at_least_float32(x_TAE.dtype))
    (left, right), (out_left, out_right) = x_TAE.chunk(2, dim=-1), out_TAE.chunk(2, dim=-1)
    torch.mul(left, cos_T1E, out=out_left).addcmul_(right, sin_T1E, value=-1)
    torch.mul(right, cos_T1E, out=out_right).addcmul_(left, sin_T1E)
    return out_TAE.to(x_TAE.dtype)
