"""The plan: the shard and row of every sample, fixed before the target runs and never changed.

Since it has all lengths, all sizes are known before the target runs, workers need no coordination, and a stopped
capture can resume. Shards are contiguous ranges of the corpus; in a shard the longest samples come first, so that
micro-batches of consecutive samples have little padding and write their rows in order. Which samples are computed
together is part of what a cache is, too (`batch_tokens`).
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np

from pipeline.cache.atomic import Scratch, clean_scratch, commit_lock, write_errors
from pipeline.cache.layout import NUMBER, PLAN, SCRATCH, SHARDS, numbered
from pipeline.cache.manifest import check_file, read_record
from pipeline.cache.records import SegmentManifest
from pipeline.cache.samples import SCHEMA, ShardPlan, checked_batch, read_batches
from pipeline.errors import CacheError, UsageError

FORWARD_TOKENS = 128  # what a forward costs besides its tokens: about what an H100 computes while it reads the weights


@dataclass(frozen=True)
class Plan:
    """The plan of the cache at `path`: the manifests of its segments, in order, and the shards of all of them."""

    path: Path
    manifests: list[SegmentManifest]

    @cached_property
    def shards(self) -> list[ShardPlan]:
        """The planned shards, mapped when first needed. CacheError when they are not those the manifests count."""
        found = []
        for number, manifest in enumerate(self.manifests):
            found += _shards_of(self.path / PLAN / f"{numbered(number)}.arrow", manifest)
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


def _shards_of(path: Path, manifest: SegmentManifest) -> list[ShardPlan]:
    """Map the shards of one segment. CacheError when they are not those its manifest counts."""
    batches = read_batches(path, SCHEMA)
    shards = [
        ShardPlan(checked_batch(batch, path), number) for number, batch in enumerate(batches, manifest.first_shard)
    ]
    counts = len(shards), sum(map(len, shards)), sum(shard.rows for shard in shards)
    if not shards or counts != (manifest.shards, manifest.samples, manifest.tokens):
        raise CacheError(f"{path}: not the shards its manifest counts; run `pipeline verify`")
    return shards


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
