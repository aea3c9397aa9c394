"""int8 encoding: one byte a value, levels at equal distances, a scale for every 128 channels; `scaled_groups.py`.

q = round(z / scale), within +-127, is its own level and is stored as it is. Error bound: an entry that is no outlier is
off by at most 16/254 of its channel's std, plus the roundings of `scale` and of the result. The rms rule keeps the step
of every row below 4/127 of its own rms, so its error is about 4/127/sqrt(12) = 0.9 % of that at most; without it, a few
tokens of the bundled target were off by 1.2 to 1.9 %.
"""

from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.codecs.scaled_groups import OUTLIER_STDS, SCALE_ROUNDING, ScaledGroups

if TYPE_CHECKING:
    from torch import Tensor

OUTLIER_RMS = 4.0


class Int8(ScaledGroups):
    """The codec. An error is at most half a step of a group whose largest entry is as far out as one may be."""

    name = "int8"
    group = 128
    outlier_rms = OUTLIER_RMS
    largest = 127
    probe_allowance = 0.012
    max_of_token = (
        OUTLIER_RMS / (2 * largest) * SCALE_ROUNDING
    )  # half a step of a row whose groups are all full: 0.0158

    def stored(self, width: int) -> tuple[int, np.dtype]:
        return width, np.dtype("i1")

    def formula(self, width: int, dtype: str) -> str:
        group = self.group_of(width)
        return (
            f"{dtype}(((values * scale[:, channel // {group}]) * channels[1]) + channels[0]), float32; then the escapes"
        )

    def error_bound(self, states_RD: "Tensor", calibration: Calibration) -> "Tensor":
        """Half a quantisation step of a full group, [D]."""
        return calibration.on(states_RD.device)[1] * (OUTLIER_STDS / (2 * self.largest) * SCALE_ROUNDING)

    def round_(self, z_rD: "Tensor") -> "Tensor":
        return z_rD.round_().clamp_(-self.largest, self.largest).nan_to_num_(0)

    def store(self, q_rD: "Tensor") -> "Tensor":
        return q_rD

    def restore(self, values_rN: "Tensor", width: int) -> "Tensor":
        return values_rN

    def level_(self, q_rD: "Tensor", spare_rD: "Tensor") -> "Tensor":
        return q_rD
