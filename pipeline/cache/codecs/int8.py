"""int8 encoding: states normalised by their channel's mean and std, one byte each, a scale for every 128 channels.

    z = (x - mean) / std        entries with |z| beyond 16, or beyond 4 times the row's rms, are outliers:
                                stored exactly, and z := 0
    scale = bf16(max|z| / 127)  for each group of a row; 0 where all are 0
    q = round(z / scale)        within +-127
    x' = ((q * scale) * std) + mean, each step rounded in float32, then rounded to the column's dtype

Arrays: `values` int8 [R, D] and `scale` uint16 [R, G], bits of bfloat16.

Never a fused multiply-add, whose single rounding would make a GPU's bits differ from a CPU's. Error bound: an entry
that is no outlier is off by at most 16/254 of its channel's std, plus the roundings of `scale` and of the result. The
rms rule keeps the step of every row below 4/127 of its own rms, so its error is about 4/127/sqrt(12) = 0.9 % of that at
most; without it, a few tokens of the bundled target were off by 1.2 to 1.9 %.

    R rows   D channels   G groups of a row   e outliers
"""

from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.codecs.lossy import LossyCodec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUP = 128  # channels that share a scale
LEVELS = 127
OUTLIER_STDS = 16.0  # an entry is an outlier beyond so many stds of its channel's mean,
OUTLIER_RMS = 4.0  # or beyond so many times its row's rms, both in stds
SCALE_ROUNDING = 1 + 2.0**-8  # what rounding a scale to bfloat16 adds to a step at most
# Bytes of float32 that a CPU processes at a time, so that they stay in its cache. With several torch threads, less than
# the 32,768 values from which torch starts them: the caller is one of several reader threads already.
CPU_BYTES, SHARED_BYTES = 512 << 10, 128 << 10


def group_of(width: int) -> int:
    """Channels that share a scale: the largest divisor of `width` that is at most 128."""
    return next(size for size in range(min(GROUP, width), 0, -1) if width % size == 0)


class Int8(LossyCodec):
    """The codec. An error is at most half a step of a group whose largest entry is as far out as one may be."""

    name = "int8"
    probe_allowance = 0.012
    max_of_token = OUTLIER_RMS / (2 * LEVELS) * SCALE_ROUNDING  # half a step of a row whose groups are all full: 0.0158

    def arrays(self, width: int) -> dict[str, tuple[int, np.dtype]]:
        return {"values": (width, np.dtype("i1")), "scale": (width // group_of(width), np.dtype("<u2"))}

    def formula(self, width: int, dtype: str) -> str:
        group = group_of(width)
        return (
            f"{dtype}(((values * scale[:, channel // {group}]) * channels[1]) + channels[0]), float32; then the escapes"
        )

    def error_bound(self, states_RD: "Tensor", calibration: Calibration) -> "Tensor":
        """Half a quantisation step of a full group, [D]."""
        return calibration.on(states_RD.device)[1] * (OUTLIER_STDS / (2 * LEVELS) * SCALE_ROUNDING)

    def encode(self, states_RD: "Tensor", calibration: Calibration) -> tuple["Tensor", ...]:
        """Encode states; every value that is not finite becomes an outlier."""
        import torch

        R, D = states_RD.shape
        size = group_of(D)
        device = states_RD.device
        mean_D, std_D = calibration.on(device)
        # A tensor: by a Python number, a GPU would multiply with its inverse. Filled there: a copy would be waited for.
        levels = torch.full((), float(LEVELS), device=device)
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
            outlier_at.append(out_rD.nonzero())
            outlier_at[-1][:, 0] += first
        at_e2 = torch.cat(outlier_at) if outlier_at else torch.empty(0, 2, dtype=torch.int64, device=device)
        value_e = states_RD[at_e2[:, 0], at_e2[:, 1]]
        bits_e = value_e.view(torch.int16 if value_e.dtype == torch.bfloat16 else torch.int32)
        return q_RD, scale_RG.view(torch.int16), torch.column_stack([at_e2, bits_e]).int()

    def decode(self, arrays: tuple["Tensor", ...], calibration: Calibration, out_RD: "Tensor") -> None:
        import torch

        q_RD, scale_RG = arrays
        R, D = q_RD.shape
        mean_D, std_D = calibration.on(out_RD.device)
        scale_RG1 = scale_RG.view(torch.bfloat16).float()[..., None]
        step = _pieces(R, D, out_RD.device).step
        x_rD = torch.empty(min(step, R), D, device=out_RD.device)
        x_rGc = x_rD.view(len(x_rD), D // group_of(D), group_of(D))
        for q_rD, scale_rG1, out_rD in zip(q_RD.split(step), scale_RG1.split(step), out_RD.split(step), strict=True):
            if len(q_rD) < len(x_rD):
                x_rD, x_rGc = x_rD[: len(q_rD)], x_rGc[: len(q_rD)]
            x_rD.copy_(q_rD)
            x_rGc.mul_(scale_rG1)
            out_rD.copy_(x_rD.mul_(std_D).add_(mean_D))


def _pieces(rows: int, width: int, device: "torch.device") -> range:
    """The first rows of the pieces processed at a time, as a range whose step is the piece; a GPU takes all at once."""
    import torch

    size = CPU_BYTES if torch.get_num_threads() == 1 else SHARED_BYTES
    return range(0, rows, rows if device.type != "cpu" and rows else max(1, size // (4 * width)))
