"""From foreign samples to the columns of a shard: read, checked, written, proven, and only then there.

T rows of a sample   R rows of a piece   K layers   D hidden size
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.codecs.int8 import as_states, as_stored
from pipeline.cache.columns import ColumnSpec, stored_rows
from pipeline.cache.layout import aux_column
from pipeline.cache.samples import ShardPlan
from pipeline.cache.writer import ShardWriter
from pipeline.errors import ProofError
from pipeline.target.head import TargetHead
from pipeline.target.on_policy import OnPolicyStats, on_policy_rows, score_tokens, sum_scores
from pipeline.target.probe import probe, probe_rows
from stages.import_cache.find_convention import SLACK, Way
from stages.import_cache.foreign_sample import STORED, Foreign, Place, broken
from stages.import_cache.forms import Source
from stages.import_cache.target import Target

ROWS = 1024  # of a sample in memory at a time

Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Import:
    """What is imported, and how its files are to be read: layers `named` in their counting."""

    source: Source
    named: tuple[int, ...]
    way: Way
    dtype: torch.dtype  # of the files

    @property
    def columns(self) -> list[ColumnSpec]:
        """The columns it becomes, in order."""
        dtype = STORED[self.dtype]
        aux = [ColumnSpec(aux_column(layer), dtype, self.source.width) for layer in self.way.layers(self.named)]
        return aux + [ColumnSpec("final", dtype, self.source.width, keeps="needed")] * (self.way.last != "none")

    def check(self, sample: Foreign) -> Foreign:
        """Refuse a sample of another type than the first one's, or without its last state."""
        if sample.dtype != self.dtype or (self.way.last != "none" and not sample.has_last):
            held = f"{sample.dtype} states, {'with' if sample.has_last else 'without'} the last one"
            raise broken(sample.where, f"has {held}, the first file {self.dtype}: they are not of one run")
        return sample

    def reopen(self, shard: ShardPlan, row: int) -> Foreign:
        """Open a planned sample. DataError where the file now holds another one."""
        sample, T = self.check(self.source.open(*place_of(shard, row))), shard.lengths[row]
        same = np.array_equal(sample.ids_T[:T], shard.ids(row)) and np.array_equal(sample.mask_T[:T], shard.mask(row))
        if not same:
            raise broken(sample.where, "holds other tokens than when it was planned")
        return sample

    def pieces(self, sample: Foreign, shard: ShardPlan, row: int, norm: Norm | None) -> Iterator[tuple[str, Tensor]]:
        """Yield (column, states [R, D]) of a sample, piece by piece, each column's in order."""
        final, dtype = stored_rows(shard, row, "needed"), getattr(torch, STORED[self.dtype])
        for first in range(0, int(shard.lengths[row]), ROWS):
            end = min(first + ROWS, int(shard.lengths[row]))
            layers_RKD, last_RD = sample.rows(first, end)
            for spec, states_RD in zip(self.columns, layers_RKD.unbind(1), strict=False):
                yield spec.name, states_RD.to(dtype)
            if self.way.last != "none":
                inside = final[(final >= first) & (final < end)] - first
                kept_RD = last_RD[torch.from_numpy(inside)]
                yield "final", (norm(kept_RD) if self.way.last == "raw" else kept_RD).to(dtype)


def place_of(shard: ShardPlan, row: int) -> Place:
    """Return where a planned sample came from."""
    return shard.batch.column("source")[row].as_py(), shard.line(row)


def unfit(pieces: Iterator[tuple[str, Tensor]]) -> str | None:
    """Return why a sample's states cannot be kept, None where they can."""
    for name, states_RD in pieces:
        worst_R = states_RD.abs().amax(-1)  # of bfloat16 seven times faster than the infinity norm
        if not worst_R.isfinite().all():
            return f"{name} is not finite"
        if (worst_R == 0).any():
            return f"{name} has a row of zeros"
    return None


def applied(target: Target) -> Norm:
    """Return the target's last norm as a function of states on the CPU."""
    norm, weight = target.norm, next(target.norm.parameters())

    @torch.no_grad()
    def normed(raw_RD: Tensor) -> Tensor:
        return norm(raw_RD.to(weight.device, weight.dtype)).cpu()

    return normed


def fill(writer: ShardWriter, work: Import, wanted: set[str], norm: Norm | None) -> dict[int, str]:
    """Write the wanted columns of a shard; return the samples refused, by row, as file and reason."""
    refused = {}
    for row in range(len(writer.shard)):
        sample = work.reopen(writer.shard, row)
        reason = unfit(work.pieces(sample, writer.shard, row, norm))
        if reason:
            writer.refuse(row, reason)
            refused[row] = f"{sample.where}: {reason}"
        for name, states_RD in work.pieces(sample, writer.shard, row, norm):
            if name in wanted:
                writer.write(name, as_stored(states_RD.contiguous()))
    return refused


def on_policy_stats(writer: ShardWriter, head: TargetHead, share: float) -> OnPolicyStats:
    """Measure `share` of a sealed shard's replies: how often they are what the target itself would have said."""
    on_policy, shard, device = OnPolicyStats(), writer.shard, head.head_VD.device
    for row in sorted({*range(len(shard))} - writer.refused.keys()):
        at = on_policy_rows(shard, row, share)
        if len(at):
            before = np.searchsorted(stored_rows(shard, row, "needed"), at - 1)  # the state that each token comes from
            states_RD = as_states(writer.read("final", row))[torch.from_numpy(before)].to(device)
            tokens_R = torch.from_numpy(shard.ids(row)[at].astype(np.int64)).to(device)
            on_policy += sum_scores(score_tokens(head, states_RD, tokens_R))
    return on_policy


def proven(
    writer: ShardWriter, work: Import, wanted: list[ColumnSpec], target: Target, head: TargetHead
) -> dict[str, dict]:
    """Probe a sealed shard as a capture is probed, with room for another engine's rounding. Raises ProofError."""
    model, refused = target.model, {*writer.refused}
    try:
        return probe(model, head, writer.shard, wanted, refused, writer.read, SLACK[work.dtype])
    except ProofError as error:
        looked = ", ".join(place_of(writer.shard, row)[0] for row in probe_rows(writer.shard, refused))
        raise ProofError(f"{Path(work.source.folder)}, {looked}: {error}; these files are of another run") from error
