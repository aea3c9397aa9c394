"""Certificate: what an int8 column does to its states, measured on some that were kept as they were, and its bounds.

A column that does worse than promised is refused: first on the samples it was calibrated with, before anything of it is
written, then on every shard's shadow, the first block of some samples.

    R rows   D channels   V vocabulary
"""

import torch
from torch import Tensor

from pipeline.cache.calibration import Calibration, calibrate, calibration_samples
from pipeline.cache.codecs import PROMISE
from pipeline.cache.int8 import as_stored, decode, encoded, promised
from pipeline.cache.layout import BLOCK_ROWS
from pipeline.cache.samples import ShardPlan
from pipeline.errors import DataError, ProofError
from pipeline.head_chunk import chunk_rows
from pipeline.target_head import TargetHead

SHADOW_ROWS = 2048  # of a shard
MOST_ERROR = 0.008  # relative, over all tokens


def shadow_samples(shard: ShardPlan) -> list[int]:
    """Return the samples of a shard whose first block is kept raw until the shard is proven, ascending."""
    chosen, rows = [], 0
    for _, row in calibration_samples([shard]):
        chosen.append(row)
        rows += min(BLOCK_ROWS, int(shard.lengths[row]))
        if rows >= SHADOW_ROWS:
            break
    return sorted(chosen)


class Certificate:
    """Sums over rows of a column; `head`, for `final`, also compares what the target would say."""

    def __init__(self, column: str, codec: str, calibration: Calibration, head: TargetHead | None = None):
        self.column, self.codec = column, codec
        self.calibration, self.head = calibration, head
        self.rows = self.entries = 0
        self.squares = self.norm = self.spreads = 0.0
        self.worst = self.of_promise = 0.0
        self.agree = self.divergence = 0.0

    def add(self, truth_RD: Tensor, found_RD: Tensor) -> None:
        """Count rows as they were and as they are decoded."""
        spread_D = self.calibration.on(truth_RD.device)[1]
        error_RD = found_RD.float() - truth_RD.float()
        error_R, norm_R = error_RD.double().norm(dim=-1), truth_RD.double().norm(dim=-1)
        self.rows += len(truth_RD)
        self.entries += truth_RD.numel()
        self.squares += float(error_R.square().sum())
        self.norm += float(norm_R.square().sum())
        self.spreads += float((error_RD / spread_D).double().square().sum())
        self.worst = max(self.worst, float((error_R / norm_R.clamp_min(1e-30)).max()))
        self.of_promise = max(self.of_promise, float((error_RD.abs() / promised(truth_RD, spread_D)).max()))
        step = chunk_rows(self.head.vocab_size, truth_RD.device.type) if self.head else 1
        for first in range(0, len(truth_RD) if self.head else 0, step):
            part = slice(first, first + step)
            truth_RV, found_RV = (self.head.logits(states[part]) for states in (truth_RD, found_RD))
            self.agree += int((truth_RV.argmax(-1) == found_RV.argmax(-1)).sum())
            truth_RV, found_RV = truth_RV.log_softmax(-1), found_RV.log_softmax(-1)
            self.divergence += float((truth_RV.exp() * (truth_RV - found_RV)).sum(dtype=torch.float64))

    def facts(self, escapes_a_row: float) -> dict:
        """What the column's manifest says: errors relative, in spreads of a channel, and of what is promised an entry.

        Raises ProofError when a bound is passed.
        """
        error, worst = (self.squares / max(self.norm, 1e-60)) ** 0.5, self.worst
        found = {
            "rows": self.rows,
            "error": _short(error),
            "worst_token": _short(worst),
            "spread_error": _short((self.spreads / max(self.entries, 1)) ** 0.5),
            "of_promise": _short(self.of_promise),
            "escapes_a_row": _short(escapes_a_row),
        }
        if self.head:
            found |= {"top1": _short(self.agree / self.rows), "kl": _short(self.divergence / self.rows)}
        if not (error <= MOST_ERROR and worst <= PROMISE[self.codec] and self.of_promise <= 1):
            raise ProofError(
                f"{self.column} does not fit {self.codec}: error {error:.2e} where {MOST_ERROR} is promised, of a "
                f"token {worst:.2e} where {PROMISE[self.codec]}, of an entry {self.of_promise:.2f} times its bound; "
                f"keep this column whole: --codec {self.column}=zstd"
            )
        return found


def _short(value: float) -> float:
    return float(f"{value:.2e}")


def proven_calibration(column: str, codec: str, states_RD: Tensor, device: str | torch.device) -> Calibration:
    """Calibrate a column with states [R, D] on the host; ProofError where its codec breaks its promise on them.

    Rows that a capture refuses, not finite or all zero, promise nothing; DataError where there are no others.
    """
    kept = [part_RD.isfinite().all(-1) & part_RD.any(-1) for part_RD in states_RD.split(2 * SHADOW_ROWS)]
    if not any(kept_R.any() for kept_R in kept):
        raise DataError(
            f"{column}: no token that was looked at has a state that can be kept; the target's weights are damaged, or "
            "its type is too narrow: try --dtype bfloat16 or float32"
        )
    calibration = calibrate(as_stored(states_RD))
    certificate = Certificate(column, codec, calibration)
    escapes = 0
    for part_RD, kept_R in zip(states_RD.split(2 * SHADOW_ROWS), kept, strict=True):
        if not kept_R.any():
            continue
        truth_RD = part_RD[kept_R].to(device)
        held = encoded(truth_RD, calibration)
        escapes += len(held.escapes)
        certificate.add(truth_RD, decode(held, device))
    certificate.facts(escapes / max(1, certificate.rows))
    return calibration
