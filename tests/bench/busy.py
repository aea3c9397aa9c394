"""What waiting threads cost: `python tests/bench/busy.py [--chats 300] [--rounds 3]`, in minutes, by hand.

The bundled target captures the same chats with one thread, and with two whose waiting spins as the runtime would have
it, not at all as `pipeline` sets it, or briefly; each on a quiet machine and beside one process that is always busy on
the same two cores. What is compared runs in turns, so that whatever else the machine does falls on all of them; printed
are median seconds of the whole command, and their ratio to one thread's of the same round.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "data/tiny-qwen3"
ONE = "one thread"
WAYS = {  # what the environment has
    ONE: {"OMP_NUM_THREADS": "1"},
    "spinning": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},  # GNU's and Intel's defaults
    "ours": {},
    "1000 turns": {"GOMP_SPINCOUNT": "1000"},
}
OTHERS = {f"{turns} turns": {"GOMP_SPINCOUNT": str(turns)} for turns in (100, 300)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chats", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--more", action="store_true", help="other counts of turns, too")
    asked = parser.parse_args()
    cores = set(sorted(os.sched_getaffinity(0))[:2])
    os.sched_setaffinity(0, cores)
    ways = WAYS | (OTHERS if asked.more else {})
    for neighbour in ("quiet", "busy"):
        taken = {way: [] for way in ways}
        for _ in range(asked.rounds):
            with busy() if neighbour == "busy" else contextlib.nullcontext():
                for way, environment in ways.items():
                    taken[way].append(seconds(environment, asked.chats))
        for way, found in taken.items():
            ratios = [mine / one for mine, one in zip(found, taken[ONE], strict=True)]
            print(f"{neighbour}, {way}: {statistics.median(found):.1f} s, {statistics.median(ratios):.2f} of {ONE}'s")


def seconds(environment: dict[str, str], chats: int) -> float:
    """Capture, and return how long the command took."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pipeline", "cache-hidden", "--model", str(TARGET), "--out", f"{folder}/cache"]
        began = time.perf_counter()
        subprocess.run(
            [*command, "--max-samples", str(chats), "--device", "cpu"],
            cwd=ROOT, env=inherited | environment, check=True, capture_output=True,
        )  # fmt: skip
        return time.perf_counter() - began


@contextlib.contextmanager
def busy():
    """Keep a process running that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
