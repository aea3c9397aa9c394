"""The plan: the shard and row of every sample, fixed before the target runs and never changed; and its index.

Since it has all lengths, all sizes are known before the target runs, workers need no coordination, and a stopped
capture can resume. Shards are contiguous ranges of the corpus; in a shard the longest samples come first, so that
micro-batches of consecutive samples have little padding and write their rows in order.

The index has for every sample its shard, rows, supervised count, domain and split, in one mapped file, in the order of
the shards. Derived from the plan alone, so a cache whose index is missing or out of date still opens, more slowly.

    n samples of the cache
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.cache.atomic import read_errors
from pipeline.cache.layout import FINAL, INDEX, INDEX_MANIFEST, NUMBER, PLAN, aux_column, numbered
from pipeline.cache.manifest import FileFact, check_file, check_size, read_record
from pipeline.cache.samples import SCHEMA, ShardPlan, checked_batch, id_numbers, parse_batches, read_batches, to_numpy
from pipeline.cache.schema import IndexManifest, SegmentManifest
from pipeline.errors import CacheError, UsageError, VersionError

Refused = list[tuple[int, np.ndarray]]  # of one column: shards, and the rows of samples refused in them

INDEX_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.binary(16), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),  # of the shard
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("final_offset", pa.int64(), nullable=False),
        pa.field("final_length", pa.int32(), nullable=False),
        pa.field("supervised", pa.int32(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Plan:
    """The plan of the cache at `path`: the manifests of its segments, in order, and the shards of all of them."""

    path: Path
    manifests: list[SegmentManifest]

    @cached_property
    def shards(self) -> list[ShardPlan]:
        """The planned shards, mapped when first needed. CacheError when they are not those the manifests count."""
        found = []
        for segment, manifest in enumerate(self.manifests):
            path = self.path / PLAN / f"{numbered(segment)}.arrow"
            batches = enumerate(read_batches(path, SCHEMA), manifest.first_shard)
            shards = [ShardPlan(checked_batch(batch, path), number) for number, batch in batches]
            counts = len(shards), sum(map(len, shards)), sum(shard.rows for shard in shards)
            if not shards or counts != (manifest.shards, manifest.samples, manifest.tokens):
                raise CacheError(f"{path}: not the shards its manifest counts; run `pipeline verify`")
            found += shards
        return found

    def _sum(self, name: str) -> int:
        return sum(getattr(manifest, name) for manifest in self.manifests)

    @property
    def samples(self) -> int:
        return self._sum("samples")

    @property
    def tokens(self) -> int:
        return self._sum("tokens")

    @property
    def supervised(self) -> int:
        return self._sum("supervised")

    @property
    def duplicates(self) -> int:
        return self._sum("duplicates")

    @property
    def sources(self) -> list[dict]:
        return [source for manifest in self.manifests for source in manifest.sources]

    @property
    def notes(self) -> dict:
        """The planner's notes (which samples were dropped and why, for one), merged over all segments."""
        return reduce(_merge_notes, (manifest.notes for manifest in self.manifests))

    def segment(self, shard: int) -> SegmentManifest:
        """The manifest of the segment that planned a shard."""
        return next(manifest for manifest in reversed(self.manifests) if manifest.first_shard <= shard)


def _merge_notes(old, new):
    """Merge the notes of two segments by key: numbers added, lists joined; of anything else the newer."""
    if isinstance(old, dict) and isinstance(new, dict):
        shared = {name: _merge_notes(old[name], new[name]) for name in old.keys() & new.keys()}
        return {**old, **new, **shared}
    addable = type(old) is type(new) and isinstance(old, int | float | list) and not isinstance(old, bool)
    return old + new if addable else new


def segment_numbers(cache: Path) -> list[int]:
    """The numbers of the plan's segments, from 0. CacheError when one in between is missing."""
    found = sorted(int(path.stem) for path in (cache / PLAN).glob("*.json") if NUMBER.fullmatch(path.stem))
    if found != list(range(len(found))):
        raise CacheError(f"{cache / PLAN}: segments {found}, one is missing; run `pipeline verify`")
    return found


def read_manifests(cache: Path) -> list[SegmentManifest]:
    """The manifests of the plan's segments. UsageError when there is no plan, CacheError for a damaged one."""
    paths = [cache / PLAN / f"{numbered(number)}.json" for number in segment_numbers(cache)]
    manifests = [read_record(path, SegmentManifest) for path in paths]
    if not manifests:
        raise UsageError(f"{cache} has no plan yet; run `pipeline plan` or `pipeline cache-hidden`")
    shards = 0
    for number, manifest in enumerate(manifests):
        whole = f"{numbered(number)}.arrow" in manifest.files
        if not whole or manifest.segment != number or manifest.first_shard != shards:
            raise CacheError(f"{cache / PLAN}: segment {number} is out of its place; run `pipeline verify`")
        shards += manifest.shards
    return manifests


def load_plan(path: Path, manifests: list[SegmentManifest] | None = None) -> Plan:
    """Read the plan, every byte checked. UsageError when there is none, CacheError when it is damaged."""
    plan = Plan(path, read_manifests(path) if manifests is None else manifests)
    for number, manifest in enumerate(plan.manifests):
        name = f"{numbered(number)}.arrow"
        check_file(path / PLAN / name, manifest.files[name])
    return plan


def build_index(plan: Plan) -> pa.Table:
    """The index of a plan, one record batch a shard."""
    batches = []
    for shard in plan.shards:
        named = {
            "row": np.arange(len(shard), dtype=np.int32),
            "final_length": np.diff(shard.final_bounds).astype(np.int32),
            "supervised": shard.supervised.astype(np.int32),
        }
        names = INDEX_SCHEMA.names
        columns = [pa.array(named[name]) if name in named else shard.batch.column(name) for name in names]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=INDEX_SCHEMA))
    return pa.Table.from_batches(batches, INDEX_SCHEMA)


def index_manifest(cache: Path) -> IndexManifest:
    """Read the index's manifest. CacheError when it is absent, damaged or of something else."""
    manifest = read_record(cache / INDEX_MANIFEST, IndexManifest)
    if INDEX not in manifest.files:
        raise CacheError(f"{cache / INDEX_MANIFEST}: the manifest of something else; run `pipeline verify`")
    return manifest


def read_index(cache: Path, manifests: list[SegmentManifest]) -> pa.Table | None:
    """Map the index of the plan with these manifests; None when it has to be rebuilt."""
    path = cache / INDEX
    try:
        facts = index_manifest(cache)
        if facts.segments != [manifest.files for manifest in manifests]:
            return None
        check_size(path, facts.files[INDEX])
        with read_errors(path), pa.memory_map(str(path)) as file:
            data = file.read_buffer()
        if FileFact.of_bytes(data) != facts.files[INDEX]:
            return None
        batches = parse_batches(data, INDEX_SCHEMA, path)
    except (CacheError, VersionError):
        return None
    shards = sum(manifest.shards for manifest in manifests)
    return pa.Table.from_batches(batches) if len(batches) == 1 and _in_order(batches[0], shards) else None


def _in_order(index: pa.RecordBatch, shards: int) -> bool:
    """Whether the samples of every shard from 0 on follow each other, row by row."""
    shard, row = (to_numpy(index.column(name)) for name in ("shard", "row"))
    if not len(shard) or shard[0] or row[0] or shard[-1] != shards - 1:
        return False
    step, next_row = np.diff(shard), np.diff(row)
    return bool((((step == 0) & (next_row == 1)) | ((step == 1) & (row[1:] == 0))).all())


class SampleTable:
    """All planned samples as numpy columns [n]. Order: by shard, in the order of the shard."""

    def __init__(
        self, index: pa.Table, shards: int, columns: Callable[[], Iterable[str]], refused: Callable[[str], Refused]
    ):
        """columns() gives the names of all columns of the cache; refused(name) where samples are refused in one."""
        self._index, self._columns, self._refused = index, columns, refused
        self.shard = self._numbers("shard")
        self.row = self._numbers("row")  # in the shard
        self.offset = self._numbers("offset")
        self.length = self._numbers("length")
        self.final_offset = self._numbers("final_offset")
        self.final_length = self._numbers("final_length")
        self.supervised = self._numbers("supervised")
        self.starts = np.searchsorted(self.shard, np.arange(shards + 1))  # first sample of each shard
        self._ok: dict[tuple[str, ...], np.ndarray] = {}

    def _numbers(self, name: str) -> np.ndarray:
        return to_numpy(self._whole(name))

    def _whole(self, name: str) -> pa.Array:
        column = self._index.column(name)  # one piece where it is mapped, which pyarrow would copy
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def sample_id(self) -> np.ndarray:
        """The sample ids as `id_numbers`, uint64 [n, 2]."""
        return id_numbers(self._whole("sample_id"))

    @property
    def low64(self) -> np.ndarray:
        """The low 64 bits of the sample ids, uint64 [n]."""
        return self.sample_id[:, 1]

    def hex(self, i: int) -> str:
        """The sample id in hex, 32 digits."""
        return f"{self.sample_id[i, 0]:016x}{self.sample_id[i, 1]:016x}"

    @cached_property
    def domain(self) -> list[str]:
        return self._index.column("domain").to_pylist()

    @cached_property
    def split(self) -> list[str]:
        """`train`, `heldout`, or empty where the corpus does not say."""
        return self._index.column("split").to_pylist()

    @property
    def ok(self) -> np.ndarray:
        """Samples that no column at all refused, bool [n]."""
        return self._accepted(self._columns())

    def usable(self, layers: Iterable[int], final: bool = False) -> np.ndarray:
        """Samples that none of a view's own columns refused, bool [n]: what `HiddenCache.read` gives for this view."""
        return self._accepted([*map(aux_column, layers), *[FINAL] * final])

    def _accepted(self, columns: Iterable[str]) -> np.ndarray:
        key = tuple(sorted(set(columns)))
        held = self._ok.get(key)
        if held is None:
            held = np.ones(len(self), bool)
            for name in key:
                for shard, rows in self._refused(name):
                    if rows.max() >= self.starts[shard + 1] - self.starts[shard]:
                        raise CacheError(f"{name} of shard {shard}: refuses samples that are not there")
                    held[self.starts[shard] + rows] = False
            held.flags.writeable = False
            self._ok[key] = held
        return held
