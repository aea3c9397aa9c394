"""The plan: the shard and row of every sample, fixed before the target runs and never changed.

Since it has all lengths, all sizes are known before the target runs, workers need no coordination, and a stopped
capture can resume. Shards are contiguous ranges of the corpus; in a shard the longest samples come first, so that
micro-batches of consecutive samples have little padding and write their rows in order.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from pipeline.cache.arrow_files import read_batches
from pipeline.cache.atomic import Scratch, clean_scratch, commit_lock, sync_file, sync_folder, write_errors
from pipeline.cache.index import write_index
from pipeline.cache.layout import NUMBER, PLAN, SCRATCH, SHARDS, numbered
from pipeline.cache.manifest import FACT, FileFact, canonical, check_file, read_canonical
from pipeline.cache.sample_ids import SampleIdSet
from pipeline.cache.samples import (
    SCHEMA,
    SPOOLED,
    PlannedSample,
    ShardPlan,
    checked_batch,
    make_batch,
    sample_id,
    write_batches,
)
from pipeline.errors import CacheError, DataError, UsageError

SHARD_BYTES = 4 << 30  # raw states per shard, over the columns of the first capture
MIN_SHARDS = 16  # so that a small capture, too, can resume part-way
_SPOOL_TOKENS, _SPOOL_SAMPLES = 1 << 20, 4096  # buffered in memory before they are written

_PLACE, _COUNTS = ("segment", "first_shard", "shards", "row_bytes"), ("samples", "tokens", "supervised", "duplicates")
FORM = {**dict.fromkeys((*_PLACE, *_COUNTS, "final_rows"), int), "sources": [dict], "notes": dict}


@dataclass(frozen=True)
class Plan:
    """A cache's plan: the shards of all segments, and the segments' manifests, in order."""

    shards: list[ShardPlan]
    manifests: list[dict]

    def _sum(self, name: str) -> int:
        return sum(manifest[name] for manifest in self.manifests)

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
        return [source for manifest in self.manifests for source in manifest["sources"]]

    @property
    def notes(self) -> dict:
        """The planner's notes (which samples were dropped and why, for one), merged over all segments."""
        return reduce(_merge_notes, (manifest["notes"] for manifest in self.manifests))

    def segment(self, shard: int) -> dict:
        """The manifest of the segment that planned a shard."""
        return next(manifest for manifest in reversed(self.manifests) if manifest["first_shard"] <= shard)


def _merge_notes(old, new):
    """Merge the notes of two segments by key: numbers added, lists joined; of anything else the newer."""
    if isinstance(old, dict):
        shared = {name: _merge_notes(old[name], new[name]) for name in old.keys() & new.keys()}
        return {**old, **new, **shared}
    addable = type(old) is type(new) and isinstance(old, int | float | list) and not isinstance(old, bool)
    return old + new if addable else new


@dataclass
class _Counts:
    """Counts over the samples of a new segment, and the ids seen."""

    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    duplicates: int = 0
    final_rows: int = 0
    seen: SampleIdSet = field(default_factory=SampleIdSet)


def write_segment(
    cache: Path,
    samples: Iterable[PlannedSample],
    *,
    row_bytes: int,
    sources: list[dict],
    notes: dict | None = None,
    choose: Callable[[list[ShardPlan]], np.ndarray] | None = None,
    replace: bool = False,
) -> Plan:
    """Append a segment to the cache's plan, or make its first, and return the whole plan.

    `row_bytes` is the size of a row over all columns requested; it only decides the size of shards. `sources` and
    `notes` are read after the last sample, so a generator of `samples` may fill them. `choose` gets all new samples, in
    parts, after the last and returns which to plan, bool [n]. A sample already planned is counted as a duplicate; when
    all are, the plan is unchanged. `replace`: the new segment replaces the plan, once it is ready, rather than extends
    it. Memory holds the sample ids (see `SampleIdSet`) and one shard's tokens, never the corpus.
    Raises DataError when there is no sample, RoomError, and UsageError when another process has planned something else
    meanwhile, or uses the plan to be replaced.
    """
    assert row_bytes > 0, f"a row takes {row_bytes} bytes"
    with write_errors(cache, "a plan"):
        cache.mkdir(parents=True, exist_ok=True)
    earlier = load_plan(cache) if segment_numbers(cache) and not replace else Plan([], [])
    counts = _Counts()
    for shard in earlier.shards:
        for name in shard.batch.column("sample_id"):
            counts.seen.add(name.as_py())
    with Scratch(cache, PLAN) as scratch, write_errors(cache, "a plan"):
        spool = scratch.path / "spool.arrow"
        _spool(samples, spool, counts)
        if not counts.samples and counts.duplicates:
            return earlier
        if not counts.samples:
            raise DataError("no usable sample in the corpus; it needs conversations with at least one assistant turn")
        if choose is not None:
            spool = _choose(spool, scratch.path / "chosen.arrow", choose, counts)
        segment = scratch.path / "segment.arrow"
        first = len(earlier.shards)
        shards = _write_shards(spool, segment, counts, row_bytes, first)
        manifest = {
            "segment": len(earlier.manifests),
            "files": {f"{numbered(len(earlier.manifests))}.arrow": FileFact.of_file(segment).as_dict()},
            "first_shard": first,
            "shards": shards,
            "row_bytes": row_bytes,
            "samples": counts.samples,
            "tokens": counts.tokens,
            "supervised": counts.supervised,
            "final_rows": counts.final_rows,
            "duplicates": counts.duplicates,
            "sources": sources,
            "notes": notes or {},
        }
        _commit(cache, scratch, segment, manifest, None if replace else earlier)
    return load_plan(cache)


def _spool(samples: Iterable[PlannedSample], path: Path, counts: _Counts) -> None:
    """Write the new samples to `path`, an Arrow stream, and count them and the duplicates."""
    waiting, names, tokens = [], [], 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for sample in samples:
            T = len(sample.ids)
            assert T and np.shape(sample.mask) == (T,), f"{sample.file}:{sample.line}: {T} ids, another mask"
            name = sample.digest or sample_id(sample.ids, sample.mask)
            if not counts.seen.add(name):
                counts.duplicates += 1
                continue
            counts.samples += 1
            counts.tokens += T
            counts.supervised += int(np.count_nonzero(sample.mask))
            waiting.append(sample)
            names.append(name)
            tokens += T
            if tokens >= _SPOOL_TOKENS or len(waiting) >= _SPOOL_SAMPLES:
                writer.write_batch(make_batch(waiting, names, SPOOLED))
                waiting, names, tokens = [], [], 0
        if waiting:
            writer.write_batch(make_batch(waiting, names, SPOOLED))


def _choose(spool: Path, path: Path, choose: Callable[[list[ShardPlan]], np.ndarray], counts: _Counts) -> Path:
    """Write the spooled samples that `choose` selects to `path`, count only these, and return the spool to use."""
    with pa.memory_map(str(spool)) as file:
        parts = [ShardPlan(batch, SPOOLED) for batch in pa.ipc.open_stream(file)]
        chosen_n = choose(parts)
        assert len(chosen_n) == counts.samples and chosen_n.any(), f"{chosen_n.sum()} chosen of {counts.samples}"
        del parts
    if chosen_n.all():
        return spool
    counts.samples = counts.tokens = counts.supervised = 0
    counts.seen = SampleIdSet()  # the spool has no duplicates
    _spool((sample for (sample, _), chosen in zip(_spooled(spool), chosen_n, strict=True) if chosen), path, counts)
    return path


def _spooled(path: Path) -> Iterator[tuple[PlannedSample, bytes]]:
    """Yield (sample, sample id) from what `_spool` wrote, in order."""
    with pa.memory_map(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            yield from zip(ShardPlan(batch, SPOOLED).samples(), batch.column("sample_id").to_pylist(), strict=True)


def _write_shards(spool: Path, segment: Path, counts: _Counts, row_bytes: int, first: int) -> int:
    """Divide the spooled samples into shards of about equal rows and write a batch for each. Returns their number."""
    wanted = max(MIN_SHARDS, -(-counts.tokens * row_bytes // SHARD_BYTES))
    before = 0

    def share(entry: tuple[PlannedSample, bytes]) -> int:
        nonlocal before
        part = before * wanted // counts.tokens
        before += len(entry[0].ids)
        return part

    def shard_batches() -> Iterator[pa.RecordBatch]:
        for number, (_, group) in enumerate(groupby(_spooled(spool), key=share), first):
            entries = sorted(group, key=lambda entry: (-len(entry[0].ids), entry[1]))
            members, names = zip(*entries, strict=True)
            batch = make_batch(members, names, number)
            counts.final_rows += ShardPlan(batch, number).final_count
            yield batch

    return write_batches(segment, shard_batches())


def _commit(cache: Path, scratch: Scratch, segment: Path, manifest: dict, earlier: Plan | None) -> None:
    """Rename the segment into place after those of `earlier`, or (None) instead of the present plan.

    The index of the new plan is written before the segment's manifest, which comes last."""
    folder, name = cache / PLAN, numbered(manifest["segment"])
    ready = scratch.path / "segment.json"
    ready.write_bytes(canonical(manifest))
    sync_file(segment)
    sync_file(ready)
    with commit_lock(cache):
        if earlier is None:
            _remove_plan(cache, scratch)
            earlier = Plan([], [])
        if len(segment_numbers(cache)) != len(earlier.manifests):
            if read_canonical(folder / f"{name}.json")["hash"] == json.loads(canonical(manifest))["hash"]:
                return  # the same plan, made twice at a time
            raise UsageError(f"{cache}: another process planned meanwhile; run the command again, it uses that plan")
        folder.mkdir(exist_ok=True)
        segment.replace(folder / f"{name}.arrow")
        plan = Plan(
            earlier.shards + _shards_of(folder / f"{name}.arrow", manifest),
            [*earlier.manifests, json.loads(canonical(manifest))],
        )
        write_index(cache, plan)
        sync_folder(folder)
        ready.replace(folder / f"{name}.json")
        sync_folder(folder)
        sync_folder(cache)


def _remove_plan(cache: Path, scratch: Scratch) -> None:
    """Remove the plan, under the commit lock: the newest segment first, its manifest before its samples."""
    check_not_in_use(cache, {scratch.path.name})
    for number in reversed(segment_numbers(cache)):
        for suffix in ("json", "arrow"):
            (cache / PLAN / f"{numbered(number)}.{suffix}").unlink(missing_ok=True)


def has_columns(cache: Path) -> bool:
    """Whether any column of the cache exists."""
    return any((cache / SHARDS).glob("*/*.json"))


def check_not_in_use(cache: Path, own: Iterable[str] = ()) -> None:
    """Raise UsageError when the cache has columns, or scratch of another process; this one's is named in `own`.

    The scratch of dead processes does not count, and is removed.
    """
    clean_scratch(cache)
    ours = {f"{SCRATCH}commit.lock", f"{SCRATCH}plan.lock", *own}
    if has_columns(cache) or any(path.name not in ours for path in cache.glob(f"{SCRATCH}*")):
        raise UsageError(f"{cache} is being captured by another process; wait for it, or pass another --out")


@contextlib.contextmanager
def plan_in_use(cache: Path, plan: Plan) -> Iterator[None]:
    """Keep other processes from replacing `plan` during a capture. UsageError if one has already, RoomError."""
    with write_errors(cache, "a scratch folder"), commit_lock(cache):
        if read_manifests(cache)[: len(plan.manifests)] != plan.manifests:
            raise UsageError(f"{cache} was planned afresh meanwhile; run the command again, it uses that plan")
        scratch = Scratch(cache, "working")
    with scratch:
        yield


def segment_numbers(cache: Path) -> list[int]:
    """The numbers of the plan's segments, from 0. CacheError when one in between is missing."""
    found = sorted(int(path.stem) for path in (cache / PLAN).glob("*.json") if NUMBER.fullmatch(path.stem))
    if found != list(range(len(found))):
        raise CacheError(f"{cache / PLAN}: segments {found}, one is missing; run `pipeline verify`")
    return found


def read_manifests(cache: Path) -> list[dict]:
    """The manifests of the plan's segments. UsageError when there is no plan, CacheError for a damaged one."""
    names = [numbered(number) for number in segment_numbers(cache)]
    forms = [{**FORM, "files": {f"{name}.arrow": FACT}} for name in names]
    manifests = [read_canonical(cache / PLAN / f"{name}.json", form) for name, form in zip(names, forms, strict=True)]
    if not manifests:
        raise UsageError(f"{cache} has no plan yet; run `pipeline plan` or `pipeline cache-hidden`")
    shards = 0
    for number, manifest in enumerate(manifests):
        if manifest["segment"] != number or manifest["first_shard"] != shards:
            raise CacheError(f"{cache / PLAN}: segment {number} is out of its place; run `pipeline verify`")
        shards += manifest["shards"]
    return manifests


def load_plan(cache: Path) -> Plan:
    """Read the plan, every byte checked. UsageError when there is none, CacheError when it is damaged."""
    manifests = read_manifests(cache)
    shards = []
    for number, manifest in enumerate(manifests):
        name = f"{numbered(number)}.arrow"
        check_file(cache / PLAN / name, manifest["files"][name])
        shards += _shards_of(cache / PLAN / name, manifest)
    return Plan(shards, manifests)


def _shards_of(path: Path, manifest: dict) -> list[ShardPlan]:
    """Map the shards of one segment. CacheError when they are not those its manifest counts."""
    batches = read_batches(path, SCHEMA)
    shards = [
        ShardPlan(checked_batch(batch, path), number) for number, batch in enumerate(batches, manifest["first_shard"])
    ]
    counts = len(shards), sum(map(len, shards)), sum(shard.rows for shard in shards)
    if not shards or counts != (manifest["shards"], manifest["samples"], manifest["tokens"]):
        raise CacheError(f"{path}: not the shards its manifest counts; run `pipeline verify`")
    return shards
