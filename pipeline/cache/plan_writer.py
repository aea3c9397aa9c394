"""Writes the plan: samples are spooled, divided into shards, and committed as one segment by two renames. And what a
capture does by it: which samples are computed together, and who may replace it.

Memory holds the sample ids and one shard's tokens, never the corpus.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from pipeline.cache.atomic import Scratch, clean_scratch, commit_lock, sync_file, sync_folder, write_errors, write_file
from pipeline.cache.layout import INDEX, INDEX_MANIFEST, PLAN, SCRATCH, SHARDS, numbered
from pipeline.cache.manifest import FileFact, canonical, format_of, read_record, write_canonical
from pipeline.cache.plan import Plan, build_index, load_plan, read_manifests, segment_numbers
from pipeline.cache.samples import (
    SCHEMA,
    SPOOLED,
    PlannedSample,
    ShardPlan,
    batch_bytes,
    make_batch,
    sample_id,
    write_batches,
)
from pipeline.cache.schema import IndexManifest, SegmentManifest
from pipeline.errors import DataError, UsageError

SHARD_BYTES = 4 << 30  # raw states per shard, over the columns of the first capture
MIN_SHARDS = 16  # so that a small capture, too, can resume part-way
_SPOOL_TOKENS, _SPOOL_SAMPLES = 1 << 20, 4096  # buffered in memory before they are written
FORWARD_TOKENS = 128  # what a forward costs besides its tokens: about what an H100 computes while it reads the weights
_ID_BYTES = 16
_FREE = bytes(_ID_BYTES)  # marks a free slot: no digest is 16 zeros in practice


class SampleIdSet:
    """A set of 16-byte sample ids in 22 to 43 bytes of memory each; a Python set takes over a hundred.

    A hash table with open addressing, keyed by the first bytes of an id, which is a digest already.
    """

    def __init__(self):
        self.count, self.slots = 0, 1024
        self.table = bytearray(_ID_BYTES * self.slots)

    def __len__(self) -> int:
        return self.count

    def add(self, name: bytes) -> bool:
        """Add an id of 16 bytes. Returns whether it is new."""
        assert len(name) == _ID_BYTES and name != _FREE, f"{name!r} is no sample's name"
        if not self._put(name):
            return False
        self.count += 1
        if 4 * self.count > 3 * self.slots:
            old, self.slots = self.table, 2 * self.slots
            self.table = bytearray(2 * len(old))
            for at in range(0, len(old), _ID_BYTES):
                if (there := old[at : at + _ID_BYTES]) != _FREE:
                    self._put(there)
        return True

    def _put(self, name: bytes) -> bool:
        table, slots = self.table, self.slots
        slot = int.from_bytes(name[:8], "little") % slots
        while (there := table[_ID_BYTES * slot : _ID_BYTES * (slot + 1)]) != _FREE:
            if there == name:
                return False
            slot = (slot + 1) % slots
        table[_ID_BYTES * slot : _ID_BYTES * (slot + 1)] = name
        return True


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
    earlier = load_plan(cache) if segment_numbers(cache) and not replace else Plan(cache, [])
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
        files = {f"{numbered(len(earlier.manifests))}.arrow": FileFact.of_file(segment)}
        manifest = SegmentManifest(
            segment=len(earlier.manifests),
            files=files,
            first_shard=first,
            shards=shards,
            row_bytes=row_bytes,
            samples=counts.samples,
            tokens=counts.tokens,
            supervised=counts.supervised,
            final_rows=counts.final_rows,
            duplicates=counts.duplicates,
            sources=sources,
            notes=notes or {},
        )
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


def _commit(cache: Path, scratch: Scratch, segment: Path, manifest: SegmentManifest, earlier: Plan | None) -> None:
    """Rename the segment into place after those of `earlier`, or (None) instead of the present plan.

    The index of the new plan is written before the segment's manifest, which comes last."""
    folder, name = cache / PLAN, numbered(manifest.segment)
    ready = scratch.path / "segment.json"
    ready.write_bytes(canonical(manifest.as_dict(), format_of(cache)))
    manifest = read_record(ready, SegmentManifest)  # with its hash
    sync_file(segment)
    sync_file(ready)
    with commit_lock(cache):
        if earlier is None:
            check_not_in_use(cache, {scratch.path.name})
            for number in reversed(segment_numbers(cache)):  # the newest first, its manifest before its samples
                for suffix in ("json", "arrow"):
                    (folder / f"{numbered(number)}.{suffix}").unlink(missing_ok=True)
            earlier = Plan(cache, [])
        if len(segment_numbers(cache)) != len(earlier.manifests):
            if read_record(folder / f"{name}.json", SegmentManifest).hash == manifest.hash:
                return  # the same plan, made twice at a time
            raise UsageError(f"{cache}: another process planned meanwhile; run the command again, it uses that plan")
        folder.mkdir(exist_ok=True)
        segment.replace(folder / f"{name}.arrow")
        plan = Plan(cache, [*earlier.manifests, manifest])
        write_index(cache, plan)
        sync_folder(folder)
        ready.replace(folder / f"{name}.json")
        sync_folder(folder)
        sync_folder(cache)


def write_index(cache: Path, plan: Plan) -> None:
    """Write the index of `plan`, its manifest last; the manifest of an older index is removed first."""
    (batch,) = build_index(plan).combine_chunks().to_batches()
    data = batch_bytes(batch)
    segments = [manifest.files for manifest in plan.manifests]
    facts = IndexManifest(files={INDEX: FileFact.of_bytes(data)}, segments=segments).as_dict()
    manifest, version = cache / INDEX_MANIFEST, format_of(cache)
    right = manifest.is_file() and manifest.read_bytes() == canonical(facts, version)
    if not right:
        manifest.unlink(missing_ok=True)
    write_file(cache / INDEX, data)
    if not right:
        write_canonical(manifest, facts, version)


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
def plan_in_use(plan: Plan) -> Iterator[None]:
    """Keep other processes from replacing a plan during a capture. UsageError if one has already, RoomError."""
    with write_errors(plan.path, "a scratch folder"), commit_lock(plan.path):
        if read_manifests(plan.path)[: len(plan.manifests)] != plan.manifests:
            raise UsageError(f"{plan.path} was planned afresh meanwhile; run the command again, it uses that plan")
        scratch = Scratch(plan.path, "working")
    with scratch:
        yield


def micro_batches(lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> list[range]:
    """Cut a shard's samples, in their order, into batches of at most `batch_tokens` padded tokens (at least a sample).

    Of all cuts the cheapest, padding and forwards counted in tokens. A pure function of the lengths, so that a capture
    computes the same batches whoever runs it and however often it was stopped.
    """
    lengths = [int(length) for length in lengths]
    least, begins = [0], [0]  # for the samples before each end: what they cost, where their last batch begins
    for end in range(1, len(lengths) + 1):
        longest = tokens = 0
        found = None
        for first in range(end - 1, -1, -1):
            longest, tokens = max(longest, lengths[first]), tokens + lengths[first]
            padded = longest * (end - first)
            cost = padded - tokens + FORWARD_TOKENS
            if found and (padded > batch_tokens or cost > found[0]):  # and every longer batch costs more still
                break
            found = min(found or (least[first] + cost, first), (least[first] + cost, first))
        least.append(found[0])
        begins.append(found[1])
    batches, end = [], len(lengths)
    while end:
        batches.append(range(begins[end], end))
        end = begins[end]
    return batches[::-1]
