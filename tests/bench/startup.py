"""How long a command takes to start: the help, and `inspect` of a cache of 1,000 tiny shards.

    python tests/bench/startup.py [--shards 1000] [--runs 7]

Prints the median of wall and processor seconds; the runs of both commands and of an empty Python follow one another in
turn, so that all meet the same machine.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import numpy as np  # noqa: E402
from cache_maker import make_cache  # noqa: E402

from pipeline.cache import plan_writer  # noqa: E402
from pipeline.cache.columns import ColumnSpec  # noqa: E402
from pipeline.cache.samples import PlannedSample  # noqa: E402

COLUMNS = [ColumnSpec("aux.1", "bfloat16", 8), ColumnSpec("final", "bfloat16", 8, keeps="needed")]


def many_shards(folder: Path, shards: int) -> Path:
    """Make a cache with a shard for each sample."""
    plan_writer.MIN_SHARDS = shards
    mask = np.array([False, True, True])
    samples = [
        PlannedSample(np.array([at % 900, at // 900, 7], np.int32), mask, "a", "train", "chats.jsonl", at + 1)
        for at in range(shards)
    ]
    os.fsync = lambda fd: None  # of 1,000 shards
    return make_cache(folder, samples, COLUMNS)


def seconds(words: list[str]) -> tuple[float, float]:
    """Return wall and processor seconds of a command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=7)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = many_shards(Path(folder) / "cache", chosen.shards)
        pipeline = [sys.executable, "-m", "pipeline"]
        commands = {
            "an empty Python": [sys.executable, "-c", ""],
            "--help": [*pipeline, "--help"],
            f"inspect, {len([*(cache / 'shards').iterdir()]):,} shards": [*pipeline, "inspect", str(cache)],
        }
        taken = {name: [] for name in commands}
        for _ in range(chosen.runs):
            for name, words in commands.items():
                taken[name].append(seconds(words))
    for name, pairs in taken.items():
        wall, processor = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"{name:24} {wall:.2f} s, of a processor {processor:.2f} s")


if __name__ == "__main__":
    main()
