"""Kill `pipeline regenerate` (SIGKILL) at random moments while its server fails, and look at what was asked.

    python tests/kill_regenerate.py --kills 200 --faults 1000

Each round has a new corpus and repeats the one command until it gets through. A server answers about
every other request; the others it refuses, cuts or garbles. In the end every prompt has one reply, the
right one, in the order of the corpus; and no prompt was asked again whose reply the journal had at the kill before.
"""

# ruff: noqa: E402  the environment first
import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import openai  # noqa: F401  everything is imported before the first fork
from chat_server import FAULTS, ChatServer, reply_to
from tiny import write_jsonl

from stages.regenerate.prompts import Options
from stages.regenerate.run import run

os.fsync = lambda fd: None  # for power cuts; what a killed process wrote the system still has
PROMPTS = 60
MIXED = [fault for fault in FAULTS if fault != "slow"]


def corpus_of(folder: Path, rng: random.Random) -> Path:
    """Write rows of one to three turns, no two alike."""
    rows = []
    for at in range(PROMPTS):
        turns = [{"role": "user", "content": f"{at} {rng.random()}"} for _ in range(rng.choice([1, 1, 2, 3]))]
        rows.append({"messages": [one for turn in turns for one in (turn, {"role": "assistant", "content": "old"})]})
    return write_jsonl(folder / "prompts.jsonl", rows)


def expected(corpus: Path) -> list[list[str]]:
    """Return the server's replies to every row, turn by turn."""
    found = []
    for line in corpus.read_text().splitlines():
        messages, replies = [], []
        for message in json.loads(line)["messages"]:
            if message["role"] == "user":
                messages.append(message)
                replies.append(reply_to(messages))
                messages.append({"role": "assistant", "content": replies[-1]})
        found.append(replies)
    return found


def forked(options: Options) -> int:
    """Start the command in a process of its own and return its id."""
    if child := os.fork():
        return child
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            run(options)
        except BaseException as error:
            options.out.with_name("why.txt").write_text(repr(error))
            os._exit(99)
    os._exit(0)


def ended(child: int, within: float) -> bool:
    """Wait for the command; return whether it ended well in time."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"regenerate ended with status {status}"
            return True
        time.sleep(0.001)
    return False


def written(out: Path) -> set[str]:
    """Return the replies that the journal holds whole."""
    path = out.with_name("chats.journal")
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    entries = [json.loads(line.rpartition(b"\t")[0]) for line in lines]
    return {entry["reply"]["content"] for entry in entries if "reply" in entry}


def kill_regenerations(kills: int, faults: int, seed: int, folder: Path) -> tuple[int, int, int, int]:
    """Kill that often, with that many faults at least; return kills, faults, prompts asked and rounds."""
    rng = random.Random(seed)
    killed = failed = prompts = rounds = 0
    while killed < kills or failed < faults:
        place = folder / f"round-{rounds}"
        place.mkdir()
        corpus = corpus_of(place, rng)
        with ChatServer([rng.choice(MIXED) if rng.random() < 0.5 else None for _ in range(997)]) as server:
            options = Options(
                str(corpus), place / "chats.jsonl", server.url, concurrency=6, backoff_s=0.001, retries=50
            )
            kept, through, asked_before = set(), False, 0
            while not through:
                child = forked(options)
                through = ended(child, rng.uniform(0.0, 0.5) if killed < kills else 120)
                if not through:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    killed += 1
                    time.sleep(0.02)  # requests on their way arrive
                with server.lock:
                    now = [reply_to(request["messages"]) for request in server.requests[asked_before:]]
                    asked_before = len(server.requests)
                assert not kept & set(now), "asked again, though the journal had the reply"
                kept = written(options.out)
            with server.lock:
                failed += server.faulted.total() - server.faulted[None]
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
        replies = [[one["content"] for one in row["messages"] if one["role"] == "assistant"] for row in rows]
        assert replies == expected(corpus), "a reply is missing, doubled or another's"
        prompts += sum(map(len, replies))
        rounds += 1
    return killed, failed, prompts, rounds


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        counts = kill_regenerations(chosen.kills, chosen.faults, chosen.seed, Path(place))
    print("{} kills and {} faults of the server: {} prompts in {} rounds, each answered once".format(*counts))
