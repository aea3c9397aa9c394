"""The calibration of a lossy codec's column, and its certificate: the error against exact states, and its bounds.

A calibration is made once per cache and column, before anything is encoded, from the samples with the lowest hashes of
their ids; later captures into the cache use the same (`calibrations.py`). It is stored again in every column encoded
with it, so that a shard can be read alone.

A column that exceeds a bound is refused: first on the samples it was calibrated with, before anything of it is written,
then on every shard's shadow, the first block of some samples kept raw. Bounds are relative to how far the states
themselves vary, since a draft reads a linear map of them and any channel may carry what it needs. An error e of an
entry x, in a channel of mean m and std c (calibrated), is normalised f = e / c, and its deviation z = (x - m) / c:

    of_promise    of an entry: |e| over the largest error that the codec promises, its `error_bound`
    of_token      of a row: rms of f over rms of z; bounded by the codec's `max_of_token`
    of_channels   of a channel: rms of f over the std of z in these rows, each row's f and z over its rms of z first,
                  so that attention sinks do not count for more. The 90 % quantile over channels
    kl            of `final`: mean KL(p || p') of the head's distributions for the exact and the decoded state

`error` and `worst_token`, relative to the states' norm, have no bound: a few massive channels make up the norm of most
tokens, and tokens without them have a large error relative to the rest. `of_channels` does not rely on the calibration,
so it catches states calibrated with another layer's. Measured (bfloat16; 2,000 tokens a column, the worst column's
figure, and the head's for `final`; each deep target has 36 random layers of width 512):

    target                                      of_promise  of_token  of_channels  worst_token  error   final: KL  top-1
    Gemma 3 270M, layers 1 4 8 12 15      int8  0.58        0.0086    0.0074       0.0192       0.0044  7.2e-05    0.999
                                          int6  0.60        0.0256    0.0243       0.0350       0.0124  8.1e-04    0.994
    the bundled target, layers 1 3 5      int8  0.95        0.0095    0.0085       0.0121       0.0063  4.4e-06    0.997
                                          int6  0.73        0.0309    0.0260       0.0386       0.0213  3.8e-05    0.983
    deep, weights of std 0.02             int8  0.49        0.0080    0.0068       0.0087       0.0065  4.0e-06    0.991
                                          int6  0.50        0.0245    0.0231       0.0256       0.0220  4.5e-05    0.974
    deep, weights of std 0.05             int8  0.39        0.0083    0.0068       0.0083       0.0066  3.4e-05    0.990
                                          int6  0.53        0.0251    0.0229       0.0248       0.0223  3.2e-04    0.967

An encoder of half the levels is refused, as it does worse on a token: int8 0.016 to 0.019, int6 0.07. In few rows a
channel varies less than in all, so they show more of an error: single samples of Gemma, of 127 rows, have up to 0.017
of a channel in int8 and 0.048 in int6, twice what all have. Whether a draft still learns is decided by paired
training: the bundled target, Domino, 200 steps, accept length on held-out samples' own states.

    objective ce, three seeds: 4.073 4.023 4.049 from the states, 4.072 4.025 4.049 from int8 layers; ratio 1.000
    [0.999, 1.001]. One seed from coarser layers: 4.031 with 31 levels (0.034 of a channel), 4.045 with 15 (0.07)
    the same, six seeds: 4.059 4.011 4.008 4.038 3.900 3.748 from the states, 4.020 4.012 4.009 4.067 3.907 3.759 from
    int6; ratio 1.0005 [0.9946, 1.0065]
    objective kl, one seed: 3.962 from the states, 4.009 from int8 `final`, 3.916 from one of 3 levels (KL 7.5e-3)
    the same, six seeds, 80 steps: 2.329 2.361 2.375 2.370 2.395 2.356 from the states, 2.330 2.363 2.376 2.371 2.403
    2.357 from int6 layers and `final`; ratio 1.0010 [0.9998, 1.0023]

Seeds differ by 0.05. So the bounds are where a codec that works does not come, and before a draft notices. fp8 with one
scale a token, which others train with, has 0.028 to 0.039 of a channel and a KL of 7e-4 on Gemma.

    R, N rows   D channels   V vocabulary
"""

from collections.abc import Iterator

import numpy as np
import torch
import xxhash
from torch import Tensor

from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.codecs.lossy import LossyCodec
from pipeline.cache.layout import CHECKSUM_ROWS
from pipeline.cache.samples import ShardPlan
from pipeline.errors import DataError, ProofError
from pipeline.target.head import TargetHead, chunk_rows
from pipeline.tensors import as_stored

TOKENS = 65_536  # of the samples a calibration is made from, or all there are
TRIMMED_SHARE = 0.005  # share of the values left out at either end
FLOOR = 2.0**-20  # smallest std, of the median std: a constant channel must not divide by zero
LEAST = 2.0**-100  # smallest std where all channels are constant
CALIBRATED_CHANNELS = 64  # at a time
SHADOW_ROWS = 2048  # rows kept raw per shard
CHANNELS_SHARE = 0.9  # the rest may be constant in these rows only
CHANNELS_ROWS = 32  # with fewer, a channel's std in them means nothing
MAX_KL = 5e-3
MOST_LOGITS = 1 << 26  # of a shard, for each of both: every row up to 32,768 tokens, every eighth of 262,144
BOUND_TEXTS = {
    "of_promise": "an entry is off by so many times its bound:",
    "of_token": "a token by so much of its own deviation:",
    "of_channels": "a tenth of the channels by more of their range than",
    "kl": "what the head makes of it differs by a KL of",
}
CLAMP_STDS = 16.0  # a deviation counts for no more
TINY = 1e-30
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}  # largest relative error of rounding to the dtype


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
    for first in range(0, width, CALIBRATED_CHANNELS):
        part = slice(first, min(first + CALIBRATED_CHANNELS, width))
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


def shadow_samples(shard: ShardPlan) -> list[int]:
    """Return the samples of a shard whose first block is kept raw until the shard's error is measured, ascending."""
    chosen, rows = [], 0
    for _, row in calibration_samples([shard]):
        chosen.append(row)
        rows += min(CHECKSUM_ROWS, int(shard.lengths[row]))
        if rows >= SHADOW_ROWS:
            break
    return sorted(chosen)


class Certificate:
    """Error sums over rows of a column; with `head`, for `final`, also of the target's next-token distributions."""

    def __init__(self, column: str, codec: str, calibration: Calibration, head: TargetHead | None = None):
        self.column, self.codec = column, CODECS[codec]
        self.calibration, self.head = calibration, head
        self.rows = self.entries = 0
        self.squares = self.norm = self.normalised_squares = 0.0
        self.worst = self.of_token = self.of_promise = 0.0
        self.channels_3D: Tensor | None = None  # sums of y, y^2 and f^2 of each channel
        self.agree = self.divergence = 0.0
        self.judged = 0  # rows whose distributions were compared

    def add(self, truth_RD: Tensor, found_RD: Tensor) -> None:
        """Add rows: exact states [R, D] and the same decoded."""
        error_RD = found_RD.float() - truth_RD.float()
        error_R, norm_R = error_RD.double().norm(dim=-1), truth_RD.double().norm(dim=-1)
        self.rows += len(truth_RD)
        self.entries += truth_RD.numel()
        self.squares += float(error_R.square().sum())
        self.norm += float(norm_R.square().sum())
        self.worst = max(self.worst, float((error_R / norm_R.clamp_min(1e-30)).max()))
        self._add_normalised(truth_RD, error_RD)
        if self.head:
            self._add_logits(truth_RD, found_RD)

    def _add_normalised(self, truth_RD: Tensor, error_RD: Tensor) -> None:
        mean_D, std_D = self.calibration.on(truth_RD.device)
        bound_RD = largest_errors(self.codec, truth_RD, self.calibration)
        self.of_promise = _larger(self.of_promise, error_RD.abs() / bound_RD)
        z_RD = ((truth_RD.float() - mean_D) / std_D).clamp_(-CLAMP_STDS, CLAMP_STDS)
        # Not counted: the rounding of float32 itself, which is all that states equal to their channel's mean have.
        rounding_RD = truth_RD.float().abs() * ROUNDING[torch.float32]
        f_RD = (error_RD.abs() - rounding_RD).clamp_min_(0).div_(std_D)
        rms_R1 = _rms(z_RD).clamp_min(TINY)
        self.normalised_squares += float(f_RD.square().sum(dtype=torch.float64))
        self.of_token = _larger(self.of_token, _rms(f_RD) / rms_R1)
        z_RD, f_RD = z_RD.div_(rms_R1), f_RD.div_(rms_R1)
        sums = [part_RD.sum(0, dtype=torch.float64) for part_RD in (z_RD, z_RD.square(), f_RD.square())]
        self.channels_3D = torch.stack(sums) + (0 if self.channels_3D is None else self.channels_3D)

    def _add_logits(self, truth_RD: Tensor, found_RD: Tensor) -> None:
        apart = -(-SHADOW_ROWS * self.head.vocab_size // MOST_LOGITS)
        truth_RD, found_RD = truth_RD[::apart], found_RD[::apart]
        self.judged += len(truth_RD)
        step = chunk_rows(self.head.vocab_size, truth_RD.device.type)
        for truth_rD, found_rD in zip(truth_RD.split(step), found_RD.split(step), strict=True):
            truth_RV, found_RV = self.head.logits(truth_rD), self.head.logits(found_rD)
            self.agree += int((truth_RV.argmax(-1) == found_RV.argmax(-1)).sum())
            truth_RV, found_RV = truth_RV.log_softmax(-1), found_RV.log_softmax(-1)
            self.divergence += float((truth_RV.exp() * (truth_RV - found_RV)).sum(dtype=torch.float64))

    def of_channels(self) -> float:
        """The 90 % quantile over channels of error relative to the channel's std in these rows; 0 with too few rows."""
        if self.rows < CHANNELS_ROWS:
            return 0.0
        sum_D, square_D, error_D = self.channels_3D / self.rows
        variance_D = (square_D - sum_D.square()).clamp_min(0)
        of_D = torch.where(error_D > 0, error_D / variance_D.clamp_min(TINY), 0).sqrt()
        return float(of_D.kthvalue(max(1, int(CHANNELS_SHARE * len(of_D)))).values)

    def facts(self, outliers_per_row: float) -> dict:
        """The certificate in the column's manifest: relative errors, `spread_error` in stds, and figures with bounds.

        Raises ProofError when a bound is exceeded.
        """
        found = {
            "rows": self.rows,
            "error": _short((self.squares / max(self.norm, 1e-60)) ** 0.5),
            "worst_token": _short(self.worst),
            "spread_error": _short((self.normalised_squares / max(self.entries, 1)) ** 0.5),
            "of_token": _short(self.of_token),
            "of_channels": _short(self.of_channels()),
            "of_promise": _short(self.of_promise),
            "escapes_a_row": _short(outliers_per_row),
        }
        bounds = {"of_promise": 1.0, "of_token": self.codec.max_of_token, "of_channels": self.codec.max_of_channels}
        if self.head:
            found |= {"top1": _short(self.agree / self.judged), "kl": _short(self.divergence / self.judged)}
            bounds["kl"] = MAX_KL
        broken = [name for name, bound in bounds.items() if not found[name] <= bound]
        if broken:
            says = ", ".join(
                f"{BOUND_TEXTS[name]} {found[name]:.2e} where {bounds[name]:.2e} is promised" for name in broken
            )
            raise ProofError(
                f"{self.column} does not fit {self.codec.name}: {says}; keep this column whole: "
                f"--codec {self.column}=zstd"
            )
        return found


def largest_errors(codec: LossyCodec, states_RD: Tensor, calibration: Calibration) -> Tensor:
    """The largest error of each entry [R, D] that a codec promises, with the rounding to the states' dtype."""
    return codec.error_bound(states_RD, calibration) + ROUNDING[states_RD.dtype] * states_RD.float().abs()


def _rms(values_RD: Tensor) -> Tensor:
    return values_RD.square().mean(-1, keepdim=True).sqrt()


def _larger(before: float, values: Tensor) -> float:
    """The maximum of a figure and of a tensor's values; infinite as soon as one is NaN."""
    largest = float(values.max())
    return max(before, largest) if largest == largest else float("inf")


def _short(value: float) -> float:
    return float(f"{value:.2e}")


def checked_calibration(column: str, codec: str, states_RD: Tensor, device: str | torch.device) -> Calibration:
    """Calibrate a column with states [R, D] on the host; ProofError where its codec exceeds a bound on them.

    Rows that a capture refuses, not finite or all zero, are not measured; DataError where there are no others.
    """
    measured = [part_RD.isfinite().all(-1) & part_RD.any(-1) for part_RD in states_RD.split(2 * SHADOW_ROWS)]
    if not any(rows_R.any() for rows_R in measured):
        raise DataError(
            f"{column}: no token that was looked at has a state that can be kept; the target's weights are damaged, or "
            "its type is too narrow: try --dtype bfloat16 or float32"
        )
    calibration = calibrate(as_stored(states_RD))
    certificate = Certificate(column, codec, calibration)
    outliers = 0
    for part_RD, rows_R in zip(states_RD.split(2 * SHADOW_ROWS), measured, strict=True):
        if not rows_R.any():
            continue
        truth_RD = part_RD[rows_R].to(device)
        rows = CODECS[codec].encode_to_host(truth_RD, calibration)
        outliers += len(rows.outliers)
        certificate.add(truth_RD, rows.decode(device))
    certificate.facts(outliers / max(1, certificate.rows))
    return calibration
