"""Calibration: for each channel of a column, where its values lie and how wide they spread. int8 measures in it.

Made once per cache and column, from the samples that come first by the hash of their name, before anything is encoded;
whoever adds to the cache later uses the same. Kept in `calibration/<column>.json`, and again in every column
that was encoded with it, so that a shard can be read alone.

    N rows looked at   D channels
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from pipeline.cache.atomic import commit_lock, write_errors, write_file
from pipeline.cache.layout import CALIBRATION, IDENTITY
from pipeline.cache.manifest import canonical, read_canonical
from pipeline.cache.samples import ShardPlan
from pipeline.errors import CacheError

TOKENS = 65_536  # of the samples looked at, or all there are
TRIMMED = 0.005  # of the values at either end, which are left out
FLOOR = 2.0**-20  # of the median spread: a channel that never moves still needs a unit
LEAST = 2.0**-100  # where no channel moves at all
FORM = {"cache": str, "column": str, "rows": int, "mean": [float], "spread": [float]}
_CHANNELS = 64  # worked on at a time


@dataclass(frozen=True, eq=False)
class Calibration:
    """mean and spread of each channel, float32 [D] each; no spread is zero."""

    mean: np.ndarray
    spread: np.ndarray
    _placed: dict = field(default_factory=dict, repr=False)

    def on(self, device) -> tuple:
        """Mean and spread as tensors on a torch device, copied there once."""
        import torch

        if device not in self._placed:
            self._placed[device] = tuple(torch.from_numpy(held.copy()).to(device) for held in (self.mean, self.spread))
        return self._placed[device]


def as_floats(stored: np.ndarray) -> np.ndarray:
    """Stored values as float32: bits of bfloat16 (uint16), or float32 already."""
    return stored if stored.dtype == np.float32 else (stored.astype(np.uint32) << 16).view(np.float32)


def calibrate(stored_ND: np.ndarray) -> Calibration:
    """Mean, and rms about it, of each channel's values between its 0.5 % and 99.5 % quantiles.

    Trimmed, so that the few tokens that sink all attention do not set the unit of the rest. Rows that are not finite
    are left out. Sums are taken in float64, so the mean of equal values is that value.
    """
    usable = stored_ND[[bool(np.isfinite(as_floats(row)).all()) for row in stored_ND]]
    assert len(usable), "no finite row to calibrate with"
    count, width = usable.shape
    cut = int(TRIMMED * count)
    mean, spread = np.empty((2, width))
    for first in range(0, width, _CHANNELS):
        part = slice(first, min(first + _CHANNELS, width))
        values = np.ascontiguousarray(as_floats(usable[:, part]).T)
        values.partition([cut, count - 1 - cut], axis=1)
        inner = values[:, cut : count - cut].astype(np.float64)
        mean[part] = inner.mean(axis=1)
        spread[part] = np.sqrt(np.square(inner - mean[part, None]).mean(axis=1))
    floor = max(FLOOR * float(np.median(spread)), LEAST)
    return Calibration(mean.astype(np.float32), np.maximum(spread, floor).astype(np.float32))


def calibration_samples(shards: list[ShardPlan]) -> Iterator[tuple[ShardPlan, int]]:
    """Yield samples in the order in which a calibration takes them: by the hash of their name."""
    names = np.concatenate([shard.sample_ids for shard in shards]).astype(">u8")
    hashes = np.array([xxhash.xxh3_64_intdigest(name.tobytes()) for name in names], np.uint64)
    starts = np.cumsum([0, *map(len, shards)])
    for i in np.lexsort((names[:, 1], names[:, 0], hashes)).tolist():
        shard = int(np.searchsorted(starts, i, side="right")) - 1
        yield shards[shard], i - int(starts[shard])


def _path(cache: Path, column: str) -> Path:
    return cache / CALIBRATION / f"{column}.json"


def read_calibration(cache: Path, column: str, width: int) -> Calibration | None:
    """The cache's calibration of a column; None when there is none. CacheError for a damaged or foreign one."""
    path = _path(cache, column)
    if not path.exists():
        return None
    facts = read_canonical(path, FORM)
    with np.errstate(over="ignore"):  # what is beyond float32 is not finite in it, and refused
        mean, spread = (np.array(facts[name], np.float64).astype(np.float32) for name in ("mean", "spread"))
    right = facts["cache"] == read_canonical(cache / IDENTITY)["hash"] and facts["column"] == column
    right = right and len(mean) == len(spread) == width and np.isfinite([mean, spread]).all() and (spread > 0).all()
    if not right:
        raise CacheError(f"{path}: another cache's or column's; remove it, and every {column} that was encoded with it")
    return Calibration(mean, spread)


def keep_calibration(cache: Path, column: str, calibration: Calibration, rows: int) -> Calibration:
    """Store a calibration, unless the cache got one meanwhile; returns the one that counts. Raises RoomError."""
    width = len(calibration.mean)
    facts = {
        "cache": read_canonical(cache / IDENTITY)["hash"],
        "column": column,
        "rows": rows,
        "mean": _shortest(calibration.mean),
        "spread": _shortest(calibration.spread),
    }
    with write_errors(cache, "a calibration"), commit_lock(cache):
        held = read_calibration(cache, column, width)
        if held is None:
            write_file(_path(cache, column), canonical(facts))
    return held or calibration


def _shortest(values: np.ndarray) -> list[float]:
    """The shortest decimals that are these float32 again."""
    return [float(str(value)) for value in values]
