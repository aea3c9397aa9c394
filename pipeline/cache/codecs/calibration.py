"""Calibration: the mean and std of each channel of a column, by which int8 normalises states.

Made once per cache and column, before anything is encoded, from the samples with the lowest hashes of their ids; later
captures into the cache use the same: `writer.py`. Stored again in every column encoded with it, so that a shard
can be read alone.

    N rows sampled   D channels
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from pipeline.cache.samples import ShardPlan

TOKENS = 65_536  # of the samples a calibration is made from, or all there are
TRIMMED_SHARE = 0.005  # share of the values left out at either end
FLOOR = 2.0**-20  # smallest std, of the median std: a constant channel must not divide by zero
LEAST = 2.0**-100  # smallest std where all channels are constant
_CHANNELS = 64  # calibrated at a time


@dataclass(frozen=True, eq=False)
class Calibration:
    """Mean and std of each channel, float32 [D] each; no std is zero."""

    mean: np.ndarray
    std: np.ndarray
    _on_device: dict = field(default_factory=dict, repr=False)

    def on(self, device) -> tuple:
        """Mean and std as tensors [D] on a torch device, copied there once."""
        import torch

        if device not in self._on_device:
            tensors = (torch.from_numpy(values.copy()).to(device) for values in (self.mean, self.std))
            self._on_device[device] = tuple(tensors)
        return self._on_device[device]


def as_floats(stored: np.ndarray) -> np.ndarray:
    """Convert stored values, bits of bfloat16 (uint16) or float32, to float32."""
    return stored if stored.dtype == np.float32 else (stored.astype(np.uint32) << 16).view(np.float32)


def calibrate(stored_ND: np.ndarray) -> Calibration:
    """Return the mean and std of each channel's values between its 0.5 % and 99.5 % quantiles.

    Trimmed, so that a few attention-sink tokens do not set the std of the rest. Rows that are not finite are left out.
    Sums are taken in float64, so that the mean of equal values is exactly that value.
    """
    usable = stored_ND[[bool(np.isfinite(as_floats(row)).all()) for row in stored_ND]]
    assert len(usable), "no finite row to calibrate with"
    count, width = usable.shape
    cut = int(TRIMMED_SHARE * count)
    mean, std = np.empty((2, width))
    for first in range(0, width, _CHANNELS):
        part = slice(first, min(first + _CHANNELS, width))
        values = np.ascontiguousarray(as_floats(usable[:, part]).T)
        values.partition([cut, count - 1 - cut], axis=1)
        inner = values[:, cut : count - cut].astype(np.float64)
        mean[part] = inner.mean(axis=1)
        std[part] = np.sqrt(np.square(inner - mean[part, None]).mean(axis=1))
    floor = max(FLOOR * float(np.median(std)), LEAST)
    return Calibration(mean.astype(np.float32), np.maximum(std, floor).astype(np.float32))


def calibration_samples(shards: list[ShardPlan]) -> Iterator[tuple[ShardPlan, int]]:
    """Yield (shard, row) of every sample in the order in which a calibration takes them: by the hash of their id."""
    names = np.concatenate([shard.sample_ids for shard in shards]).astype(">u8")
    hashes = np.array([xxhash.xxh3_64_intdigest(name.tobytes()) for name in names], np.uint64)
    starts = np.cumsum([0, *map(len, shards)])
    for i in np.lexsort((names[:, 1], names[:, 0], hashes)).tolist():
        shard = int(np.searchsorted(starts, i, side="right")) - 1
        yield shards[shard], i - int(starts[shard])
