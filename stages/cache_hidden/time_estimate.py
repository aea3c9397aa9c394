"""An estimate of how long a capture will take, from a short measurement of the disk and of the target.

Computing and writing overlap, so a capture takes the larger of the two times; encoding, which overlaps too, is not
measured. Qwen3-8B at full speed on a large GPU writes more than 1 GB/s in bfloat16, so the disk is often the limit.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.atomic import Scratch, write_all, write_errors
from pipeline.cache.plan import micro_batches
from pipeline.cache.samples import ShardPlan
from stages.cache_hidden.plan_report import Work, work_bytes
from stages.cache_hidden.settings import CaptureSettings

DISK_BYTES = 256 << 20  # written, synced and removed
BLOCK_BYTES = 8 << 20
MICRO_BATCHES = 4  # timed, after one that is not
AT_LEAST_S = 1e-9


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


def measure_speed(out: Path, work: Work, settings: CaptureSettings, device: str) -> Speed:
    """Measure disk and target on some of the work. Raises RoomError, and what loading a target raises."""
    return Speed(disk_speed(out), target_speed(work, settings, device))


def disk_speed(out: Path, size: int = DISK_BYTES) -> float:
    """Write `size` bytes into the cache's folder, sync and remove them; return bytes a second. Raises RoomError."""
    block = os.urandom(min(size, BLOCK_BYTES))  # incompressible
    with Scratch(out, "speed") as scratch, write_errors(out, "a probe of the disk", size):
        began = time.perf_counter()
        fd = os.open(scratch.path / "written", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            for _ in range(max(1, size // len(block))):
                write_all(fd, block)
            os.fsync(fd)
        finally:
            os.close(fd)
        seconds = time.perf_counter() - began
    return max(1, size // len(block)) * len(block) / max(seconds, AT_LEAST_S)


def target_speed(work: Work, settings: CaptureSettings, device: str) -> float:
    """Run a few evenly spaced micro-batches through the engine; return tokens a second, padding not counted."""
    from pipeline.target.model import head_of, load_target
    from pipeline.target.on_policy import SHARE
    from stages.cache_hidden.engine import make_engine
    from stages.cache_hidden.pack import Packer

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
