"""`pipeline import-cache`: convert another trainer's cache into one of ours, proven against the target by value.

Two passes over the files: one for tokens and masks, which makes the plan, and one for the states, shard by shard. What
no file states is an option, or found by computing a few samples again, and recorded in cache.json. After any stop the
same command goes on with the missing shards, and gives the same bytes.

    R rows of a sample   D hidden size
"""

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.atomic import check_free_space, clean_scratch, process_lock, size_text, write_errors
from pipeline.cache.catalog import Catalog, Work, has_target, target_file
from pipeline.cache.codecs import CODECS
from pipeline.cache.columns import ColumnSpec, stored_rows
from pipeline.cache.file_writer import create_identity, rebuild_derived
from pipeline.cache.layout import HEAD, LOG
from pipeline.cache.manifest import write_canonical
from pipeline.cache.plan_writer import plan_in_use, write_segment
from pipeline.cache.samples import PlannedSample
from pipeline.cache.schema import TargetName
from pipeline.cache.writer import ShardWriter
from pipeline.corpus.rejections import Tally, Unusable, check_ids, check_mask, left_out_lines, trim
from pipeline.errors import DataError, ProofError, RoomError, UsageError
from pipeline.target.files import CONFIG, find_target, read_text_config, template_digest, tokenizer_digest
from pipeline.target.head import TargetHead
from pipeline.target.layers import check_layers
from pipeline.target.on_policy import OnPolicyStats, on_policy_rows, on_policy_share, score_tokens, sum_scores
from pipeline.target.probe import ReferenceTarget, probe, probe_samples
from pipeline.target.weights import check_weights_if_recorded, named_target
from pipeline.tensors import as_states, as_stored
from pipeline.visible_text import print_visible, visible
from stages.import_cache.layer_convention import EXTRA_TOLERANCE, Target, choose_convention
from stages.import_cache.source import (
    STORED_DTYPE,
    ForeignSample,
    ImportJob,
    Norm,
    PartialConvention,
    Source,
    location_of,
)
from stages.import_cache.trainer_formats import find_source

MAX_REFUSED_SHARE = 0.01  # of the samples; more means that all of them are suspect
EVERY_S = 5.0  # between lines of progress


@dataclass(frozen=True)
class ImportSummary:
    """Totals of an import over the whole cache; `new_shards` counts this run only."""

    samples: int
    shards: int
    new_shards: int
    refused: int


def run(
    folder: Path,
    out: Path,
    *,
    model: str | None = None,
    layers: str | None = None,
    count_from: int | None = None,
    last: str | None = None,
    masks: Path | None = None,
    unproven: bool = False,
    device: str | None = None,
) -> ImportSummary:
    """Import the cache in `folder` into a cache at `out`, and print the convention found and the totals.

    Raises UsageError (no such cache or target, a missing option), DataError (a damaged or hostile file, too many
    unusable samples), ProofError (states that are not this target's by any convention), RoomError.
    """
    target = Target(target_folder(model, folder, unproven), device, not unproven)
    requested = PartialConvention(parse_layers(layers), count_from, last)
    config, catalog = read_text_config(target.folder), Catalog(out)
    source = find_source(folder, requested.layers, config["hidden_size"], masks)
    first, named = source.open(*source.locations[0]), requested.layers or source.stated.layers
    convention = choose_convention(source, first, named, requested, catalog, target)
    job = ImportJob(source, named, convention, first.dtype)
    check_layers(job.layers, config["num_hidden_layers"])
    identity = identity_of(target, model, job, catalog)
    if catalog.exists:
        create_identity(out, identity)
    if not is_planned(catalog, source):
        make_plan(catalog, job, identity, config["vocab_size"])
    planned, missing = catalog.plan, catalog.missing(job.columns)
    if missing or not has_target(catalog):
        check_weights_if_recorded(catalog, target.folder)
        clean_scratch(out)
        with contextlib.suppress(RoomError):  # for `evaluate`, and in case cache.json is lost
            record = {"identity": identity, "target": {"folder": str(target.folder.resolve())}}
            write_canonical(out / LOG, record, catalog.format)
        check_free_space(out, f"an import of {planned.samples:,} samples", total_bytes(missing))
        with plan_in_use(planned):
            convert(catalog, job, missing, target)
        catalog.refresh()
    rebuild_derived(catalog)
    return summary(catalog, job, len(missing), target)


def target_folder(model: str | None, folder: Path, unproven: bool) -> Path:
    """Return the folder of the target's files. UsageError without them, or with neither --model nor --unproven."""
    if model is None and not unproven:
        raise UsageError(
            "nothing proves these states without the target; name its folder with --model, or say --unproven, and with "
            "it --layers, --count-from and --last as far as the files do not say them"
        )
    if model is not None:
        return find_target(model)
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder}: holds no {CONFIG}, tokenizer and weights with the target's embedding and LM head, which "
            "training needs; name with --model a folder that does (its other weights are not read with --unproven)"
        )
    return folder


def parse_layers(layers: str | None) -> tuple[int, ...] | None:
    """Parse a list of layers such as "1,9,17". UsageError when it is none."""
    if layers is None:
        return None
    try:
        return tuple(int(layer) for layer in layers.split(","))
    except ValueError:
        raise UsageError(f"--layers {layers}: no list of layers; write it like 1,9,17") from None


def identity_of(target: Target, model: str | None, job: ImportJob, catalog: Catalog) -> dict:
    """Return the content of cache.json: as a capture's, with the source's form and convention."""
    cached = catalog.identity.target if catalog.exists else TargetName()
    imported = {
        "form": job.source.form,
        "layers": list(job.named_layers),
        "count_from": job.convention.count_from,
        "last": job.convention.last,
        "proven": target.proven,
    }
    return {
        "target": named_target(model or str(target.folder), target.folder, cached),
        "tokenizer": {"digest": tokenizer_digest(target.folder), "chat_template": template_digest(target.folder)},
        "samples": {"max_length": None, "mask": "imported", "trimmed": True},
        "capture": {"engine": "imported", "dtype": STORED_DTYPE[job.dtype], "imported": imported},
    }


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
            tally.records += 1
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
    norm = target.apply_norm if job.convention.last == "raw" else None
    facts = {"engine": f"imported from {job.source.form}", "proven": target.proven}
    refused, reported_at = sum(map(len, refused_by_shard(catalog, job))), time.monotonic()
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
            print(
                f"{number + 1} of {len(missing)} shards of {size_text(total_bytes(missing))} imported", file=sys.stderr
            )


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


def summary(catalog: Catalog, job: ImportJob, new: int, target: Target) -> ImportSummary:
    """Print the cache's totals, the samples left out, and the next command."""
    out, planned = catalog.path, catalog.plan
    on_policy, refused = OnPolicyStats(), sum(map(len, refused_by_shard(catalog, job)))
    for shard in range(catalog.shards):
        gauge = catalog.captured(shard, job.columns[-1].name).facts.gauge
        on_policy += OnPolicyStats.from_facts(gauge) if gauge else OnPolicyStats()
    now = f"{new} shards imported now" if new else "nothing to do"
    content = f"{planned.samples:,} samples" + (f", {refused} refused" if refused else "")
    print_visible(visible(f"{out}: {content} in {catalog.shards} shards, from {job.source.form}; {now}"))
    for line in left_out_lines(planned.notes, planned.duplicates):
        print_visible(visible(line), err=True)
    on_policy.report()
    if not target.proven:
        print("unproven: no state was compared with the target; an accept length of 1 would show the mistake late")
    print_visible(visible("next: " + shlex.join(["pipeline", "train-draft", "--cache", str(out)])))
    return ImportSummary(planned.samples, catalog.shards, new, refused)
