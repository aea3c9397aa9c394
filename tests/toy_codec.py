"""A lossy codec in a few lines, as anyone would write one: 16 bits a value, and a float32 for each row."""

import numpy as np
from torch import Tensor

from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.codecs.lossy import LossyCodec

LEVELS = 32767


class Fixed16(LossyCodec):
    """Whole multiples of a row's largest magnitude over 32767. It needs no calibration and has no outliers."""

    name = "fixed16"
    probe_allowance = 1e-3
    max_of_token = 1e-3

    def arrays(self, width: int) -> dict[str, tuple[int, np.dtype]]:
        return {"steps": (width, np.dtype("<i2")), "largest": (1, np.dtype("<f4"))}

    def encode(self, states_RD: Tensor, calibration: Calibration) -> tuple[Tensor, ...]:
        largest_R1 = states_RD.float().abs().amax(-1, keepdim=True)
        return (states_RD.float() / (largest_R1 / LEVELS)).nan_to_num(0).round().short(), largest_R1

    def decode(self, arrays: tuple[Tensor, ...], calibration: Calibration, out_RD: Tensor) -> None:
        steps_RD, largest_R1 = arrays
        out_RD.copy_(steps_RD.float() * (largest_R1 / LEVELS))

    def error_bound(self, states_RD: Tensor, calibration: Calibration) -> Tensor:
        return states_RD.float().abs().amax(-1, keepdim=True) * (0.51 / LEVELS)

    def formula(self, width: int, dtype: str) -> str:
        return f"{dtype}(steps * (largest / {LEVELS})), float32"
