"""Verify: checks every byte of a cache against its manifests, and the manifests against each other.

Reports damage separately from what is missing (an unfinished capture) and from foreign files.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from pipeline.cache import layout
from pipeline.cache.atomic import read_errors
from pipeline.cache.catalog import Catalog, shards_per_column, target_manifest
from pipeline.cache.codecs import CODECS, column_of_files
from pipeline.cache.codecs.zarr_file import METADATA
from pipeline.cache.columns import Column
from pipeline.cache.file_writer import Columns, refused_bytes
from pipeline.cache.layout import check_exists, numbered, path_inside
from pipeline.cache.manifest import PIECE, FileFact, check_file, check_size, read_canonical, read_record
from pipeline.cache.plan import Plan, build_index, index_manifest, read_index
from pipeline.cache.samples import ShardPlan, read_batch
from pipeline.cache.schema import CalibrationManifest, ColumnManifest, SegmentManifest
from pipeline.errors import CacheError

SHOWN = 8  # the most damaged samples named per column


@dataclass(frozen=True)
class Finding:
    """A file, relative to the cache, and what is wrong with it; the shard and column it belongs to, if it does."""

    file: str
    what: str
    shard: int | None = None
    column: str | None = None


@dataclass
class Report:
    """The result of `verify`. `missing`: not captured yet; `foreign`: unknown files; neither is damage."""

    path: str
    damaged: list[Finding] = field(default_factory=list)
    missing: list[Finding] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    shards: int = 0  # planned
    columns: dict[str, int] = field(default_factory=dict)  # how many shards have it, by name

    @property
    def incomplete(self) -> list[str]:
        """Columns that not every planned shard has, each with how many do."""
        lacking = {name: count for name, count in self.columns.items() if count < self.shards}
        return [f"{name} in {count} of {self.shards} shards" for name, count in lacking.items()]

    def as_dict(self) -> dict:
        return {**asdict(self), "incomplete": self.incomplete}


def verify(path: Path | str, only: set[int] | None = None) -> Report:
    """Check every byte of a cache, or of these shards and all that is outside of shards.

    Raises UsageError where there is none, VersionError for what this version does not know; damage is in the report,
    never raised.
    """
    path = Path(path)
    check_exists(path)
    check = _Check(path)
    plan = check.plan()
    if plan:
        check.index(plan)
    columns = check.shards(plan, only)
    captured = any(columns.values())
    if captured and not plan and not any(finding.file.startswith(layout.PLAN) for finding in check.report.damaged):
        check.damage(layout.PLAN, "lost, though shards were captured by it")
    check.target(captured)
    check.calibration(columns)
    check.quarantine(plan, columns)
    check.foreign(only is None)
    return check.report


class _Check:
    """One verification: the report so far, and the files accounted for."""

    def __init__(self, path: Path):
        self.path, self.catalog = path, Catalog(path)
        self.report = Report(str(path))
        self.known = {layout.LOG, layout.INDEX, layout.INDEX_MANIFEST}
        self.identity: str | None = None
        self.version: str | None = None  # the cache's format version
        with self.guard(layout.IDENTITY):
            self.identity, self.version = self.catalog.hash, self.catalog.format

    @contextlib.contextmanager
    def guard(self, file: str, shard: int | None = None, column: str | None = None) -> Iterator[None]:
        """Mark a file as known, and report a CacheError of the block as damage to it."""
        self.known.add(file)
        try:
            with read_errors(self.path / file):
                yield
        except CacheError as error:
            what = str(error).removesuffix("; run `pipeline verify`").removeprefix(f"{self.path / file}: ")
            self.damage(file, what, shard, column)

    def damage(self, file: str, what: str, shard: int | None = None, column: str | None = None) -> None:
        self.report.damaged.append(Finding(file, what, shard, column))

    def unfinished(self, file: str, what: str, shard: int | None = None, column: str | None = None) -> None:
        self.report.missing.append(Finding(file, what, shard, column))

    def file(self, file: str, fact: FileFact, shard: int | None = None, column: str | None = None) -> bool:
        """Check a file's size and digest. Returns whether they are right."""
        before = len(self.report.damaged)
        with self.guard(file, shard, column):
            check_file(path_inside(self.path, file), fact)
        return len(self.report.damaged) == before

    def check_format(self, found: str) -> None:
        """Raise CacheError where a manifest's format version is not the cache's."""
        if self.version not in (None, found):
            raise CacheError(f"of format version {found!r} in a cache of {self.version!r}")

    def plan(self) -> Plan | None:
        """Check the plan, rebuilding its batches from ids and masks to compare them. Returns it if it is undamaged."""
        numbers = {path.stem for path in (self.path / layout.PLAN).glob("*.*") if layout.NUMBER.fullmatch(path.stem)}
        before, finished = len(self.report.damaged), 0
        for number in sorted(numbers):
            manifest, rows = f"{layout.PLAN}/{number}.json", f"{layout.PLAN}/{number}.arrow"
            self.known.add(rows)
            if not (self.path / manifest).is_file():
                self.unfinished(manifest, "a segment of the plan without its manifest")
                continue
            with self.guard(manifest):
                segment = read_record(self.path / manifest, SegmentManifest)
                self.check_format(segment.format)
                if f"{number}.arrow" not in segment.files:
                    raise CacheError("the manifest of another segment")
                for name, fact in segment.files.items():
                    self.file(f"{layout.PLAN}/{name}", fact)
            finished += 1
        if not finished:
            self.unfinished(layout.PLAN, "no plan yet")
        if not finished or len(self.report.damaged) > before:
            return None
        with self.guard(layout.PLAN):
            plan = self.catalog.plan
            for shard in plan.shards:
                if not shard.rebuilt_batch().equals(shard.batch):
                    self.damage(layout.PLAN, "not what its ids and masks give", shard.number)
            return plan

    def index(self, plan: Plan) -> None:
        if not (self.path / layout.INDEX_MANIFEST).exists():
            self.unfinished(
                layout.INDEX_MANIFEST, "no index; readers do without, the next `pipeline cache-hidden` makes it"
            )
            return
        with self.guard(layout.INDEX_MANIFEST):
            facts = index_manifest(self.path)
            if not self.file(layout.INDEX, facts.files[layout.INDEX]):
                return
            if facts.segments != [manifest.files for manifest in plan.manifests]:
                self.unfinished(
                    layout.INDEX, "of a plan with other segments; the next `pipeline cache-hidden` makes it again"
                )
                return
            held = read_index(self.path, plan.manifests)
            if held is None or not held.equals(build_index(plan)):
                self.damage(layout.INDEX, "not what the plan gives")

    def target(self, captured: bool) -> None:
        if not (self.path / layout.TARGET).exists() and not captured:
            self.unfinished(layout.TARGET, "not captured yet")
            return
        with self.guard(f"{layout.TARGET}/{layout.TARGET_MANIFEST}"):
            manifest = target_manifest(self.catalog)
            self.check_format(manifest.format)
            for name, fact in manifest.files.items():
                self.file(f"{layout.TARGET}/{name}", fact)

    def calibration(self, columns: Columns) -> None:
        """Check the calibrations present, and that every column encoded with one has it."""
        there = {
            path.stem for path in (self.path / layout.CALIBRATION).glob("*.json") if layout.COLUMN.fullmatch(path.stem)
        }
        specs = {manifest.spec for found in columns.values() for manifest in found.values()}
        for name in sorted(there | {spec.name for spec in specs if CODECS[spec.codec].lossy}):
            file = f"{layout.CALIBRATION}/{name}.json"
            with self.guard(file):
                held = read_record(self.path / file, CalibrationManifest)
                self.check_format(held.format)
                if self.identity and (held.cache, held.column) != (self.identity, name):
                    self.damage(file, "belongs to another cache or column")

    def shards(self, plan: Plan | None, only: set[int] | None) -> Columns:
        """Check every shard planned or present, or only these. Returns all columns' manifests, by shard and name."""
        planned = {shard.number: shard for shard in plan.shards} if plan else {}
        columns = {}
        for number in sorted({*planned, *self.catalog.shard_numbers()}):
            if only is not None and number not in only:
                columns[number] = self.catalog.captured_columns(number)
                continue
            if plan and number not in planned:
                self.damage(f"{layout.SHARDS}/{numbered(number)}", "not in the plan", number)
            columns[number] = self.shard(number, planned.get(number))
        self.report.shards = len(planned)
        self.catalog.refresh()  # a capture may have gone on, or ended, while the values were read
        self.report.columns = shards_per_column([self.catalog.entries(number) for number in sorted(planned)])
        names = sorted({name for found in columns.values() for name in found})
        for number, found in columns.items():
            damaged = {finding.column for finding in self.report.damaged if finding.shard == number}
            if not found and not damaged:
                self.unfinished(f"{layout.SHARDS}/{numbered(number)}", "not captured yet", number)
            for name in names:
                if found and name not in found and name not in damaged:
                    self.unfinished(f"{layout.SHARDS}/{numbered(number)}/{name}.json", "not captured yet", number, name)
        return columns

    def shard(self, number: int, planned: ShardPlan | None) -> dict[str, ColumnManifest]:
        """Check one shard's columns and samples. Returns the manifests of its columns, by name."""
        here = f"{layout.SHARDS}/{numbered(number)}"
        listed = self.catalog.entries(number)
        found = {}
        for name in self.catalog.columns_of(number):
            with self.guard(f"{here}/{name}.json", number, name):
                found[name] = self.catalog.read(number, name)
                self.check_format(found[name].format)
                if self.identity and found[name].cache != self.identity:
                    self.damage(f"{here}/{name}.json", "belongs to another cache", number, name)
        counted = {manifest.spec.stem for manifest in found.values()}
        for stem in sorted({entry.removesuffix(".arrow") for entry in listed} - counted):
            if name := column_of_files(stem):  # a writer was killed before or after its manifest; the next tidies up
                below = [] if (self.path / here / stem).is_symlink() else (self.path / here / stem).rglob("*")
                self.known |= {f"{here}/{stem}.arrow", *(path.relative_to(self.path).as_posix() for path in below)}
                if name in found:
                    self.unfinished(f"{here}/{stem}", "left from a recode that was stopped; run it again", number, name)
                elif f"{name}.json" not in listed:
                    self.unfinished(f"{here}/{stem}", "without a manifest, so not captured yet", number, name)
        shard = self.samples(here, number, found, planned)
        for name, manifest in found.items():
            self.column(here, name, manifest, shard)
        return found

    def samples(self, here: str, number: int, found: dict[str, ColumnManifest], planned: ShardPlan | None):
        """Check a shard's `samples.arrow` against the manifests and the plan. Returns the samples, if known."""
        file, whole = f"{here}/{layout.SAMPLES}", True
        facts = dict.fromkeys(manifest.files[layout.SAMPLES] for manifest in found.values())
        for fact in facts:
            whole = self.file(file, fact, number) and whole
        held = planned
        if whole and (facts or os.path.lexists(self.path / file)):
            with self.guard(file, number):
                held = ShardPlan(read_batch(self.path / file), number)
                if planned and not held.batch.equals(planned.batch):
                    self.damage(file, "other samples than the plan's", number)
        return planned or (held if facts and whole else None)

    def column(self, here: str, name: str, manifest: ColumnManifest, shard: ShardPlan | None) -> None:
        """Check a column's files, and every block of its values against its `.arrow`."""
        number, spec = manifest.shard, manifest.spec
        column, sums = None, f"{here}/{spec.stem}.arrow"
        if self.file(sums, manifest.files[f"{spec.stem}.arrow"], number, name) and shard:
            with self.guard(sums, number, name):
                column = Column(self.path / here, spec, spec.bounds(shard), f"shard {numbered(number)}")
                refused = sorted(int(row) for row in manifest.refused)
                if manifest.rows != column.bounds[-1] or refused != np.flatnonzero(~column.ok).tolist():
                    self.damage(sums, "rows or refused samples are not its manifest's", number, name)
        rest = {
            file: fact for file, fact in manifest.files.items() if file not in (layout.SAMPLES, f"{spec.stem}.arrow")
        }
        form = [file for file in rest if file.endswith(METADATA)]  # it decides how the rest is to be read
        if all([self.file(f"{here}/{file}", rest.pop(file), number, name) for file in form]) and column:
            with self.guard(f"{here}/{spec.stem}", number, name):
                reader = column.open()
                values = reader.path.relative_to(self.path / here).as_posix()
                if values not in rest and not reader.path.is_dir():
                    raise CacheError("not in its column's manifest")
                self.values(f"{here}/{values}", column, reader, rest.pop(values) if reader.in_order else None)
        for file, fact in rest.items():
            self.file(f"{here}/{file}", fact, number, name)

    def values(self, file: str, column: Column, reader, fact: FileFact | None) -> None:
        """Check the blocks and, in the same pass, the file's digest where the file holds the values in order."""
        number, name = int(file.split("/")[1]), column.spec.name
        with self.guard(file, number, name):
            if fact:
                check_size(path_inside(self.path, file), fact)
            digest = xxhash.xxh3_128()
            damaged = column.damaged_samples(reader, digest.update if fact else None)
            if damaged:
                shown = ", ".join(map(str, damaged[:SHOWN])) + (", ..." if len(damaged) > SHOWN else "")
                self.damage(file, f"the values of samples {shown} of the shard", number, name)
            if fact:
                with read_errors(reader.path), open(reader.path, "rb", buffering=0) as rest:
                    rest.seek(int(column.bounds[-1]) * column.spec.row_bytes)
                    while piece := rest.read(PIECE):
                        digest.update(piece)
                if digest.hexdigest() != fact.xxh3 and not damaged:
                    what = "its digest is not its manifest's, in the padding or the chunk index"
                    self.damage(file, what, number, name)

    def quarantine(self, plan: Plan | None, columns: Columns) -> None:
        file = f"{layout.QUARANTINE}/{layout.REFUSED}"
        there = (self.path / file).is_file()
        with self.guard(file):
            if there:
                read_canonical(self.path / file)
            known = plan and self.version
            wanted = refused_bytes(plan, columns, [*map(len, plan.shards)], self.version) if known else b""
            if known and wanted != ((self.path / file).read_bytes() if there else b""):
                self.unfinished(file, "not of the columns there are; the next `pipeline cache-hidden` makes it again")

    def foreign(self, whole: bool) -> None:
        """Count the files checked and, of a whole cache, name those that nothing accounts for."""
        for folder, below, files in os.walk(self.path):
            below[:] = sorted(name for name in below if not name.startswith(layout.SCRATCH))
            links = [name for name in below if os.path.islink(os.path.join(folder, name))]
            for name in sorted([*files, *links]):
                path = Path(folder, name)
                file = path.relative_to(self.path).as_posix()
                if file in self.known:
                    self.report.files += 1
                    self.report.bytes += path.lstat().st_size
                elif whole and not name.startswith(layout.SCRATCH):
                    self.report.foreign.append(file)
