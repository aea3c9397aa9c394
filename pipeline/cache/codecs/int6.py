"""int6 encoding: six bits a value, levels further apart the further out, a scale for every 64 channels.

q is a whole number within +-31, and its level q * (q^2 + 1024): steps grow by 3.7 from a group's middle to its largest
entry (61535), since most entries lie near the middle. See `scaled_groups.py` for what becomes of it. On real states
that has 0.023 of a channel's std as its error, where equal steps have 0.027, and an entry far out costs the rest of
its group less, so fewer have to be outliers: beyond 6 rms of their row, and not 4 as in int8.

Stored are codes q + 32, four in three bytes. A row of D channels is cut into four quarters of Q = ceil(D / 4) channels,
the last filled up with zeros. The low six bits of bytes 0 .. 3Q - 1 are the codes of the first three quarters. What is
left of them, two bits each, are the codes of the fourth: of its channel j bits 0-1 in byte j, bits 2-3 in byte Q + j,
bits 4-5 in byte 2Q + j. So rows have one size, any row can be read alone, and a CPU or a GPU decodes by a few
operations on whole rows. Equal steps of a twelfth of the row's rms, compressed by zstd, have the same error and are
smaller, 0.34 to 0.36 of bfloat16; but a row is then read by decoding a chunk, on a CPU, and how large a cache becomes
is known only once it is there (`tests/bench/codecs.py` has both).
"""

from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.codecs.scaled_groups import SCALE_ROUNDING, ScaledGroups

if TYPE_CHECKING:
    from torch import Tensor

TOP = 31  # the largest q
FLATNESS = 1024  # the larger, the more equal the steps
ZERO = 32  # the code of q = 0
# q is found as a ratio of polynomials of the level over the largest, within 0.04 of a step.
INVERSE = (59.4142904, 204.85997, 6.22383396, 1.31048654)
HALF_STEP = 0.034  # the largest error of that, of the group's largest entry: the last step is 0.062 of it


class Int6(ScaledGroups):
    """The codec. An error is at most about half the outermost step of a group as far out as one may be in its row."""

    name = "int6"
    group = 64
    outlier_rms = 6.0
    largest = TOP * (TOP**2 + FLATNESS)
    probe_allowance = 0.045
    # Where every group has an entry of 6 rms, a row's error is 0.04 of its own deviation.
    max_of_token = 0.05
    max_of_channels = 0.07

    def stored(self, width: int) -> tuple[int, np.dtype]:
        return 3 * -(-width // 4), np.dtype("u1")

    def formula(self, width: int, dtype: str) -> str:
        Q, group = -(-width // 4), self.group_of(width)
        return (
            f"q = (values & 63) - 32 of channels 0 to {3 * Q - 1}, of the rest (values[:, :{Q}] >> 6 | values[:, "
            f"{Q}:{2 * Q}] >> 4 & 12 | values[:, {2 * Q}:] >> 2 & 48) - 32; {dtype}((((q * (q * q + {FLATNESS})) * "
            f"scale[:, channel // {group}]) * channels[1]) + channels[0]), float32; then the escapes"
        )

    def error_bound(self, states_RD: "Tensor", calibration: Calibration) -> "Tensor":
        """Half the last step of a group whose largest entry is as far out as one may be in its row, [R, D]."""
        mean_D, std_D = calibration.on(states_RD.device)
        reach_R1 = self.reach((states_RD.float() - mean_D) / std_D)
        return std_D * (reach_R1 * (HALF_STEP * SCALE_ROUNDING))

    def round_(self, z_rD: "Tensor") -> "Tensor":
        a, b, c, d = INVERSE
        u_rD = z_rD.mul_(1 / self.largest).clamp_(-1, 1)
        s_rD = u_rD.square()
        divisor_rD = s_rD.mul(d).add_(c).mul_(s_rD).add_(1)
        return u_rD.mul_(s_rD.mul_(b).add_(a)).div_(divisor_rD).round_().clamp_(-TOP, TOP).nan_to_num_(0)

    def store(self, q_rD: "Tensor") -> "Tensor":
        import torch

        r, D = q_rD.shape
        Q = -(-D // 4)
        codes_rC = torch.zeros(r, 4 * Q, dtype=torch.uint8, device=q_rD.device)
        codes_rC[:, :D] = q_rD.add_(ZERO)
        values_rN, last_rQ = codes_rC[:, : 3 * Q], codes_rC[:, 3 * Q :]
        for place in range(3):
            values_rN[:, place * Q : (place + 1) * Q] |= (last_rQ >> (2 * place)) << 6
        return values_rN

    def restore(self, values_rN: "Tensor", width: int) -> "Tensor":
        import torch

        r, Q = len(values_rN), values_rN.shape[1] // 3
        codes_rC = torch.empty(r, 4 * Q, dtype=torch.uint8, device=values_rN.device)
        torch.bitwise_and(values_rN, 63, out=codes_rC[:, : 3 * Q])
        last_rQ = torch.bitwise_right_shift(values_rN[:, :Q], 6, out=codes_rC[:, 3 * Q :])
        last_rQ |= (values_rN[:, Q : 2 * Q] >> 4) & 12
        last_rQ |= (values_rN[:, 2 * Q :] >> 2) & 48
        return codes_rC.view(torch.int8).sub_(ZERO)[:, :width]

    def level_(self, q_rD: "Tensor", spare_rD: "Tensor") -> "Tensor":
        import torch

        return q_rD.mul_(torch.mul(q_rD, q_rD, out=spare_rD).add_(FLATNESS))
