"""What planning costs, by hand: its CPU against a bare loop over the chat template, and two cores against one.

    python -m tests.bench.plan [--model data/tiny-qwen3] [--rows 20000] [--rounds 3]

The corpus is made of the bundled chats, TURNS of them a row. The bare loop reads each line and calls the tokenizer's
`apply_chat_template` on its messages, and nothing else. CPU is user and system time of a process and all its children,
start and imports included. On a busy machine only the CPU is worth reading; the plan's bytes are compared every time.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TURNS = 4
BARE = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for line in open(sys.argv[2]):
    tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "data" / "tiny-qwen3"))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        corpus = make_corpus(Path(place) / "corpus.jsonl", told.rows)
        bare = [sys.executable, "-c", BARE, told.model, str(corpus)]
        found: dict[str, list[tuple[float, float]]] = {"bare": [], "one": [], "two": []}
        plans = set()
        for number in range(told.rounds):
            found["bare"].append(timed(bare, 1))
            for name, cores in (("one", 1), ("two", 2)):
                out = Path(place) / f"{name}{number}"
                plan = [sys.executable, "-m", "pipeline", "plan", "--model", told.model, "--corpus", str(corpus)]
                found[name].append(timed([*plan, "--out", str(out), "--device", "cpu", "--layers", "1"], cores))
                plans.add((out / "plan" / "000000.arrow").read_bytes())
        assert len(plans) == 1, "the plan's bytes depend on the number of cores"
    median = {name: [statistics.median(each) for each in zip(*runs, strict=True)] for name, runs in found.items()}
    for name, (cpu, wall) in median.items():
        print(f"{name:>5}: {cpu:7.1f} s of CPU, {wall:7.1f} s, {told.rows / wall:8,.0f} rows/s")
    bare_s, one_s, two_s = (median[name][0] for name in ("bare", "one", "two"))
    print(f"CPU against the bare loop: {two_s / bare_s:.2f} on two cores, {one_s / bare_s:.2f} on one")
    print(f"throughput of two cores against one: {median['one'][1] / median['two'][1]:.2f}")


def make_corpus(path: Path, rows: int) -> Path:
    """Write `rows` conversations of TURNS bundled chats each, no two alike."""
    chats = [json.loads(line)["messages"] for line in (ROOT / "data" / "chats.jsonl").read_text().splitlines()]
    chats = [messages for messages in chats if all(message["content"] for message in messages)]
    with path.open("w") as file:
        for row in range(rows):
            messages = [dict(m) for turn in range(TURNS) for m in chats[(row * TURNS + turn * 7) % len(chats)]]
            messages[0]["content"] = f"{row}. {messages[0]['content']}"
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def timed(command: list[str], cores: int) -> tuple[float, float]:
    """Return CPU and wall seconds of a command on the first `cores` cores that there are."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        command,
        check=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


if __name__ == "__main__":
    main()
