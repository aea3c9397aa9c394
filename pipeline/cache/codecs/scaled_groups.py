"""ScaledGroups: states normalised by their channel's mean and std, rounded to levels that a group of channels scales.

    z = (x - mean) / std        entries with |z| beyond 16, or beyond `outlier_rms` times the row's rms, are outliers:
                                stored exactly, and z := 0
    scale = bf16(max|z| / largest)        for each group of a row; 0 where all are 0
    q = the whole number whose level is nearest to z / scale
    x' = ((level(q) * scale) * std) + mean, each step rounded in float32, then rounded to the column's dtype

Never a fused multiply-add, whose single rounding would make a GPU's bits differ from a CPU's. A codec says what its
levels are and how q is stored: `int8.py`, `int6.py`. Arrays: `values` and `scale` uint16 [R, G], bits of bfloat16.

    R rows   D channels   G groups of a row   N stored values of a row   e outliers
"""

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.codecs.lossy import LossyCodec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OUTLIER_STDS = 16.0  # an entry is an outlier beyond so many stds of its channel's mean, whatever its row
SCALE_ROUNDING = 1 + 2.0**-8  # what rounding a scale to bfloat16 adds to a step at most
# Bytes of float32 that a CPU processes at a time, so that they stay in its cache. With several torch threads, less than
# the 32,768 values from which torch starts them: the caller is one of several reader threads already.
CPU_BYTES, SHARED_BYTES = 512 << 10, 128 << 10
UNPACKED = 4  # pieces whose stored bytes are unpacked at a time, where one thread does it


class ScaledGroups(LossyCodec):
    """What such a codec says.

    group: channels that share a scale, at most. outlier_rms: an entry is an outlier beyond so many times its row's rms,
    both in stds. largest: the level that a group's largest entry becomes.
    """

    group: int
    outlier_rms: float
    largest: int

    @abstractmethod
    def stored(self, width: int) -> tuple[int, np.dtype]:
        """How many values `values` has a row, and their dtype, of one byte."""

    @abstractmethod
    def round_(self, z_rD: "Tensor") -> "Tensor":
        """Round z / scale, float32, in place to the q of the nearest level; 0 for what is NaN."""

    @abstractmethod
    def store(self, q_rD: "Tensor") -> "Tensor":
        """Store q, int8 [r, D], as `values` [r, N]."""

    @abstractmethod
    def restore(self, values_rN: "Tensor", width: int) -> "Tensor":
        """The q, int8 [r, D], that `store` stored."""

    @abstractmethod
    def level_(self, q_rD: "Tensor", spare_rD: "Tensor") -> "Tensor":
        """Replace q, float32, by their levels in place; `spare_rD` may be written to."""

    def group_of(self, width: int) -> int:
        """Channels that share a scale: the largest divisor of `width` that is at most `group`."""
        return next(size for size in range(min(self.group, width), 0, -1) if width % size == 0)

    def arrays(self, width: int) -> dict[str, tuple[int, np.dtype]]:
        return {"values": self.stored(width), "scale": (width // self.group_of(width), np.dtype("<u2"))}

    def encode(self, states_RD: "Tensor", calibration: Calibration) -> tuple["Tensor", ...]:
        """Encode states; every value that is not finite becomes an outlier."""
        import torch

        R, D = states_RD.shape
        size = self.group_of(D)
        device = states_RD.device
        mean_D, std_D = calibration.on(device)
        # A tensor: by a Python number, a GPU would multiply with its inverse. Filled there: a copy would be waited for.
        largest = torch.full((), float(self.largest), device=device)
        values_RN = torch.empty(R, self.stored(D)[0], dtype=getattr(torch, self.stored(D)[1].name), device=device)
        scale_RG = torch.empty(R, D // size, dtype=torch.bfloat16, device=device)
        outlier_at = []
        steps = _pieces(R, D, device)
        for first in steps:
            part = slice(first, first + steps.step)
            z_rD = (states_RD[part].float() - mean_D).div_(std_D)  # not in place: the states are the caller's
            out_rD = ~(z_rD.abs() <= self.reach(z_rD))  # whatever is not finite, too
            z_rD.masked_fill_(out_rD, 0)
            z_rGc = z_rD.view(len(z_rD), -1, size)
            scale_RG[part] = z_rGc.abs().amax(-1).div_(largest)
            z_rGc.div_(scale_RG[part].float()[..., None])
            values_RN[part] = self.store(self.round_(z_rD).to(torch.int8))
            outlier_at.append(out_rD.nonzero())
            outlier_at[-1][:, 0] += first
        at_e2 = torch.cat(outlier_at) if outlier_at else torch.empty(0, 2, dtype=torch.int64, device=device)
        value_e = states_RD[at_e2[:, 0], at_e2[:, 1]]
        bits_e = value_e.view(torch.int16 if value_e.dtype == torch.bfloat16 else torch.int32)
        return values_RN, scale_RG.view(torch.int16), torch.column_stack([at_e2, bits_e]).int()

    def reach(self, z_rD: "Tensor") -> "Tensor":
        """How far out an entry of each row may be, in stds, [r, 1]: beyond it is an outlier."""
        rms_r1 = z_rD.clamp(-OUTLIER_STDS, OUTLIER_STDS).square_().mean(-1, keepdim=True).sqrt_()
        return rms_r1.mul_(self.outlier_rms).clamp_(max=OUTLIER_STDS)

    def decode(self, arrays: tuple["Tensor", ...], calibration: Calibration, out_RD: "Tensor") -> None:
        import torch

        values_RN, scale_RG = arrays
        (R, D), device = out_RD.shape, out_RD.device
        mean_D, std_D = calibration.on(device)
        scale_RG1 = scale_RG.view(torch.bfloat16).float()[..., None]
        step = _pieces(R, D, device).step
        unpacked = step * UNPACKED if torch.get_num_threads() == 1 else step
        room_2rD = torch.empty(2, min(step, R), D, device=device)
        for first in range(0, R, unpacked):
            q_rD = self.restore(values_RN[first : first + unpacked], D)
            for at in range(0, len(q_rD), step):
                x_rD, spare_rD = room_2rD[:, : len(q_rD) - at]
                part = slice(first + at, first + at + len(x_rD))
                self.level_(x_rD.copy_(q_rD[at : at + step]), spare_rD)
                x_rD.view(len(x_rD), -1, self.group_of(D)).mul_(scale_RG1[part])
                out_RD[part] = x_rD.mul_(std_D).add_(mean_D)


def _pieces(rows: int, width: int, device: "torch.device") -> range:
    """The first rows of the pieces processed at a time, as a range whose step is the piece; a GPU takes all at once."""
    import torch

    size = CPU_BYTES if torch.get_num_threads() == 1 else SHARED_BYTES
    return range(0, rows, rows if device.type != "cpu" and rows else max(1, size // (4 * width)))
