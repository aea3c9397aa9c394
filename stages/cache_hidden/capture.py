"""Capture of shards: the target computes, a thread writes, the probe compares, and only then is a shard committed.

Shards are independent and their bytes depend on nothing but the plan, so a stopped capture continues with the next
missing shard, and every worker computes the same bytes.
Also how long a capture will take: the larger of computing and writing, which overlap, by a short measurement of target
and disk. Encoding is not measured. Qwen3-8B on a large GPU writes over 1 GB/s in bfloat16: the disk is often the limit.
"""

import contextlib
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pipeline.cache.atomic import process_lock, write_errors
from pipeline.cache.catalog import Catalog, Work, target_file
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.disk_speed import AT_LEAST_S
from pipeline.cache.layout import HEAD
from pipeline.cache.plan_writer import micro_batches
from pipeline.cache.samples import ShardPlan
from pipeline.cache.writer import ShardWriter
from pipeline.errors import DataError
from pipeline.target.head import TargetHead
from pipeline.target.loading import load_target
from pipeline.target.model import head_of, stop_tokens, store_target
from pipeline.target.on_policy import SHARE, OnPolicyStats, on_policy_column, on_policy_share, sum_scores
from pipeline.target.probe import ReferenceTarget, probe
from pipeline.target.several_devices import input_device
from stages.cache_hidden.device_memory import QUEUED
from stages.cache_hidden.engine import make_engine
from stages.cache_hidden.pack import ExactRows, PackedStates, Packer, certify, load_or_make_calibrations
from stages.cache_hidden.plan_report import Lost, work_bytes
from stages.cache_hidden.settings import CaptureSettings

if TYPE_CHECKING:
    from stages.cache_hidden.tensor_parallel import Group

SHOWN_EVERY_S = 5.0  # where stderr is no terminal
REFUSED_SHARE = 0.01  # of a plan's samples; more means that something is wrong with the target or its dtype
MICRO_BATCHES = 4  # timed, after one that is not


def capture_shards(
    catalog: Catalog,
    settings: CaptureSettings,
    work: Work,
    device: str,
    refused: int,
    lost: Lost = MappingProxyType({}),
    device_map: str | dict | None = None,
    group: "Group | None" = None,
) -> None:
    """Run the target over every shard in `work` and commit each that passes its probe.

    refused: how many samples earlier runs refused. device_map, group: spread the target, see
    `pipeline/target/several_devices.py`; of a group this is the leader. lost: damaged (shard, column)s
    to capture again, each with its former manifest if known, which is written again where the same bytes come out.
    Raises ProofError, DataError (too many refused), RoomError, UsageError.
    """
    out, plan = catalog.path, catalog.plan
    if group is None:
        target = load_target(str(settings.folder), device=device, dtype=settings.dtype, device_map=device_map)
        head = head_of(target)
    else:
        target, head = group.load(settings)
    store_target(catalog, settings.folder, head, target.config, stop_tokens(target))
    head = stored_head(catalog, head).to(input_device(target))
    reference = ReferenceTarget(target)
    with_stats = on_policy_columns(catalog, settings.columns)
    with contextlib.closing(make_engine(settings, target)) as engine:
        with write_errors(out, "a calibration"), process_lock(out, "calibration"):  # by one process, for all
            calibrations = load_or_make_calibrations(engine, catalog, settings.columns, settings.batch_tokens)
        with Progress(sum(shard.rows for shard, _ in work), len(work)) as progress:
            for shard, wanted in work:
                catalog.refresh(shard.number)  # another worker may have captured it since the work was listed
                key = shard.number
                columns = [spec for spec in wanted if (key, spec.name) in lost or not catalog.captured(key, spec.name)]
                if not columns:
                    progress.add_shard()
                    continue
                share = on_policy_share(plan.segment(shard.number).supervised)
                packer = Packer(engine, shard, columns, head, share, calibrations)
                with ShardWriter(catalog, shard, columns) as writer:
                    earlier = repeat_refusals(writer, settings.columns)
                    exact_rows, on_policy = write_states(packer, writer, settings.batch_tokens, progress)
                    refused += len(writer.refused) - earlier
                    check_refused(refused, plan.samples, writer.refused)
                    writer.seal()
                    facts = probe_and_certify(packer, writer, reference, exact_rows)
                    for name in with_stats & facts.keys():
                        facts[name]["gauge"] = on_policy.as_facts()
                    previous = {name: lost[shard.number, name] for name in facts if (shard.number, name) in lost}
                    writer.commit(facts, previous)
                progress.add_shard()


def stored_head(catalog: Catalog, own: TargetHead) -> TargetHead:
    """Return the cache's head; as `own`, the target's, where the two are equal, so that it is in memory once."""
    stored = TargetHead.load(target_file(catalog, HEAD), dtype=own.head_VD.dtype)
    return own if own.equals(stored) else stored.to(own.head_VD.device)


def on_policy_columns(catalog: Catalog, columns: Sequence[ColumnSpec]) -> set[str]:
    """Return the columns whose manifests hold the on-policy figures: as the cache has it, else the default one."""
    for shard in range(catalog.shards):
        manifests = [manifest for spec in columns if (manifest := catalog.captured(shard, spec.name))]
        found = {manifest.spec.name for manifest in manifests if manifest.facts.gauge}
        if found:
            return found
    return {on_policy_column(columns)}


def repeat_refusals(writer: ShardWriter, columns: Sequence[ColumnSpec]) -> int:
    """Refuse the samples that this shard's committed columns refuse, with their reasons; return how many.

    So a shard whose commit was interrupted ends up as if it had not been.
    """
    for spec in columns:
        manifest = writer.catalog.captured(writer.shard.number, spec.name)
        for row, reason in (manifest.refused if manifest else {}).items():
            writer.refuse(int(row), reason)
    return len(writer.refused)


def write_states(
    packer: Packer, writer: ShardWriter, batch_tokens: int, progress: "Progress"
) -> tuple[ExactRows, OnPolicyStats]:
    """Write every row of a shard's columns; return the rows that certify them, and the shard's on-policy figures.

    At most a few micro-batches are in memory.
    """
    exact_rows: ExactRows = defaultdict(dict)
    on_policy = OnPolicyStats()

    def write_packed(packed: PackedStates) -> None:
        nonlocal on_policy
        packed.wait()
        for sample, reason in packed.unusable():
            if sample not in writer.refused:
                writer.refuse(sample, reason)
        written = 0
        for spec in packer.columns:
            rows = packer.as_written(packed, spec)
            writer.write(spec.name, rows)
            written += rows.nbytes
        for name, rows_by_sample in packed.exact_rows().items():
            exact_rows[name] |= rows_by_sample
        on_policy += sum_scores(packed.on_policy)
        progress.add(int(packer.shard.lengths[packed.samples].sum()), written)

    with BackgroundWriter(write_packed, QUEUED) as background:
        for samples in micro_batches(packer.shard.lengths, batch_tokens):
            for packed in packer.pack(samples):
                background.put(packed)
    return exact_rows, on_policy


def probe_and_certify(
    packer: Packer, writer: ShardWriter, reference: ReferenceTarget, exact_rows: ExactRows
) -> dict[str, dict]:
    """Probe a sealed shard; return the facts for each column's manifest. Raises ProofError."""
    certified = certify(packer, writer, exact_rows)
    probed = probe(reference, packer.head, writer.shard, packer.columns, {*writer.refused}, writer.read)
    made_by = {**packer.engine.facts, "split": packer.split}
    return {name: {**made_by, "probe": found, **certified.get(name, {})} for name, found in probed.items()}


def check_refused(refused: int, samples: int, newest: dict[int, str]) -> None:
    """Raise DataError when more samples are refused than REFUSED_SHARE. newest: the last shard's, with reasons."""
    if refused > max(1, REFUSED_SHARE * samples):
        reason = next(iter(newest.values()), "see `pipeline inspect`")
        raise DataError(
            f"{refused} of {samples} samples gave states that cannot be kept ({reason}); "
            "the target's weights are damaged, or its type is too narrow: try --dtype bfloat16 or float32"
        )


class BackgroundWriter:
    """Calls `write` with every item put, in order, in a thread of its own, while the caller computes the next one.

    A context manager. An exception in `write` is raised by the next `put`, or on leaving, and nothing is written after
    it. Where the caller raises, what waits is dropped.
    """

    def __init__(self, write: Callable[[Any], None], depth: int):
        """depth: how many items may wait beside the one that is written; `put` blocks beyond that."""
        self._write, self._depth, self._failed = write, depth, False
        self._pool = ThreadPoolExecutor(1, "background-writer")
        self._unfinished: deque[Future] = deque()

    def put(self, item: Any) -> None:
        self._unfinished.append(self._pool.submit(self._run, item))
        while self._unfinished and (self._unfinished[0].done() or len(self._unfinished) > self._depth + 1):
            self._unfinished.popleft().result()

    def _run(self, item: Any) -> None:
        if self._failed:
            return
        try:
            self._write(item)
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            while self._unfinished and kind is None:
                self._unfinished.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)


class Progress:
    """Counts tokens and bytes, from any thread, and shows them on stderr while it is open.

    On a terminal as a line that is kept up to date, else as a new line every few seconds.
    """

    def __init__(self, tokens: int, shards: int):
        self.tokens, self.shards = tokens, shards
        self.done_tokens = self.done_bytes = self.done_shards = 0
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._shown = self._start
        self._live = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), get_renderable=self.line, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, tokens: int, written: int) -> None:
        with self._lock:
            self.done_tokens += tokens
            self.done_bytes += written
            now = time.monotonic()
            if self._live is None and now - self._shown >= SHOWN_EVERY_S:
                self._shown = now
                print(self.line(), file=sys.stderr, flush=True)

    def add_shard(self) -> None:
        self.done_shards += 1

    def line(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = self.done_tokens / seconds
        left = int((self.tokens - self.done_tokens) / rate) if rate else None
        eta = "unknown" if left is None else f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return (
            f"shard {self.done_shards}/{self.shards} · {self.done_tokens:,} of {self.tokens:,} tokens · "
            f"{rate:,.0f} tokens/s · {self.done_bytes / seconds / 1e6:,.1f} MB/s written · "
            f"ETA {eta}"
        )


@dataclass(frozen=True)
class Speed:
    """One worker's rates: bytes written a second, tokens through the target a second."""

    written: float
    tokens: float

    def as_dict(self, work: Work) -> dict:
        """Return the `time` entry of the plan's report: the rates, and the seconds that the work takes."""
        compute = sum(shard.rows for shard, _ in work) / self.tokens
        write = work_bytes(work) / self.written
        return {
            "disk_bytes_s": self.written,
            "tokens_s": self.tokens,
            "compute_s": compute,
            "write_s": write,
            "seconds": max(compute, write),
        }


def target_speed(work: Work, settings: CaptureSettings, device: str) -> float:
    """Run a few evenly spaced micro-batches through the engine; return tokens a second, padding not counted."""
    target = load_target(str(settings.folder), device=device, dtype=settings.dtype)
    head = head_of(target)
    chosen = evenly_spaced_batches([shard for shard, _ in work], settings.batch_tokens, MICRO_BATCHES)
    columns = max((columns for _, columns in work), key=len)
    tokens, began = 0, time.perf_counter()
    with contextlib.closing(make_engine(settings, target)) as engine:
        for number, (shard, samples) in enumerate([chosen[0], *chosen]):
            for packed in Packer(engine, shard, columns, head, SHARE).pack(samples):
                packed.wait()
            if number:
                tokens += int(shard.lengths[samples].sum())
            else:
                began = time.perf_counter()  # the first forward allocates and compiles
    return tokens / max(time.perf_counter() - began, AT_LEAST_S)


def evenly_spaced_batches(shards: Sequence[ShardPlan], batch_tokens: int, count: int) -> list[tuple[ShardPlan, range]]:
    """Return up to `count` micro-batches as (shard, its samples), from evenly spaced shards.

    Each comes from another part of its shard, since a shard's samples are ordered longest first.
    """
    chosen = []
    for number in range(min(count, len(shards))):
        shard = shards[number * len(shards) // min(count, len(shards))]
        batches = micro_batches(shard.lengths, batch_tokens)
        chosen.append((shard, batches[(2 * number + 1) * len(batches) // (2 * min(count, len(shards)))]))
    return chosen
