"""The first pass over the files: tokens and masks, which fix every sample's place before a state is read."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.cache.atomic import process_lock, write_errors
from pipeline.cache.manifest import create_identity
from pipeline.cache.plan import Plan, load_plan, segment_numbers, write_segment
from pipeline.cache.samples import PlannedSample
from pipeline.corpus.tally import Tally, Unusable, check_ids, check_mask, trim
from pipeline.errors import UsageError
from stages.import_cache.convert import Import
from stages.import_cache.foreign_sample import Foreign
from stages.import_cache.forms import Source

EVERY_S = 5.0  # between lines of progress


def held_plan(out: Path, source: Source) -> Plan | None:
    """Return the plan that is there, None where none is. UsageError where it is of other files."""
    if not segment_numbers(out):
        return None
    held, here = load_plan(out), source.listing()
    if held.sources != [here]:
        there = held.sources[0]
        raise UsageError(
            f"{out} was planned from {there.get('files')} files of {there.get('size')} bytes ({there.get('file')}); "
            f"{source.folder} now holds {here['files']} of {here['size']}, or under other names; pass another --out"
        )
    return held


def make_plan(out: Path, work: Import, identity: dict, vocab_size: int) -> Plan:
    """Read every file's tokens and mask and fix every sample's place. Raises DataError, RoomError."""
    tally, notes, source = Tally(), {"max_samples": None}, work.source

    def checked() -> Iterator[PlannedSample]:
        usable, said = 0, time.monotonic()
        for number, (file, line) in enumerate(source.places):
            tally.rows += 1
            sample = work.check(source.open(file, line))
            planned = usable_sample(sample, file, line, vocab_size, tally)
            if planned:
                usable += 1
                yield planned
            if time.monotonic() > said + EVERY_S:
                said = time.monotonic()
                print(f"{number + 1:,} of {len(source.places):,} samples looked at", file=sys.stderr)
        tally.check_usable(str(source.folder), usable)
        notes.update(tally.as_notes())
        create_identity(out, identity)

    with write_errors(out, "a plan"):
        out.mkdir(parents=True, exist_ok=True)
    row_bytes = sum(spec.row_bytes for spec in work.columns)
    with write_errors(out, "a plan"), process_lock(out, "plan"):
        return held_plan(out, source) or write_segment(
            out, checked(), row_bytes=row_bytes, sources=[source.listing()], notes=notes
        )


def usable_sample(sample: Foreign, file: str, line: int, vocab_size: int, tally: Tally) -> PlannedSample | None:
    """Return what a capture of the same tokens would plan; None, with the reason in the tally, where it would not."""
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
