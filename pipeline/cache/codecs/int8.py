"""int8: states in units of their channel's spread, a byte each, with a scale for every 128 channels of a row.

    z = (x - mean) / spread     entries beyond 16, or 4 times the row's rms, escape: kept as they are, z := 0
    scale = bf16(max|z| / 127)  for each group of a row; 0 where all are 0
    q = round(z / scale)        within +-127
    x' = ((q * scale) * spread) + mean, each step rounded in float32, then rounded to the column's dtype

Never a fused multiply-add, whose single rounding would make a GPU's bits differ from a CPU's. Promise: an entry that
does not escape is within 16/254 of its channel's spread, and the roundings of `scale` and of the result beside it. The
second rule of escapes keeps the step of every row below 4/127 of its own rms, so its error near 4/127/sqrt(12) = 0.9 %
of it at most: without that rule, a few tokens of the bundled target were off by 1.2 to 1.9 %.

    R rows   D channels   G groups of a row   e escapes
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.codecs.calibration import Calibration
from pipeline.cache.codecs.int8_files import ESCAPE_RMS, ESCAPE_SPREADS, Encoded, group_of

LEVELS = 127
# Bytes of float32 that a CPU works on at a time: they stay in its own cache. Where torch may share out work, which it
# does with more than 32,768 values, so few that it starts no threads: readers are threads already.
CPU_BYTES, SHARED_BYTES = 512 << 10, 128 << 10
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}  # of a value, to be written in its dtype


def as_stored(states: Tensor) -> np.ndarray:
    """Return states as they are stored raw: uint16 bits of bfloat16, or float32."""
    return states.view(torch.int16).numpy().view(np.uint16) if states.dtype == torch.bfloat16 else states.numpy()


def as_states(stored: np.ndarray) -> Tensor:
    """Return what `as_stored` gave as a tensor again."""
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)


def _pieces(rows: int, width: int, device: torch.device) -> range:
    """First rows of the pieces that are worked on at a time; a GPU takes all at once."""
    size = CPU_BYTES if torch.get_num_threads() == 1 else SHARED_BYTES
    return range(0, rows, rows if device.type != "cpu" and rows else max(1, size // (4 * width)))


def encode(states_RD: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor, Tensor]:
    """Return q int8 [R, D], scale int16 [R, G] (bits of bfloat16) and escapes int32 [e, 3], all on the states' device.

    An escape is row, column and bits, in that order of rows and columns. Whatever is not finite escapes.
    """
    R, D = states_RD.shape
    size = group_of(D)
    device = states_RD.device
    mean_D, spread_D = calibration.on(device)
    levels = torch.tensor(float(LEVELS), device=device)  # a tensor: a GPU multiplies by the inverse of a number
    q_RD = torch.empty(R, D, dtype=torch.int8, device=device)
    scale_RG = torch.empty(R, D // size, dtype=torch.bfloat16, device=device)
    beyond = []
    steps = _pieces(R, D, device)
    for first in steps:
        part = slice(first, first + steps.step)
        z_rD = (states_RD[part].float() - mean_D).div_(spread_D)  # never in place: they are the caller's
        rms_r1 = z_rD.clamp(-ESCAPE_SPREADS, ESCAPE_SPREADS).square_().mean(-1, keepdim=True).sqrt_()
        out_rD = ~(z_rD.abs() <= (rms_r1 * ESCAPE_RMS).clamp_(max=ESCAPE_SPREADS))  # whatever is not finite, too
        z_rD.masked_fill_(out_rD, 0)
        z_rGc = z_rD.view(len(z_rD), -1, size)
        scale_RG[part] = z_rGc.abs().amax(-1).div_(levels)
        scale_rG1 = scale_RG[part].float()[..., None]
        q_RD[part] = z_rGc.div_(scale_rG1).round_().clamp_(-LEVELS, LEVELS).nan_to_num_(0).view(-1, D)
        beyond.append(out_rD.nonzero() + torch.tensor([first, 0], device=device))
    at_e2 = torch.cat(beyond) if beyond else torch.empty(0, 2, dtype=torch.int64, device=device)
    own_e = states_RD[at_e2[:, 0], at_e2[:, 1]]
    bits_e = own_e.view(torch.int16 if own_e.dtype == torch.bfloat16 else torch.int32)
    return q_RD, scale_RG.view(torch.int16), torch.column_stack([at_e2, bits_e]).int()


def encoded(states_RD: Tensor, calibration: Calibration) -> Encoded:
    """Encode states and bring them to the host as they are stored."""
    parts = [part.cpu() for part in encode(states_RD, calibration)]
    return on_host(parts, calibration, str(states_RD.dtype).removeprefix("torch."))


def on_host(parts: Sequence[Tensor], calibration: Calibration, dtype: str) -> Encoded:
    """What `encode` gave, now on the host, as it is stored."""
    q_RD, scale_RG, escapes_e3 = (part.numpy() for part in parts)
    return Encoded(q_RD, scale_RG.view(np.uint16), escapes_e3, calibration, dtype)


def decode(held: Encoded, device: torch.device | str = "cpu", out: Tensor | None = None) -> Tensor:
    """Return the states [R, D] on `device`, in the column's dtype; with `out`, in that tensor."""
    R, D = held.values.shape
    size = group_of(D)
    device = torch.device(device)
    mean_D, spread_D = held.calibration.on(device)
    q_RD = _sent(held.values, device)
    scale_RG1 = _sent(held.scale.view(np.int16), device).view(torch.bfloat16).float()[..., None]
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
        out_rD.copy_(x_rD.mul_(spread_D).add_(mean_D))
    if len(held.escapes):
        kind = np.int16 if held.dtype == "bfloat16" else np.int32
        rows, columns = (_sent(held.escapes[:, k].astype(np.int64), device) for k in (0, 1))
        bits = _sent(held.escapes[:, 2].astype(kind), device)
        out.view(bits.dtype)[rows, columns] = bits
    return out


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def promised(states_RD: Tensor, spread_D: Tensor) -> Tensor:
    """The largest error that int8 allows each entry [R, D]: half a step of a full group, and the roundings."""
    half_step_D = spread_D * (ESCAPE_SPREADS / (2 * LEVELS) * (1 + 2.0**-8))
    return half_step_D + ROUNDING[states_RD.dtype] * states_RD.float().abs()
