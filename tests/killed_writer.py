"""Runs a job on a cache in children that kill themselves at their n-th step on disk, n = 1, 2, ... until one is not
killed. A step is a sync, a rename, a write and the like.

Usage: killed_writer.py make|append|repair CACHE STRIDE; CACHE.<n> is what the n-th child left.
A script of its own, because a fork wants a process without threads.
"""

import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

from cache_maker import COLUMNS, capture, flip, make_cache, random_samples

from pipeline.cache.columns import column_manifest
from pipeline.cache.derived import derive, restore_segments
from pipeline.cache.disk import clean
from pipeline.cache.layout import SAMPLES, shard_folder
from pipeline.cache.plan import load_plan, plan_numbers, write_segment


def make(cache: Path) -> None:
    """A cache of two samples."""
    make_cache(cache, random_samples(2, longest=8), COLUMNS[1:])


def append(cache: Path) -> None:
    """Two samples more, of which one is new, on a cache that `make` made."""
    clean(cache)
    if len(plan_numbers(cache)) == 1:
        more = [*random_samples(1, longest=8), *random_samples(1, longest=8, seed=1)]
        write_segment(cache, more, row_bytes=48, sources=[{"file": "more.jsonl", "size": 1}])
    for shard in load_plan(cache).shards:
        capture(cache, shard, COLUMNS[1:])
    derive(cache)


def spoil(cache: Path) -> None:
    """Damage a cache that `make` made: values, samples, a segment of the plan."""
    folder = shard_folder(cache, 0)
    flip(folder / "aux.10" / "c/0/0", 5)
    (folder / SAMPLES).unlink()
    flip(shard_folder(cache, 1) / SAMPLES, 1000)


def repair(cache: Path) -> None:
    """What `pipeline verify --repair` does after it found what `spoil` did, random states in the target's place."""
    clean(cache)
    restore_segments(cache)
    derive(cache)
    shard = load_plan(cache).shards[0]
    known = (shard_folder(cache, 0) / "aux.10.json").exists()
    capture(cache, shard, COLUMNS[1:2], lost={"aux.10": column_manifest(cache, 0, "aux.10") if known else None})
    derive(cache)


JOBS = {"make": make, "append": append, "repair": repair}


def prepared(job: str, cache: Path) -> None:
    """What a job starts from."""
    if job != "make":
        make(cache)
    if job == "repair":
        spoil(cache)


def die_at(step: int) -> None:
    """From now on, count the calls that change the disk, and end this process without a word before the n-th."""
    steps = count(1)

    def dying(call):
        def before(*arguments, **named):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return before

    os.fsync = lambda fd: None  # counted below; a killed process loses no page that it wrote
    for name in ("fsync", "rename", "replace", "write", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))


def main(job: str, cache: str, stride: int) -> None:
    start = Path(f"{cache}-start")
    prepared(job, start)
    for step in range(1, 1_000_000, stride):
        place = Path(f"{cache}.{step}")
        if start.exists():
            shutil.copytree(start, place)
        child = os.fork()
        if not child:
            die_at(step)
            JOBS[job](place)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
