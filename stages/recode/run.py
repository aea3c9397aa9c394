"""`pipeline recode`: rewrite columns in another codec, shard by shard, from the stored states.

The new column is written beside the old one, read back whole and compared, and then committed by one rename; only then
is the old one removed. So a recode may be stopped at any moment: every shard stays readable, in the codec that its own
manifest names, and the same command resumes with the remaining shards.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import Scratch, clean_scratch, commit_lock, size_text, write_errors
from pipeline.cache.catalog import Catalog
from pipeline.cache.codecs import CODECS, codec_of, parse_codecs
from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.codecs.error_certificate import (
    TOKENS,
    Certificate,
    calibration_samples,
    checked_calibration,
    shadow_samples,
)
from pipeline.cache.columns import Column, ColumnSpec, open_column
from pipeline.cache.layout import LOG, SAMPLES, numbered, shard_folder
from pipeline.cache.manifest import read_record, write_canonical
from pipeline.cache.plan import Plan
from pipeline.cache.samples import ShardPlan
from pipeline.cache.schema import CaptureRecord
from pipeline.cache.writer import ShardWriter, read_calibration, store_calibration
from pipeline.errors import CacheError, DataError, ProofError, UsageError, VersionError
from pipeline.target.head import TargetHead
from pipeline.tensors import as_states
from pipeline.visible_text import visible

BLOCKS_AT_A_TIME = 16  # blocks of a sample in memory
EVERY_S = 5.0  # between progress lines

ColumnsToRecode = list[tuple[ShardPlan, ColumnSpec, str]]


@dataclass(frozen=True)
class RecodeSummary:
    """How many columns of shards were rewritten, and their bytes before and after."""

    columns: int
    bytes_before: int
    bytes_after: int


def run(cache: Path, codec: str) -> RecodeSummary:
    """Rewrite columns in the codecs that `codec` gives, such as "aux=int8,final=zstd"; print a summary.

    Raises UsageError (no such codec, column or cache; states from a lossy codec), DataError (no states to calibrate
    with), ProofError when a codec does not meet its bounds on these states, CacheError for damage, RoomError.
    """
    store = HiddenCache.open(cache)
    catalog, plan = store.catalog, store.catalog.plan
    work = _columns_to_recode(catalog, codec)
    with write_errors(cache, "a recode"):
        clean_scratch(cache)
        for shard in plan.shards:
            for name in catalog.captured_columns(shard.number):
                _remove_stale(catalog, shard.number, name)
        if work:
            _drop_recorded_codecs(catalog)
    calibrations = _calibrations(store, plan, work)
    head = store.head() if "final" in calibrations else None
    before = after = 0
    printed_at = time.monotonic()
    for number, (shard, spec, wanted) in enumerate(work):
        before += _bytes(catalog, shard.number, spec.name)
        try:
            _recode(catalog, shard, spec, wanted, calibrations.get(spec.name), head)
        except CacheError:  # another process that recodes the same column may have removed the old files
            catalog.refresh(shard.number)
            if catalog.read(shard.number, spec.name).spec.codec != wanted:
                raise
        after += _bytes(catalog, shard.number, spec.name)
        if time.monotonic() > printed_at + EVERY_S:
            printed_at = time.monotonic()
            print(f"{number + 1} of {len(work)} columns of shards, {size_text(before)} read", file=sys.stderr)
    where = visible(cache)
    if not work:
        print(f"{where}: nothing to do, every column that --codec {codec} names is in that codec")
        return RecodeSummary(0, 0, 0)
    print(f"{where}: {len(work)} columns of shards written anew, {size_text(before)} are now {size_text(after)}")
    return RecodeSummary(len(work), before, after)


def _drop_recorded_codecs(catalog: Catalog) -> None:
    """Remove the former codecs from the capture's record; the paths of target and corpus in it stay in use."""
    log = catalog.path / LOG
    try:
        record = read_record(log, CaptureRecord).as_dict()
    except (CacheError, VersionError):
        log.unlink(missing_ok=True)
        return
    record.pop("columns", None)
    write_canonical(log, record, catalog.format)


def _columns_to_recode(catalog: Catalog, codec: str) -> ColumnsToRecode:
    """Return the columns of shards not yet in their new codec. UsageError where that is impossible."""
    cache, chosen = catalog.path, parse_codecs(codec)
    work, names = [], set()
    for shard in catalog.plan.shards:
        for name, manifest in sorted(catalog.captured_columns(shard.number).items()):
            spec, wanted = manifest.spec, codec_of(chosen, name)
            names.add(name)
            if wanted in (None, spec.codec):
                continue
            if CODECS[spec.codec].lossy:
                raise UsageError(
                    f"{cache} holds {name} in {spec.codec}, and what that has rounded stays so: {wanted} would look "
                    "exact and not be; capture into another --out instead"
                )
            work.append((shard, spec, wanted))
    if not names:
        raise UsageError(f"{cache}: nothing is captured yet; run `pipeline cache-hidden` with this --out")
    absent = [name for name in chosen if name and name not in names and not (name == "aux" and names - {"final"})]
    if absent:
        raise UsageError(f"{cache} holds {', '.join(sorted(names))}; --codec {codec} names {', '.join(absent)}")
    return work


def _calibrations(store: HiddenCache, plan: Plan, work: ColumnsToRecode) -> dict[str, Calibration]:
    """Return the calibration of each column for a lossy codec, made from its states where there is none."""
    calibrations = {}
    for name, (spec, codec) in {spec.name: (spec, codec) for _, spec, codec in work}.items():
        if CODECS[codec].lossy:
            calibrations[name] = read_calibration(store.catalog, name, spec.width)
            if calibrations[name] is None:
                states_RD = _calibration_states(store, plan, name, codec)
                made = checked_calibration(name, codec, states_RD, "cpu")
                calibrations[name] = store_calibration(store.catalog, name, made, len(states_RD))
    return calibrations


def _calibration_states(store: HiddenCache, plan: Plan, name: str, codec: str) -> torch.Tensor:
    """Return the states [R, D] of the captured calibration samples."""
    parts, tokens = [], 0
    columns: dict[int, Column | None] = {}
    for shard, row in calibration_samples(plan.shards):
        if shard.number not in columns:
            manifest = store.catalog.captured_columns(shard.number).get(name)
            columns[shard.number] = manifest and open_column(store.path, manifest, shard)
        column = columns[shard.number]
        if column is not None and column.ok[row]:
            parts.append(as_states(column.read(row)))
            tokens += int(shard.lengths[row])
        if tokens >= TOKENS:
            break
    if not parts:
        raise DataError(
            f"{store.path}: every sample of {name} was refused, so there is nothing to calibrate {codec} with"
        )
    return torch.cat(parts)


def _recode(
    catalog: Catalog,
    shard: ShardPlan,
    spec: ColumnSpec,
    codec: str,
    calibration: Calibration | None,
    head: TargetHead | None,
) -> None:
    """Rewrite one column of one shard, verify it, and commit it."""
    catalog.refresh(shard.number)
    manifest = catalog.read(shard.number, spec.name)
    if manifest.spec.codec == codec:  # another process has done it
        return
    old = open_column(catalog.path, manifest, shard)
    with ShardWriter(catalog, shard, [replace(spec, codec=codec)]) as writer:
        for row, reason in manifest.refused.items():
            writer.refuse(int(row), reason)
        reader = old.open()
        for row in range(len(shard)):
            for part in old.parts(reader, row, BLOCKS_AT_A_TIME):
                writer.write(spec.name, part)
        writer.seal()
        facts = _verified_facts(writer, old, codec, calibration, head)
        writer.replace(spec.name, facts)


def _verified_facts(
    writer: ShardWriter, old: Column, codec: str, calibration: Calibration | None, head: TargetHead | None
) -> dict[str, dict]:
    """Read the new column back and compare it; return the facts for its manifest. ProofError where it differs."""
    name = old.spec.name
    damaged = writer.damaged_samples(name)
    same = calibration is not None or (writer.sums(name) == old.digests).all()
    if damaged or not same:
        raise ProofError(f"{old.where}, column {name}: what was read back is not what was written; the old one stays")
    if calibration is None:
        return {}
    certificate = Certificate(name, codec, calibration, head if name == "final" else None)
    for row in shadow_samples(writer.shard):
        if old.ok[row]:
            certificate.add(as_states(old.read(row, 1)), as_states(writer.read(name, row, 1)))
    rows = max(1, int(old.bounds[-1]))
    return {"certificate": certificate.facts(writer.outliers(name) / rows)} if certificate.rows else {}


def _remove_stale(catalog: Catalog, shard: int, name: str) -> None:
    """Remove the files that a stopped recode left of a column in other codecs than its manifest's."""
    cache = catalog.path
    if _stale_files(catalog, shard, name):
        with Scratch(cache, numbered(shard)) as scratch, write_errors(cache, "a clean-up"), commit_lock(cache):
            catalog.refresh(shard)
            for path in _stale_files(catalog, shard, name):  # again: meanwhile another process may have committed it
                path.rename(scratch.path / path.name)


def _stale_files(catalog: Catalog, shard: int, name: str) -> list[Path]:
    """Return the files of a column in other codecs than its manifest names."""
    spec, folder = catalog.read(shard, name).spec, shard_folder(catalog.path, shard)
    stale = [folder / end for stem in spec.other_stems for end in (f"{stem}.arrow", stem)]
    return [path for path in stale if path.exists()]


def _bytes(catalog: Catalog, shard: int, name: str) -> int:
    files = catalog.read(shard, name).files
    return sum(fact.size for file, fact in files.items() if file != SAMPLES)
