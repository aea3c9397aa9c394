"""A capture by a real vLLM beside our own, and killed again and again.

    python tests/kill_vllm.py --python V/bin/python --kills 12 [--chats 900]

First: 64 samples of the bundled target in float32 by both engines; every column of every sample has to be within BOUND
of ours, relative. Then a longer capture is begun again and again and killed, each time another of: our process, the
engine's, both (SIGKILL), and our process by Ctrl-C; some while the engine starts, most while it computes. The same
command finishes it, and the cache has to be whole and equal, byte for byte, to one that was left alone. No process and
no file on its way may be left.
"""

# ruff: noqa: E402  the path first
import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from kill_capture import contents

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import try_lock
from pipeline.cache.verify import verify
from stages.cache_hidden.states_folder import LABEL, SHARED_MEMORY

BOUND = 1e-6
TARGET = ROOT / "data/tiny-qwen3"
KINDS = ("ours", "engine's", "both", "Ctrl-C")
MOST_S = 900


def command(out: Path, chats: int, *more: str) -> list[str]:
    given = ["--model", str(TARGET), "--max-samples", str(chats), "--device", "cpu", "--out", str(out)]
    return [sys.executable, "-m", "pipeline", "cache-hidden", *given, *more]


def finish(asked: list[str]) -> tuple[float, float]:
    """Run a command to its end; return its seconds and those of processors."""
    before, began = os.times(), time.monotonic()
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=MOST_S)
    assert done.returncode == 0, done.stderr
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - began, used


def largest_error(found: Path, wanted: Path) -> tuple[float, int]:
    """Return the largest relative error of a column of a sample, and how many samples there are."""
    found, wanted, worst = HiddenCache.open(found), HiddenCache.open(wanted), 0.0
    assert len(found) == len(wanted)
    for index in range(len(wanted)):
        ours, theirs = (cache.read(index, final=True) for cache in (wanted, found))
        assert ours.ids.equal(theirs.ids)
        pairs = [*zip(ours.aux, theirs.aux, strict=True), (ours.final, theirs.final)]
        for a, b in ((a.double(), b.double()) for a, b in pairs):
            worst = max(worst, float((a - b).norm() / a.norm()))
    return worst, len(wanted)


def engine_of(process: subprocess.Popen) -> list[int]:
    """Return the processes that a capture has started: the engine, and its workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(state[1]) == process.pid and state[0] != "Z" and int(state[2]) == int(path.parent.name):  # leads a group
            found.append(int(path.parent.name))
    return found


def gone(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.is_file() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def kill_once(asked: list[str], out: Path, kind: str, rng: random.Random, seconds: float) -> bool:
    """Start a capture and end it at a random moment; return whether it was ended, and not done before."""
    process = subprocess.Popen(asked, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    shards, until = len([*out.glob("shards/*/*.json")]), time.monotonic() + MOST_S
    while not (engines := engine_of(process)) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    if rng.random() < 0.75:  # while it computes
        while len([*out.glob("shards/*/*.json")]) == shards and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, seconds / 8))
    else:
        time.sleep(rng.uniform(0, 10))
    if process.poll() is not None:
        process.communicate()
        return False
    if kind == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    for pid in [
        *([process.pid] if kind in ("ours", "both") else []),
        *(engines if kind in ("engine's", "both") else []),
    ]:
        with contextlib.suppress(ProcessLookupError):  # the engine ends with the process that started it
            os.kill(pid, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    wanted = {"ours": -signal.SIGKILL, "both": -signal.SIGKILL, "engine's": 5, "Ctrl-C": 130}[kind]
    assert process.returncode == wanted, f"{kind}: ended with {process.returncode}: {said}"
    assert kind != "engine's" or "the engine ran out of memory" in said, said
    for _ in range(100):
        if all(map(gone, engines)):
            return True
        time.sleep(0.1)
    raise AssertionError(f"{kind}: the engine is left: {engines}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", required=True)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--chats", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine-option", action="append", default=[])
    chosen = parser.parse_args()
    told = [word for pair in chosen.engine_option for word in ("--engine-option", pair)]
    by_vllm = ["--engine", "vllm", "--python", str(Path(chosen.python).absolute()), *told]
    rng, killed, caches = random.Random(chosen.seed), dict.fromkeys(KINDS, 0), 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        finish(command(folder / "own", 64))
        finish(command(folder / "vllm", 64, *by_vllm))
        error, samples = largest_error(folder / "vllm", folder / "own")
        print(f"{samples} samples: within {error:.2e} of our own engine's states, relative", flush=True)
        assert error < BOUND and samples == 64
        own, own_cpu = finish(command(folder / "own-whole", chosen.chats))
        whole, whole_cpu = finish(command(folder / "whole", chosen.chats, *by_vllm))
        print(f"{chosen.chats} chats: {own:.0f} s, {own_cpu:.0f} of CPU; by vLLM {whole:.0f} s, {whole_cpu:.0f} of CPU")
        wanted = contents(folder / "whole")
        while sum(killed.values()) < chosen.kills:
            out = folder / f"killed-{caches}"
            asked = command(out, chosen.chats, *by_vllm)
            while sum(killed.values()) < chosen.kills:
                kind = KINDS[sum(killed.values()) % len(KINDS)]
                if not kill_once(asked, out, kind, rng, whole):
                    break
                killed[kind] += 1
                print(f"killed {kind}: {len([*out.glob('shards/*/final.json')])} shards so far", flush=True)
            finish(asked)
            assert not verify(out).damaged
            found = contents(out)
            assert found.keys() == wanted.keys(), f"files differ: {sorted(found.keys() ^ wanted.keys())}"
            assert not [name for name in wanted if found[name] != wanted[name]]
            left = [path for path in SHARED_MEMORY.glob(f"tmp-{LABEL}-*") if try_lock(path / "lock") is not None]
            assert not left, "files on their way are left"  # those of a capture beside this one are locked
            shutil.rmtree(out)
            caches += 1
    told = ", ".join(f"{count} {kind}" for kind, count in killed.items())
    print(f"{sum(killed.values())} kills ({told}), {caches} caches finished, all byte-identical to the one left alone")


if __name__ == "__main__":
    main()
