"""The first pass over the files: read tokens and loss masks, and plan every sample's shard before a state is read."""

import sys
import time
from collections.abc import Iterator

from pipeline.cache.atomic import process_lock, write_errors
from pipeline.cache.catalog import Catalog
from pipeline.cache.manifest import create_identity
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.samples import PlannedSample
from pipeline.corpus.rejections import Tally, Unusable, check_ids, check_mask, trim
from pipeline.errors import UsageError
from stages.import_cache.convert import ImportJob
from stages.import_cache.detect_format import Source
from stages.import_cache.foreign_sample import ForeignSample

EVERY_S = 5.0  # between lines of progress


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
