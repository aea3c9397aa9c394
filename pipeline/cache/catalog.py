"""The catalog: what a cache is and which columns it has, as one command knows it.

Readers, writers, verify, repair and reports ask one Catalog, opened once for the command. Everything in it is read when
first needed: a cache of a thousand shards opens as quickly as one of sixteen. Other processes may commit meanwhile:
after `refresh`, folders are listed again, and only manifests whose file is another one are read again.
"""

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.cache import layout
from pipeline.cache.atomic import read_errors
from pipeline.cache.codecs import column_of_files
from pipeline.cache.layout import checked_path, numbered, path_inside, shard_folder
from pipeline.cache.manifest import check_file, check_size, file_size, read_record
from pipeline.cache.plan import (
    Plan,
    Refused,
    SampleTable,
    build_index,
    load_plan,
    read_index,
    read_manifests,
    segment_numbers,
)
from pipeline.cache.samples import ShardPlan
from pipeline.cache.schema import ColumnManifest, ColumnSpec, Identity, SegmentManifest, TargetManifest, column_manifest
from pipeline.errors import CacheError, PipelineError, read_error
from pipeline.json_files import MAX_BYTES, parse_json, read_file

Work = list[tuple[ShardPlan, list[ColumnSpec]]]  # shards to write, each with the columns that it lacks
FileVersion = tuple[int, int, int]  # inode, size and modification time, by which a replaced file is recognised


def columns_of(entries: Iterable[str]) -> list[str]:
    """The columns, sorted, of a shard with these file names: those with a manifest."""
    stems = (entry.removesuffix(".json") for entry in entries if entry.endswith(".json"))
    return sorted(stem for stem in stems if layout.COLUMN.fullmatch(stem))


def shards_per_column(shards: Sequence[Iterable[str]]) -> dict[str, int]:
    """How many shards have each column, by name, given the file names of every shard.

    A column with values but no manifest in any shard has the count 0.
    """
    counts = Counter(name for entries in shards for name in columns_of(entries))
    stems = {entry.removesuffix(".arrow") for entries in shards for entry in entries}
    counts.update(dict.fromkeys((column for stem in stems if (column := column_of_files(stem))), 0))
    return dict(sorted(counts.items()))


class _Shard:
    """A shard's folder as it was listed: the version of each column's manifest, None for other entries."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, FileVersion | None] = {}
        self.manifests: dict[str, ColumnManifest] = {}  # of columns that agree with the others
        self.captured: dict[str, ColumnManifest | None] = {}
        self.samples_size: int | None = None  # of samples.arrow, -1 where it is missing or a link out of the cache
        self.error: PipelineError | None = None
        try:
            with os.scandir(folder) as entries:
                self.entries = {entry.name: _version(entry) for entry in entries}
        except OSError as error:
            if not isinstance(error, FileNotFoundError | NotADirectoryError) or folder.exists():
                self.error = read_error(folder, error)
        self.columns = columns_of(self.entries)

    def readable(self) -> "_Shard":
        """The shard itself; raises the typed error of a folder that cannot be listed."""
        if self.error is not None:
            raise self.error
        return self


def _version(entry: os.DirEntry) -> FileVersion | None:
    if entry.name.endswith(".json") and layout.COLUMN.fullmatch(entry.name.removesuffix(".json")):
        with contextlib.suppress(OSError):
            found = entry.stat()
            return found.st_ino, found.st_size, found.st_mtime_ns
    return None


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Pause the collector, which goes through all manifests again for every few read: half the time for 60,000."""
    resume = gc.enable if gc.isenabled() else gc.disable
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # nor soon: these two calls move all objects to the oldest generation
            gc.freeze()
            gc.unfreeze()
        resume()


class Catalog:
    """The cache at `path`: identity, plan, samples, columns and their manifests. Thread-safe but for `refresh`."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._parsed: dict[tuple[int, str], tuple[FileVersion | None, ColumnManifest]] = {}
        self.refresh()

    def refresh(self, shard: int | None = None) -> None:
        """List a shard again when it is next asked about, or (None) everything, the plan included."""
        if shard is None:
            self._shards: dict[int, _Shard] = {}
            self._kinds: set[tuple[str, int]] = set()
        else:
            self._shards.pop(shard, None)
        planned = ("segments", "plan", "shards", "index", "samples") if shard is None else ()
        for name in (*planned, "names", "partial", "whole", "kind"):
            self.__dict__.pop(name, None)

    # What the cache is

    @property
    def exists(self) -> bool:
        """Whether there is a cache.json."""
        return (self.path / layout.IDENTITY).is_file()

    @cached_property
    def identity(self) -> Identity:
        """The content of cache.json. CacheError when it is missing or damaged."""
        return read_record(self.path / layout.IDENTITY, Identity)

    @property
    def hash(self) -> str:
        """The hash of cache.json, by which every manifest names its cache."""
        return self.identity.hash

    @property
    def format(self) -> str:
        """The format version of the cache, which every manifest written into it has."""
        return self.identity.format

    # The plan

    @property
    def planned(self) -> bool:
        """Whether there is a plan. CacheError when a segment of it is missing."""
        return bool(segment_numbers(self.path))

    @cached_property
    def segments(self) -> list[SegmentManifest]:
        """The manifests of the plan's segments. UsageError when there is no plan, CacheError when it is damaged."""
        return read_manifests(self.path)

    @cached_property
    def plan(self) -> Plan:
        """The plan, every byte checked; its samples are parsed when they are needed. UsageError, CacheError."""
        return load_plan(self.path, self.segments)

    @cached_property
    def shards(self) -> int:
        """How many shards are planned."""
        return sum(manifest.shards for manifest in self.segments)

    @cached_property
    def index(self):
        """The index of the plan, None where it is missing or out of date."""
        return read_index(self.path, self.segments)

    @cached_property
    def samples(self) -> SampleTable:
        """The table of all planned samples: from the index, else from the plan."""
        index = build_index(self.plan) if self.index is None else self.index
        return SampleTable(index, self.shards, lambda: {name for names in self.names for name in names}, self.refused)

    # Columns

    def _shard(self, shard: int) -> _Shard:
        found = self._shards.get(shard)
        if found is None:
            found = self._shards.setdefault(shard, _Shard(shard_folder(self.path, shard)))
        return found

    def entries(self, shard: int) -> Mapping[str, FileVersion | None]:
        """A shard's files and folders by name, with the version of manifests; none where it cannot be listed."""
        return self._shard(shard).entries

    def columns_of(self, shard: int) -> list[str]:
        """The columns that a shard has, sorted."""
        return self._shard(shard).columns

    @cached_property
    def names(self) -> list[list[str]]:
        """The columns of each planned shard, sorted."""
        return [self._shard(shard).readable().columns for shard in range(self.shards)]

    @cached_property
    def partial(self) -> dict[str, int]:
        """How many shards have each column that some lack, by name: see `shards_per_column`."""
        counts = shards_per_column([self._shard(shard).readable().entries for shard in range(self.shards)])
        return {name: count for name, count in counts.items() if count < self.shards}

    @property
    def unplanned_shards(self) -> list[int]:
        """Shards with columns that no segment of the plan has: a segment was lost."""
        return [n for n in self.shard_numbers() if n >= self.shards and self._shard(n).readable().columns]

    def shard_numbers(self) -> list[int]:
        """The numbers of the shards that have a folder, ascending."""
        if not (self.path / layout.SHARDS).is_dir():
            return []
        with read_errors(self.path / layout.SHARDS):
            return sorted(int(name) for name in os.listdir(self.path / layout.SHARDS) if layout.NUMBER.fullmatch(name))

    def read(self, shard: int, name: str) -> ColumnManifest:
        """The manifest of a column by itself. CacheError when it is absent, damaged or another column's."""
        version = self._shard(shard).entries.get(f"{name}.json")
        known = self._parsed.get((shard, name))
        if known is None or known[0] != version:
            known = self._parsed[shard, name] = version, column_manifest(self.path, shard, name)
        return known[1]

    def manifest(self, shard: int, name: str) -> ColumnManifest:
        """The manifest of a column. CacheError when it is damaged, another cache's, or inconsistent with the others."""
        checked = self._shard(shard).manifests
        manifest = checked.get(name)
        if manifest is None:
            manifest = self.read(shard, name)
            if manifest.cache != self.hash:
                folder = shard_folder(self.path, shard)
                raise CacheError(f"{folder}, column {name}: belongs to another cache; run `pipeline verify`")
            other = next(iter(checked.values()), manifest)
            if other.files[layout.SAMPLES] != manifest.files[layout.SAMPLES]:
                where = f"{self.path}, shard {numbered(shard)}"
                raise CacheError(f"{where}: columns of different samples; run `pipeline verify`")
            self._kinds.add((manifest.spec.dtype, manifest.spec.width))
            if len(self._kinds) > 1:
                raise CacheError(f"{self.path}: columns of several kinds, {sorted(self._kinds)}; run `pipeline verify`")
            checked[name] = manifest
        return manifest

    def columns(self, shard: int) -> dict[str, ColumnManifest]:
        """Manifests of a shard's columns, by name. The typed error of a folder that cannot be listed."""
        return {name: self.manifest(shard, name) for name in self._shard(shard).readable().columns}

    def columns_of_shards(self) -> list[dict[str, ColumnManifest]]:
        """What `columns` returns for each planned shard."""
        with _without_collections():
            return [self.columns(shard) for shard in range(self.shards)]

    @cached_property
    def whole(self) -> dict[str, ColumnSpec]:
        """Columns that every shard has, by name, each with its spec."""
        everywhere = sorted(set.intersection(*map(set, self.names))) if self.names else []
        return {name: self.manifest(0, name).spec for name in everywhere}

    @cached_property
    def kind(self) -> tuple[str, int] | None:
        """The dtype and width that all columns share; None where there is no column."""
        first = next(((shard, names[0]) for shard, names in enumerate(self.names) if names), None)
        spec = first and self.manifest(*first).spec
        return spec and (spec.dtype, spec.width)

    def codecs(self, name: str) -> set[str]:
        """The codecs of a column over all shards: several during a recode, or after one was stopped."""
        return {self.manifest(shard, name).spec.codec for shard in range(self.shards)}

    def refused(self, name: str) -> Refused:
        """Where samples were refused in a column: (shard, rows of the shard)."""
        shards = [shard for shard, names in enumerate(self.names) if name in names]
        refused = [(shard, self.manifest(shard, name).refused) for shard in shards]
        return [(shard, np.array([*map(int, rows)])) for shard, rows in refused if rows]

    # What a capture has finished

    def captured(self, shard: int, name: str) -> ColumnManifest | None:
        """The manifest of a column whose files all have the right size; None when it has to be captured."""
        manifest, found = self._captured(shard, name), self._shard(shard)
        if manifest and found.samples_size is None:
            try:
                found.samples_size = file_size(checked_path(str(found.folder), layout.SAMPLES))
            except CacheError:
                found.samples_size = -1
        return manifest if manifest and found.samples_size == manifest.files[layout.SAMPLES].size else None

    def captured_columns(self, shard: int) -> dict[str, ColumnManifest]:
        """Manifests of a shard's captured columns, by name; its `samples.arrow` may be missing or damaged."""
        return {name: manifest for name in self.columns_of(shard) if (manifest := self._captured(shard, name))}

    def _captured(self, shard: int, name: str) -> ColumnManifest | None:
        """The manifest of a column whose own files have the right size, looked at once."""
        owner, found, captured = self.hash, self._shard(shard), None
        if name in found.captured:
            return found.captured[name]
        if f"{name}.json" in found.entries or found.error is not None:
            with contextlib.suppress(CacheError):
                manifest, folder = self.read(shard, name), str(found.folder)
                if manifest.cache == owner:  # else left there from another cache
                    for file, fact in manifest.files.items():
                        if file != layout.SAMPLES:
                            check_size(checked_path(folder, file), fact)
                    captured = manifest
        return found.captured.setdefault(name, captured)

    def missing(self, columns: Sequence[ColumnSpec]) -> Work:
        """The shards that lack columns, and which."""
        with _without_collections():
            absent = [[spec for spec in columns if not self.captured(n, spec.name)] for n in range(self.shards)]
        return [(self.plan.shards[shard], specs) for shard, specs in enumerate(absent) if specs]


def has_target(catalog: Catalog) -> bool:
    """Whether `target/`, what training needs of the target, is there, as far as its manifest and sizes tell."""
    with contextlib.suppress(CacheError):
        for name, fact in target_manifest(catalog).files.items():
            check_size(path_inside(catalog.path / layout.TARGET, name), fact)
        return True
    return False


def target_manifest(catalog: Catalog) -> TargetManifest:
    """The folder's manifest. CacheError when it is absent, damaged or of another cache."""
    path = catalog.path / layout.TARGET / layout.TARGET_MANIFEST
    manifest = read_record(path, TargetManifest)
    if manifest.cache != catalog.hash:
        raise CacheError(f"{path}: belongs to another cache; run `pipeline verify`")
    return manifest


def target_file(catalog: Catalog, name: str) -> Path:
    """The path of a file of the folder, its size and digest checked now. CacheError when it is absent or damaged."""
    files = target_manifest(catalog).files
    path = path_inside(catalog.path / layout.TARGET, name)
    if name not in files:
        raise CacheError(f"{path}: not in the cache; run `pipeline cache-hidden` again with the same arguments")
    check_file(path, files[name])
    return path


def target_json(catalog: Catalog, name: str) -> dict:
    """What a JSON file of the folder holds, checked: a dict."""
    path, facts = target_file(catalog, name), None
    with read_errors(path), contextlib.suppress(ValueError):
        facts = parse_json(read_file(path, MAX_BYTES))
    if not isinstance(facts, dict):
        raise CacheError(f"{path}: damaged, it is no JSON object; run `pipeline verify`")
    return facts
