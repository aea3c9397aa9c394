"""Convert samples of another trainer's cache to the columns of a shard: read, check, write, probe against the target.

T rows of a sample   R rows of a chunk   K layers   D hidden size
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.columns import ColumnSpec, stored_rows
from pipeline.cache.layout import aux_column
from pipeline.cache.samples import ShardPlan
from pipeline.cache.writer import ShardWriter
from pipeline.errors import ProofError
from pipeline.target.head import TargetHead
from pipeline.target.on_policy import OnPolicyStats, on_policy_rows, score_tokens, sum_scores
from pipeline.target.probe import ReferenceTarget, probe, probe_rows
from pipeline.tensors import as_states, as_stored
from stages.import_cache.detect_format import Source
from stages.import_cache.find_convention import EXTRA_TOLERANCE, Convention
from stages.import_cache.foreign_sample import STORED_DTYPE, ForeignSample, SampleLocation, bad_file
from stages.import_cache.target import Target

CHUNK_ROWS = 1024  # rows of a sample in memory at a time

Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ImportJob:
    """The source, and how to read it. `named_layers` are numbered as its trainer does, see `convention`."""

    source: Source
    named_layers: tuple[int, ...]
    convention: Convention
    dtype: torch.dtype  # of the states in the files

    @property
    def columns(self) -> list[ColumnSpec]:
        """The columns of the cache to write, in order."""
        dtype = STORED_DTYPE[self.dtype]
        aux = [
            ColumnSpec(aux_column(layer), dtype, self.source.width)
            for layer in self.convention.layers(self.named_layers)
        ]
        return aux + [ColumnSpec("final", dtype, self.source.width, keeps="needed")] * (self.convention.last != "none")

    def check(self, sample: ForeignSample) -> ForeignSample:
        """Return the sample. DataError for another dtype than the first sample's, or without its last state."""
        if sample.dtype != self.dtype or (self.convention.last != "none" and not sample.has_last):
            content = f"{sample.dtype} states, {'with' if sample.has_last else 'without'} the last one"
            raise bad_file(sample.where, f"has {content}, the first file {self.dtype}: they are not of one run")
        return sample

    def reopen(self, shard: ShardPlan, row: int) -> ForeignSample:
        """Open a planned sample. DataError where the file now holds another one."""
        sample, T = self.check(self.source.open(*location_of(shard, row))), shard.lengths[row]
        same = np.array_equal(sample.ids_T[:T], shard.ids(row)) and np.array_equal(sample.mask_T[:T], shard.mask(row))
        if not same:
            raise bad_file(sample.where, "holds other tokens than when it was planned")
        return sample

    def column_chunks(
        self, sample: ForeignSample, shard: ShardPlan, row: int, norm: Norm | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (column, states [R, D]) of a sample in chunks, each column's in order of rows."""
        final, dtype = stored_rows(shard, row, "needed"), getattr(torch, STORED_DTYPE[self.dtype])
        for first in range(0, int(shard.lengths[row]), CHUNK_ROWS):
            end = min(first + CHUNK_ROWS, int(shard.lengths[row]))
            layers_RKD, last_RD = sample.rows(first, end)
            for spec, states_RD in zip(self.columns, layers_RKD.unbind(1), strict=False):
                yield spec.name, states_RD.to(dtype)
            if self.convention.last != "none":
                inside = final[(final >= first) & (final < end)] - first
                kept_RD = last_RD[torch.from_numpy(inside)]
                yield "final", (norm(kept_RD) if self.convention.last == "raw" else kept_RD).to(dtype)


def location_of(shard: ShardPlan, row: int) -> SampleLocation:
    """Return the source file and line of a planned sample."""
    return shard.batch.column("source")[row].as_py(), shard.line(row)


def refusal_reason(chunks: Iterator[tuple[str, Tensor]]) -> str | None:
    """Return why a sample's states cannot be used, None where they can."""
    for name, states_RD in chunks:
        max_abs_R = states_RD.abs().amax(-1)  # in bfloat16 seven times faster than the infinity norm
        if not max_abs_R.isfinite().all():
            return f"{name} is not finite"
        if (max_abs_R == 0).any():
            return f"{name} has a row of zeros"
    return None


def norm_function(target: Target) -> Norm:
    """Return a function that applies the target's final norm to states on the CPU."""
    norm, weight = target.norm, next(target.norm.parameters())

    @torch.no_grad()
    def normed(raw_RD: Tensor) -> Tensor:
        return norm(raw_RD.to(weight.device, weight.dtype)).cpu()

    return normed


def write_columns(writer: ShardWriter, job: ImportJob, wanted: set[str], norm: Norm | None) -> dict[int, str]:
    """Write the wanted columns of a shard; return the refused samples, row -> "file: reason"."""
    refused = {}
    for row in range(len(writer.shard)):
        sample = job.reopen(writer.shard, row)
        reason = refusal_reason(job.column_chunks(sample, writer.shard, row, norm))
        if reason:
            writer.refuse(row, reason)
            refused[row] = f"{sample.where}: {reason}"
        for name, states_RD in job.column_chunks(sample, writer.shard, row, norm):
            if name in wanted:
                writer.write(name, as_stored(states_RD.contiguous()))
    return refused


def on_policy_stats(writer: ShardWriter, head: TargetHead, share: float) -> OnPolicyStats:
    """Return how often the target itself would have chosen the tokens, over `share` of a sealed shard's replies."""
    on_policy, shard, device = OnPolicyStats(), writer.shard, head.head_VD.device
    for row in sorted({*range(len(shard))} - writer.refused.keys()):
        at = on_policy_rows(shard, row, share)
        if len(at):
            before = np.searchsorted(stored_rows(shard, row, "needed"), at - 1)  # the state that each token comes from
            states_RD = as_states(writer.read("final", row))[torch.from_numpy(before)].to(device)
            tokens_R = torch.from_numpy(shard.ids(row)[at].astype(np.int64)).to(device)
            on_policy += sum_scores(score_tokens(head, states_RD, tokens_R))
    return on_policy


def probe_shard(
    writer: ShardWriter, job: ImportJob, wanted: list[ColumnSpec], target: Target, head: TargetHead
) -> dict[str, dict]:
    """Probe a sealed shard as a capture is probed, with tolerance for another engine's rounding. Raises ProofError."""
    reference, refused = ReferenceTarget(target.model), {*writer.refused}
    try:
        return probe(reference, head, writer.shard, wanted, refused, writer.read, EXTRA_TOLERANCE[job.dtype])
    except ProofError as error:
        probed = ", ".join(location_of(writer.shard, row)[0] for row in probe_rows(writer.shard, refused))
        raise ProofError(f"{Path(job.source.folder)}, {probed}: {error}; these files are of another run") from error
