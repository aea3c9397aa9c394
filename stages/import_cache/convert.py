"""The two passes over another trainer's files: tokens and masks into a plan, then states into shards, proven by value.

T rows of a sample   R rows of a chunk   K layers   D hidden size
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.atomic import process_lock, size_text, write_errors
from pipeline.cache.catalog import Catalog, Work, target_file
from pipeline.cache.codecs import CODECS
from pipeline.cache.columns import ColumnSpec, stored_rows
from pipeline.cache.file_writer import create_identity
from pipeline.cache.layout import HEAD, aux_column
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.samples import PlannedSample, ShardPlan
from pipeline.cache.writer import ShardWriter
from pipeline.corpus.rejections import Tally, Unusable, check_ids, check_mask, trim
from pipeline.errors import DataError, ProofError, UsageError
from pipeline.target.head import TargetHead
from pipeline.target.on_policy import OnPolicyStats, on_policy_rows, on_policy_share, score_tokens, sum_scores
from pipeline.target.probe import ReferenceTarget, probe, probe_samples
from pipeline.tensors import as_states, as_stored
from pipeline.visible_text import print_visible, visible
from stages.import_cache.conventions import EXTRA_TOLERANCE, Convention
from stages.import_cache.foreign_sample import STORED_DTYPE, ForeignSample, SampleLocation, Source, bad_file
from stages.import_cache.target import Target

CHUNK_ROWS = 1024  # rows of a sample in memory at a time
MAX_REFUSED_SHARE = 0.01  # of the samples; more means that all of them are suspect
EVERY_S = 5.0  # between lines of progress

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
    return shard.batch.column("source")[row].as_py(), shard.line(row)


def is_planned(catalog: Catalog, source: Source) -> bool:
    """Return whether the cache has a plan. UsageError where it was made from other files."""
    if not catalog.planned:
        return False
    plan, here = catalog.plan, source.source_facts()
    if plan.sources != [here]:
        there = plan.sources[0]
        raise UsageError(
            f"{catalog.path} was planned from {there.get('files')} files of {there.get('size')} bytes "
            f"({there.get('file')}); {source.folder} now holds {here['files']} of {here['size']}, or under other "
            "names; pass another --out"
        )
    return True


def make_plan(catalog: Catalog, job: ImportJob, identity: dict, vocab_size: int) -> None:
    """Read every file's tokens and loss mask and write the plan. Raises DataError, RoomError."""
    out = catalog.path
    tally, notes, source = Tally(), {"max_samples": None}, job.source

    def planned_samples() -> Iterator[PlannedSample]:
        usable, reported_at = 0, time.monotonic()
        for number, (file, line) in enumerate(source.locations):
            tally.rows += 1
            sample = job.check(source.open(file, line))
            planned = plan_sample(sample, file, line, vocab_size, tally)
            if planned:
                usable += 1
                yield planned
            if time.monotonic() > reported_at + EVERY_S:
                reported_at = time.monotonic()
                print(f"{number + 1:,} of {len(source.locations):,} samples looked at", file=sys.stderr)
        tally.check_usable(str(source.folder), usable)
        notes.update(tally.as_notes())
        create_identity(out, identity)

    with write_errors(out, "a plan"):
        out.mkdir(parents=True, exist_ok=True)
    row_bytes = sum(spec.row_bytes for spec in job.columns)
    with write_errors(out, "a plan"), process_lock(out, "plan"):
        catalog.refresh()
        if not is_planned(catalog, source):
            sources = [source.source_facts()]
            write_segment(out, planned_samples(), row_bytes=row_bytes, sources=sources, notes=notes)
    catalog.refresh()


def plan_sample(sample: ForeignSample, file: str, line: int, vocab_size: int, tally: Tally) -> PlannedSample | None:
    """Return the planned sample, as a capture would; None, with the reason in the tally, for an unusable one."""
    try:
        check_mask(sample.mask_T)
        check_ids(sample.ids_T, vocab_size)
    except Unusable as fault:
        tally.reject(fault.reason, f"{sample.where}: {fault}")
        return None
    cut = trim(sample.ids_T, sample.mask_T)
    if cut is None:
        tally.too_short += 1
        tally.add_example("too short", f"{sample.where}: no two supervised tokens in a row")
        return None
    return PlannedSample(*cut, file=file, line=line)


def convert(catalog: Catalog, job: ImportJob, missing: Work, target: Target) -> None:
    """Write the cache's copy of the target, and every missing column; each is committed once it is proven."""
    target.store(catalog)
    planned, head = catalog.plan, TargetHead.load(target_file(catalog, HEAD), *target.device_and_dtype)
    norm = norm_function(target) if job.convention.last == "raw" else None
    facts = {"engine": f"imported from {job.source.form}", "proven": target.proven}
    total, refused, reported_at = (
        total_bytes(missing),
        sum(map(len, refused_by_shard(catalog, job))),
        time.monotonic(),
    )
    for number, (shard, wanted) in enumerate(missing):
        with ShardWriter(catalog, shard, wanted) as writer:
            reasons = write_columns(writer, job, {spec.name for spec in wanted}, norm)
            refused += len(reasons)
            check_refused(refused, planned.samples, reasons)
            writer.seal()
            made = {spec.name: dict(facts) for spec in wanted}
            if target.proven:
                for name, result in probe_shard(writer, job, wanted, target, head).items():
                    made[name]["probe"] = result
            if "final" in made:
                share = on_policy_share(planned.segment(shard.number).supervised)
                made["final"]["gauge"] = on_policy_stats(writer, head, share).as_facts()
            writer.commit(made)
        if time.monotonic() > reported_at + EVERY_S:
            reported_at = time.monotonic()
            print(f"{number + 1} of {len(missing)} shards of {size_text(total)} imported", file=sys.stderr)


def total_bytes(missing: Work) -> int:
    return sum(
        CODECS[spec.codec].stored_bytes(int(spec.bounds(shard)[-1]), spec.width, spec.dtype)
        for shard, columns in missing
        for spec in columns
    )


def refused_by_shard(catalog: Catalog, job: ImportJob) -> Iterator[dict]:
    """Yield the refused samples of every written shard. A refused sample is refused in all columns."""
    for shard in range(catalog.shards):
        manifest = catalog.captured(shard, job.columns[-1].name)
        yield manifest.refused if manifest else {}


def check_refused(refused: int, samples: int, reasons: dict[int, str]) -> None:
    """Print every refused sample; DataError when they are more than MAX_REFUSED_SHARE of all, and more than one."""
    for reason in reasons.values():
        print_visible(visible(f"left out: {reason}"), err=True)
    if refused > max(1, MAX_REFUSED_SHARE * samples):
        raise DataError(
            f"{refused} of {samples} samples hold states that cannot be kept, {next(reversed(reasons.values()))} for "
            "one; make these files again and import into a fresh --out"
        )


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
        probed = ", ".join(location_of(writer.shard, row)[0] for row in probe_samples(writer.shard, refused))
        raise ProofError(f"{Path(job.source.folder)}, {probed}: {error}; these files are of another run") from error
