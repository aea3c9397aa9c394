"""Packing: from an engine's states to what a shard stores, for every engine alike.

Rows that a column does not store are dropped on the device, and lossy columns are encoded there, before anything is
copied to the host. Lossy columns are calibrated before the first shard, on the first samples by hash, and a shard's
are certified before it is committed.

    B samples of a micro-batch   T tokens each, padding included   R packed rows   D hidden size
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.catalog import Catalog
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.codecs.error_certificate import (
    TOKENS,
    Certificate,
    calibration_samples,
    checked_calibration,
    shadow_samples,
)
from pipeline.cache.codecs.lossy import Encoded
from pipeline.cache.columns import ColumnSpec, stored_rows
from pipeline.cache.layout import CHECKSUM_ROWS, layer_of
from pipeline.cache.plan import Plan
from pipeline.cache.plan_writer import micro_batches
from pipeline.cache.samples import PlannedSample, ShardPlan, make_batch
from pipeline.cache.writer import ShardWriter, read_calibration, store_calibration
from pipeline.errors import RoomError
from pipeline.target.head import TargetHead
from pipeline.target.on_policy import on_policy_rows, score_tokens
from pipeline.tensors import as_states, as_stored, free_cached_memory, out_of_memory
from stages.cache_hidden.engine import Engine

STATES_BYTES = 1 << 30  # of states to calibrate on, in memory at a time; further columns take another run

ExactRows = dict[str, dict[int, Tensor]]  # column -> sample of the shard -> rows of its first block, as computed


@dataclass
class PackedStates:
    """The states of some samples, packed, on their way to the host: call `wait` before reading.

    rows: column -> rows [R, D], or what their codec's `encode` returns; largest: column -> the largest magnitude of
    each row [R], fp32, not finite where the row is not; counts: column -> rows of each sample; exact: column ->
    the rows [E, D], before encoding, of the first block of each sample in `certified`; on_policy: see `score_tokens`.
    """

    samples: range  # of the shard
    rows: dict[str, Tensor | tuple[Tensor, ...]]
    largest: dict[str, Tensor]
    counts: dict[str, list[int]]
    certified: list[int]
    exact: dict[str, Tensor]
    on_policy: Tensor | None
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Block until everything is on the host."""
        if self.copied is not None:
            self.copied.synchronize()

    def unusable(self) -> Iterator[tuple[int, str]]:
        """Yield the samples whose states are not finite or all zero in a row, with the reason."""
        reasons: dict[int, str] = {}
        for name, largest_R in self.largest.items():
            for sample, rows in zip(self.samples, largest_R.split(self.counts[name]), strict=True):
                if not rows.isfinite().all():
                    reasons.setdefault(sample, f"{name} is not finite")
                elif (rows == 0).any():
                    reasons.setdefault(sample, f"{name} has a row of zeros")
        yield from sorted(reasons.items())

    def exact_rows(self) -> ExactRows:
        """Return the exact rows of each certified sample, which share one copy."""
        return {
            name: dict(zip(self.certified, rows_ED.split([len(part) for part in self.first_blocks(name)]), strict=True))
            for name, rows_ED in self.exact.items()
        }

    def first_blocks(self, name: str) -> list[range]:
        """Return where in a column's packed rows the first block of each certified sample is."""
        starts = np.cumsum([0, *self.counts[name]]).tolist()
        firsts = [sample - self.samples.start for sample in self.certified]
        return [range(starts[at], min(starts[at] + CHECKSUM_ROWS, starts[at + 1])) for at in firsts]


class Packer:
    """Runs an engine on samples of one shard and packs their states.

    Columns in `calibrations` are encoded, and of the `certified` samples, the first block's exact rows are packed, too.
    With a `head`, `on_policy_share` of the supervised rows are scored. split: whether memory forced any micro-batch to
    be halved.
    """

    def __init__(
        self,
        engine: Engine,
        shard: ShardPlan,
        columns: Sequence[ColumnSpec],
        head: TargetHead | None = None,
        on_policy_share: float = 0.0,
        calibrations: Mapping[str, Calibration] = MappingProxyType({}),
    ):
        self.engine, self.shard, self.columns = engine, shard, columns
        self.head, self.on_policy_share = head, on_policy_share
        self.calibrations = {spec.name: calibrations[spec.name] for spec in columns if spec.name in calibrations}
        self.certified = frozenset(shadow_samples(shard) if self.calibrations else ())
        self.split = False
        self._layers = [layer for spec in columns if (layer := layer_of(spec.name)) is not None]
        self._copying = torch.cuda.Stream(engine.device) if engine.device.type == "cuda" else None

    def pack(self, samples: range) -> Iterator[PackedStates]:
        """Yield the states of a micro-batch, in one or, where memory is short, several forwards of equal padded length.

        Raises RoomError when one sample alone does not fit.
        """
        longest = int(self.shard.lengths[samples].max())
        waiting = [samples]
        while waiting:
            group = waiting.pop(0)
            try:
                packed = self._forward(group, longest)
            except RuntimeError as error:
                packed, cause = None, out_of_memory(error)
            if packed is not None:  # outside the handler: the exception keeps the failed forward's memory alive
                yield packed
                continue
            if len(group) == 1:
                raise RoomError(
                    f"{self.engine.device} has no memory for one sample of {longest} tokens ({cause}); "
                    "lower --max-length, or use a larger device"
                )
            self.split = True
            free_cached_memory(self.engine.device)
            half = group.start + len(group) // 2
            waiting[:0] = [range(group.start, half), range(half, group.stop)]

    @torch.no_grad()
    def _forward(self, samples: range, longest: int) -> PackedStates:
        ids_BT = np.zeros((len(samples), longest), np.int64)
        for at, sample in enumerate(samples):
            ids_BT[at, : self.shard.lengths[sample]] = self.shard.ids(sample)
        lengths_B = self.shard.lengths[samples].tolist()
        layer_states, final_BTD = self.engine.forward(self._pinned(torch.from_numpy(ids_BT)), lengths_B, self._layers)
        rows_of = {spec.keeps: [stored_rows(self.shard, each, spec.keeps) for each in samples] for spec in self.columns}
        runs = {keeps: _contiguous_runs(_flat_index(each, longest)) for keeps, each in rows_of.items()}
        counts = {spec.name: [len(each) for each in rows_of[spec.keeps]] for spec in self.columns}
        packed = PackedStates(samples, {}, {}, counts, sorted(self.certified & {*samples}), {}, None)
        for spec in self.columns:
            layer = layer_of(spec.name)
            full_BTD = final_BTD if layer is None else layer_states.pop(layer)
            flat_ND = full_BTD.flatten(0, 1)
            # Contiguous runs of rows are copied, not gathered by an index: on a CPU in a quarter of the time.
            rows_RD = torch.cat([flat_ND[start:stop] for start, stop in runs[spec.keeps]] or [flat_ND[:0]])
            self._encode_into(packed, spec, rows_RD)
        packed.on_policy = self._score_on_policy(samples, longest, final_BTD)
        return self._to_host(packed)

    def _encode_into(self, packed: PackedStates, spec: ColumnSpec, rows_RD: Tensor) -> None:
        """Add a column's rows to what is packed, encoded where the column has a calibration."""
        name = spec.name
        packed.largest[name] = largest_magnitude(rows_RD)
        if name not in self.calibrations:
            packed.rows[name] = rows_RD
            return
        if packed.certified:  # one tensor, for one copy to the host
            packed.exact[name] = torch.cat([rows_RD[part.start : part.stop] for part in packed.first_blocks(name)])
        # A sample with such a row is refused anyway; encoded as is, every value of it would be an outlier.
        rows_RD = rows_RD.masked_fill_(~packed.largest[name].isfinite()[:, None], 0)
        packed.rows[name] = CODECS[spec.codec].encode(rows_RD, self.calibrations[name])

    def as_written(self, packed: PackedStates, spec: ColumnSpec) -> np.ndarray | Encoded:
        """Return a column's rows, once they are on the host, in the form that a `ShardWriter` takes."""
        rows = packed.rows[spec.name]
        if isinstance(rows, Tensor):
            return as_stored(rows)
        return CODECS[spec.codec].pack(rows, self.calibrations[spec.name], spec.dtype)

    def _score_on_policy(self, samples: range, longest: int, final_BTD: Tensor) -> Tensor | None:
        """Score the on-policy rows of these samples, as `score_tokens` returns them; None without a head."""
        if self.head is None:
            return None
        chosen = [on_policy_rows(self.shard, sample, self.on_policy_share) for sample in samples]
        tokens = np.concatenate([self.shard.ids(sample)[at] for sample, at in zip(samples, chosen, strict=True)])
        states_RD = final_BTD.flatten(0, 1)[self._to_device(_flat_index([at - 1 for at in chosen], longest))]
        return score_tokens(self.head, states_RD, self._to_device(tokens.astype(np.int64)))

    def _pinned(self, tensor: Tensor) -> Tensor:
        """Return a CPU tensor that can be copied to the device without waiting for the device's queued work."""
        return tensor if self._copying is None else tensor.pin_memory()

    def _to_device(self, values: np.ndarray) -> Tensor:
        return self._pinned(torch.from_numpy(values)).to(self.engine.device, non_blocking=True)

    def _to_host(self, packed: PackedStates) -> PackedStates:
        """Start copying to pinned memory on a separate CUDA stream, so that the next forward need not wait."""
        if self._copying is None:
            return packed
        self._copying.wait_stream(torch.cuda.current_stream(self.engine.device))
        with torch.cuda.stream(self._copying):
            for field in ("rows", "largest", "exact", "on_policy"):
                setattr(packed, field, self._copied(getattr(packed, field)))
            packed.copied = torch.cuda.Event()
            packed.copied.record(self._copying)
        return packed

    def _copied(self, value: Tensor | tuple | dict | None) -> Tensor | tuple | dict | None:
        """Return a tensor's copy on the host, or the same collection of copies."""
        if isinstance(value, dict):
            return {name: self._copied(inner) for name, inner in value.items()}
        if isinstance(value, tuple):
            return tuple(map(self._copied, value))
        if value is None:
            return None
        value.record_stream(self._copying)
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return host.copy_(value, non_blocking=True)


def load_or_make_calibrations(
    engine: Engine, catalog: Catalog, columns: Sequence[ColumnSpec], batch_tokens: int
) -> dict[str, Calibration]:
    """Return the calibration of every lossy column by name, computed and stored now where the cache has none.

    Raises ProofError for states that the codec cannot store within its error bounds, before any of them is written.
    """
    lossy = [spec for spec in columns if CODECS[spec.codec].lossy]
    by_column = {spec.name: read_calibration(catalog, spec.name, spec.width) for spec in lossy}
    todo = [spec for spec in lossy if by_column[spec.name] is None]
    step = max(1, STATES_BYTES // (TOKENS * max((spec.row_bytes for spec in todo), default=1)))
    for first in range(0, len(todo), step):
        group = todo[first : first + step]
        states = _calibration_states(engine, _calibration_shard(catalog.plan), group, batch_tokens)
        for spec in group:
            made = checked_calibration(spec.name, spec.codec, states[spec.name], engine.device)
            by_column[spec.name] = store_calibration(catalog, spec.name, made, len(states[spec.name]))
    return by_column


def _calibration_shard(plan: Plan) -> ShardPlan:
    """Return the calibration samples, longest first, as if they were a shard."""
    chosen: list[tuple[PlannedSample, bytes]] = []
    tokens = 0
    first = plan.shards[: plan.manifests[0].shards]  # so that an append changes nothing
    for shard, row in calibration_samples(first):
        chosen.append((PlannedSample(shard.ids(row), shard.mask(row)), shard.batch.column("sample_id")[row].as_py()))
        tokens += len(chosen[-1][0].ids)
        if tokens >= TOKENS:
            break
    chosen.sort(key=lambda entry: (-len(entry[0].ids), entry[1]))
    samples, names = zip(*chosen, strict=True)
    return ShardPlan(make_batch(samples, names, 0), 0)


def _calibration_states(
    engine: Engine, shard: ShardPlan, columns: Sequence[ColumnSpec], batch_tokens: int
) -> dict[str, Tensor]:
    """Return the states of a shard's samples on the host, [R, D] by column."""
    states: dict[str, list[Tensor]] = {spec.name: [] for spec in columns}
    packer = Packer(engine, shard, columns)
    for batch in micro_batches(shard.lengths, batch_tokens):
        for packed in packer.pack(batch):
            packed.wait()
            for name, states_RD in packed.rows.items():
                states[name].append(states_RD)
    return {name: torch.cat(states.pop(name)) for name in [*states]}


def certify(packer: Packer, writer: ShardWriter, exact_rows: ExactRows) -> dict[str, dict]:
    """Compare exact rows with what is read back from disk; return each encoded column's facts.

    Raises ProofError where an error is beyond a bound.
    """
    found, device = {}, packer.engine.device
    for spec in (spec for spec in packer.columns if spec.name in packer.calibrations):
        head = packer.head if spec.name == "final" else None
        certificate = Certificate(spec.name, spec.codec, packer.calibrations[spec.name], head)
        kept = [sample for sample in exact_rows[spec.name] if sample not in writer.refused]
        if kept:  # all at once: each figure of a certificate is waited for
            exact_RD = torch.cat([exact_rows[spec.name][sample] for sample in kept])
            stored_RD = torch.cat([as_states(writer.read(spec.name, sample, blocks=1)) for sample in kept])
            certificate.add(exact_RD.to(device), stored_RD.to(device))
            rows = int(spec.bounds(writer.shard)[-1])
            with torch.no_grad():
                found[spec.name] = {"certificate": certificate.facts(writer.outliers(spec.name) / rows)}
    return found


def largest_magnitude(rows_RD: Tensor) -> Tensor:
    """Return each row's largest magnitude, float32 [R]; NaN where the row has one. On a CPU much faster than a norm."""
    return torch.maximum(rows_RD.amax(-1), -rows_RD.amin(-1)).float()


def _flat_index(rows_of_each: list[np.ndarray], longest: int) -> np.ndarray:
    """Return the rows of each sample as one index into [B * T]."""
    return np.concatenate([at * longest + rows for at, rows in enumerate(rows_of_each)])


def _contiguous_runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Cut ascending rows into runs without a gap: (first, stop) each."""
    parts = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]
