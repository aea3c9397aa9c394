"""int8 encoding: states normalised by their channel's mean and std, one byte each, a scale for every 128 channels.

    z = (x - mean) / std        entries with |z| beyond 16, or beyond 4 times the row's rms, are outliers:
                                stored exactly, and z := 0
    scale = bf16(max|z| / 127)  for each group of a row; 0 where all are 0
    q = round(z / scale)        within +-127
    x' = ((q * scale) * std) + mean, each step rounded in float32, then rounded to the column's dtype

Never a fused multiply-add, whose single rounding would make a GPU's bits differ from a CPU's. Error bound: an entry
that is no outlier is off by at most 16/254 of its channel's std, plus the roundings of `scale` and of the result. The
rms rule keeps the step of every row below 4/127 of its own rms, so its error is about 4/127/sqrt(12) = 0.9 % of that at
most; without it, a few tokens of the bundled target were off by 1.2 to 1.9 %.

    R rows   D channels   G groups of a row   e outliers
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.codecs.calibration import Calibration
from pipeline.cache.codecs.int8_files import OUTLIER_RMS, OUTLIER_STDS, Encoded, group_of

LEVELS = 127
# Bytes of float32 that a CPU processes at a time, so that they stay in its cache. With several torch threads, less than
# the 32,768 values from which torch starts them: the caller is one of several reader threads already.
CPU_BYTES, SHARED_BYTES = 512 << 10, 128 << 10
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}  # largest relative error of rounding a value to the dtype


def as_stored(states: Tensor) -> np.ndarray:
    """Convert a CPU tensor of states to the stored array: uint16 bits of bfloat16, or float32."""
    return states.view(torch.int16).numpy().view(np.uint16) if states.dtype == torch.bfloat16 else states.numpy()


def as_states(stored: np.ndarray) -> Tensor:
    """Convert a stored array back to a tensor; the inverse of `as_stored`."""
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)


def _pieces(rows: int, width: int, device: torch.device) -> range:
    """The first rows of the pieces processed at a time, as a range whose step is the piece; a GPU takes all at once."""
    size = CPU_BYTES if torch.get_num_threads() == 1 else SHARED_BYTES
    return range(0, rows, rows if device.type != "cpu" and rows else max(1, size // (4 * width)))


def encode(states_RD: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor, Tensor]:
    """Encode states; returns q int8 [R, D], scale int16 [R, G] (bits of bfloat16) and outliers int32 [e, 3].

    All on the states' device. An outlier is (row, channel, bits), sorted; every value that is not finite is one.
    """
    R, D = states_RD.shape
    size = group_of(D)
    device = states_RD.device
    mean_D, std_D = calibration.on(device)
    levels = torch.tensor(
        float(LEVELS), device=device
    )  # a tensor: by a Python number, a GPU would multiply with its inverse
    q_RD = torch.empty(R, D, dtype=torch.int8, device=device)
    scale_RG = torch.empty(R, D // size, dtype=torch.bfloat16, device=device)
    outlier_at = []
    steps = _pieces(R, D, device)
    for first in steps:
        part = slice(first, first + steps.step)
        z_rD = (states_RD[part].float() - mean_D).div_(std_D)  # not in place: the states are the caller's
        rms_r1 = z_rD.clamp(-OUTLIER_STDS, OUTLIER_STDS).square_().mean(-1, keepdim=True).sqrt_()
        out_rD = ~(z_rD.abs() <= (rms_r1 * OUTLIER_RMS).clamp_(max=OUTLIER_STDS))  # whatever is not finite, too
        z_rD.masked_fill_(out_rD, 0)
        z_rGc = z_rD.view(len(z_rD), -1, size)
        scale_RG[part] = z_rGc.abs().amax(-1).div_(levels)
        scale_rG1 = scale_RG[part].float()[..., None]
        q_RD[part] = z_rGc.div_(scale_rG1).round_().clamp_(-LEVELS, LEVELS).nan_to_num_(0).view(-1, D)
        outlier_at.append(out_rD.nonzero() + torch.tensor([first, 0], device=device))
    at_e2 = torch.cat(outlier_at) if outlier_at else torch.empty(0, 2, dtype=torch.int64, device=device)
    value_e = states_RD[at_e2[:, 0], at_e2[:, 1]]
    bits_e = value_e.view(torch.int16 if value_e.dtype == torch.bfloat16 else torch.int32)
    return q_RD, scale_RG.view(torch.int16), torch.column_stack([at_e2, bits_e]).int()


def encode_to_host(states_RD: Tensor, calibration: Calibration) -> Encoded:
    """Encode states on their device and copy the result to the host, as it is stored."""
    parts = [part.cpu() for part in encode(states_RD, calibration)]
    return pack_encoded(parts, calibration, str(states_RD.dtype).removeprefix("torch."))


def pack_encoded(parts: Sequence[Tensor], calibration: Calibration, dtype: str) -> Encoded:
    """Wrap the three results of `encode`, already copied to the host, as they are stored."""
    q_RD, scale_RG, outliers_e3 = (part.numpy() for part in parts)
    return Encoded(q_RD, scale_RG.view(np.uint16), outliers_e3, calibration, dtype)


def decode(held: Encoded, device: torch.device | str = "cpu", out: Tensor | None = None) -> Tensor:
    """Decode rows to states [R, D] on `device`, in the column's dtype; into `out` if given."""
    R, D = held.values.shape
    size = group_of(D)
    device = torch.device(device)
    mean_D, std_D = held.calibration.on(device)
    q_RD = _to_device(held.values, device)
    scale_RG1 = _to_device(held.scale.view(np.int16), device).view(torch.bfloat16).float()[..., None]
    if out is None:
        out = torch.empty(R, D, dtype=getattr(torch, held.dtype), device=device)
    step = _pieces(R, D, device).step
    x_rD = torch.empty(min(step, R), D, device=device)
    x_rGc = x_rD.view(len(x_rD), D // size, size)
    for q_rD, scale_rG1, out_rD in zip(q_RD.split(step), scale_RG1.split(step), out.split(step), strict=True):
        if len(q_rD) < len(x_rD):
            x_rD, x_rGc = x_rD[: len(q_rD)], x_rGc[: len(q_rD)]
        x_rD.copy_(q_rD)
        x_rGc.mul_(scale_rG1)
        out_rD.copy_(x_rD.mul_(std_D).add_(mean_D))
    if len(held.outliers):
        kind = np.int16 if held.dtype == "bfloat16" else np.int32
        rows, columns = (_to_device(held.outliers[:, k].astype(np.int64), device) for k in (0, 1))
        bits = _to_device(held.outliers[:, 2].astype(kind), device)
        out.view(bits.dtype)[rows, columns] = bits
    return out


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def error_bound(states_RD: Tensor, std_D: Tensor) -> Tensor:
    """The largest error of each entry [R, D]: half a quantisation step of a full group, plus the roundings."""
    half_step_D = std_D * (OUTLIER_STDS / (2 * LEVELS) * (1 + 2.0**-8))
    return half_step_D + ROUNDING[states_RD.dtype] * states_RD.float().abs()
