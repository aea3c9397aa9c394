"""Matrix products of float32 on a CPU, by whichever of torch's two libraries is the faster one there.

torch leaves them to Intel's MKL, which on a CPU of another maker does not use AVX-512. oneDNN, which torch has for
bfloat16, uses what the CPU has: on a Zen 5 2.0 to 2.4 times as fast, with AVX2 alone 1.0 to 1.3 times
(`tests/bench/matrix_products.py`). So it computes them there; everything else is torch's own product.

Which library it is depends on the CPU and on the sizes alone, so that a run repeats bit for bit.

    T tokens   I inputs   O outputs
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Module = TypeVar("Module", bound=nn.Module)
CPU_FACTS = Path("/proc/cpuinfo")
REUSED_BYTES = 4 << 20  # from 32 MB on glibc gives memory back when it is freed
SMALLEST = 1 << 20  # multiplications below which oneDNN's call takes longer than it saves


@cache
def onednn_is_faster() -> bool:
    """Return whether this CPU multiplies float32 faster by oneDNN: torch has both libraries, and Intel did not make the
    CPU."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        lines = CPU_FACTS.read_text(errors="replace").splitlines()
    except OSError:
        return False
    maker = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "GenuineIntel")
    return maker != "GenuineIntel" and _onednn_multiplies()


def _onednn_multiplies() -> bool:
    """Return whether oneDNN can be called and is right: the operator is torch's own for compiled code, not public."""
    left_TI, right_IO = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3).T
    try:
        return torch.equal(onednn_product(left_TI, right_IO), left_TI @ right_IO)
    except (AttributeError, RuntimeError, TypeError):
        return False


def onednn_product(left_TI: Tensor, right_IO: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return left @ right (+ bias) [T, O], float32 on the CPU, by oneDNN; no gradient."""
    return torch.ops.mkldnn._linear_pointwise.default(left_TI, _dense(right_IO).T, bias_O, "none", [], "")


def _dense(right_IO: Tensor) -> Tensor:
    """Return the factor as rows or columns without gaps: for any other oneDNN has only its slow reference code."""
    return right_IO if right_IO.is_contiguous() or right_IO.T.is_contiguous() else right_IO.contiguous()


@contextmanager
def torchs_own_products() -> Iterator[None]:
    """Let torch choose the library within the block: where a step on another device is counted on this one."""
    global onednn_is_faster
    ours, onednn_is_faster = onednn_is_faster, lambda: False
    try:
        yield
    finally:
        onednn_is_faster = ours


onednn_is_faster()  # asked here, where tensors have values: the first to ask might compute on fake ones


def by_onednn(left_TI: Tensor, right_IO: Tensor) -> bool:
    """Return whether `product` computes these by oneDNN."""
    return (
        left_TI.device.type == "cpu"
        and left_TI.dtype == right_IO.dtype == torch.float32
        and left_TI.numel() * right_IO.shape[1] >= SMALLEST
        and onednn_is_faster()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


def product(left_TI: Tensor, right_IO: Tensor) -> Tensor:
    """Return left @ right [T, O], without a gradient by oneDNN: for use inside of an autograd function."""
    return onednn_product(left_TI, right_IO) if by_onednn(left_TI, right_IO) else left_TI @ right_IO


def write_product(out_TO: Tensor, left_TI: Tensor, right_IO: Tensor, added_TO: Tensor | None = None) -> Tensor:
    """Write left @ right (+ added) to `out`, rounded once, and return it; as `product` without a gradient by oneDNN.

    oneDNN takes memory of its own, which is then copied: for some outputs at a time, few enough for the C library to
    use that memory again, where the system would clear it again page by page.
    """
    if not by_onednn(left_TI, right_IO):
        if added_TO is None:
            return torch.mm(left_TI, right_IO, out=out_TO)
        return torch.addmm(added_TO, left_TI, right_IO, out=out_TO)
    outputs = max(1, REUSED_BYTES // (4 * len(left_TI)))
    for first in range(0, right_IO.shape[1], outputs):
        part = slice(first, first + outputs)
        made = onednn_product(left_TI, right_IO[:, part])
        if added_TO is None:
            out_TO[:, part] = made
        else:
            torch.add(added_TO[:, part], made, out=out_TO[:, part])
    return out_TO


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias [..., O] of x [..., I], as torch's `linear`, with its gradients."""
    x_TI = x.reshape(-1, x.shape[-1])
    if not by_onednn(x_TI, weight_OI.T):
        return F.linear(x, weight_OI, bias_O)
    return _Linear.apply(x_TI, weight_OI, bias_O).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """torch's module, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def compute_by_linear(model: Module) -> Module:
    """Let a model's linear modules be computed by `linear`; return the model.

    For decoding. Captures have torch's own products, so that their bytes are the same where a target's layers are
    spread over devices, whose modules cannot be changed.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI, weight_OI, bias_O):
        ctx.save_for_backward(x_TI, weight_OI)
        return onednn_product(x_TI, weight_OI.T, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TO):
        x_TI, weight_OI = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        return (
            product(grad_TO, weight_OI) if by_x else None,
            product(grad_TO.T, x_TI) if by_weight else None,
            grad_TO.sum(0) if by_bias else None,
        )
