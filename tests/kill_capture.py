"""Kill `pipeline cache-hidden` (SIGKILL) at random moments, again and again, and compare what it ends up with.

    python tests/kill_capture.py --kills 50 [--workers 3] [--codec int8]

Each round starts a new cache and repeats the one command until it gets through; the finished cache must then equal,
byte for byte, one made without interruption (the record `capture.log` aside). With several workers a round starts them
all at once, each to be killed at a moment of its own; the last two have the same share. Processes are forked from one
that has imported everything, so that the moments fall into the work and not into imports.
"""

# ruff: noqa: E402  the environment first
import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from tiny import conversations, save_target, write_jsonl

from pipeline.cli import main

os.fsync = lambda fd: None  # for power cuts; what a killed process wrote the system still has


def forked(work) -> int:
    """Start `work` in a process of its own and return its id."""
    if child := os.fork():
        return child
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            work()
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 0)
        except BaseException:
            os._exit(99)
    os._exit(0)


def ended(child: int, within: float) -> bool:
    """Wait for a process; return whether it ended well in time. An error of its own stops everything."""
    until = time.monotonic() + within
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"cache-hidden ended with status {status}"
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.001)


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but the record."""
    files = (path for path in cache.rglob("*") if path.is_file() and path.name != "capture.log")
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in files}


def end_or_kill(children: list[int], within: float, rng: random.Random) -> int:
    """Kill what has not ended at its random moment; return how many were killed."""
    killed, since = 0, time.monotonic()
    for moment, child in sorted((rng.uniform(0, within), child) for child in children):
        if not ended(child, since + moment - time.monotonic()):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += 1
    return killed


def kill_captures(kills: int, seed: int, folder: Path, workers: int, codec: str) -> int:
    """Kill that many times; return how many caches were finished and compared."""
    rng = random.Random(seed)
    assert ended(forked(lambda: save_target(folder / "target")), 60)
    corpus = write_jsonl(folder / "chats.jsonl", conversations(48))

    def command(out: Path, *named: str):
        common = ["--model", str(folder / "target"), "--corpus", str(corpus), "--max-length", "256", *named]
        kept = ["--layers", "1,3", "--codec", codec]
        return lambda: main(["cache-hidden", *common, *kept, "--device", "cpu", "--out", str(out)])

    started = time.monotonic()
    assert ended(forked(command(folder / "whole")), 120)
    seconds, whole = time.monotonic() - started, contents(folder / "whole")
    killed = rounds = 0
    while killed < kills or rounds == 0:
        out = folder / f"killed-{rounds}"
        while killed < kills:
            shares = [f"{min(number, max(workers - 2, 0))}/{max(workers - 1, 1)}" for number in range(workers)]
            children = [forked(command(out, "--worker", share)) for share in shares]
            before, killed = killed, killed + end_or_kill(children, 0.7 * seconds, rng)
            if killed == before:
                break
        assert ended(forked(command(out)), 120)
        found = contents(out)
        assert found.keys() == whole.keys(), f"files differ: {sorted(found.keys() ^ whole.keys())}"
        changed = [name for name in whole if found[name] != whole[name]]
        assert not changed, f"bytes differ: {changed}"
        rounds += 1
    return rounds


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--codec", default="raw")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        caches = kill_captures(chosen.kills, chosen.seed, Path(place), chosen.workers, chosen.codec)
    print(f"{chosen.kills} kills, {caches} caches finished, all byte-identical to the uninterrupted one")
