"""Run a day on the bundled target, and write docs/a-day.md: every command as typed, with what it prints.

    python docs/transcript.py                 minutes, on two cores
    python docs/transcript.py --samples 60 --steps 4 --out FILE      to try this script, on a corpus few.jsonl

Commands run in a folder of their own, as the page's reader would type them in the repository. Of longer outputs the
first and the last lines are kept; of a line of progress that is written over, the last state. The folder's own path is
left out. Commands that this version does not have are passed over.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline import __version__
from pipeline.cli import commands
from pipeline.runs.sweep_record import SWEEP, read_sweep

ROOT = Path(__file__).parent.parent
KEPT = 14  # lines at the begin and at the end of an output
WIDTH = 100
TARGET = "data/tiny-qwen3"

HEAD = """# A day

Every command on the bundled target, on a CPU, with what it prints: written by `{typed}`, version {version},
threads: {threads}, {minutes} minutes in all. Of long outputs the first and the last {kept} lines are shown; nothing
else is changed.
"""


def day(samples: int | None, steps: int | None) -> list[tuple[str, list[str]]]:
    """Return the day's sections, each a sentence and the commands behind it."""
    fewer = " --corpus few.jsonl" if samples else ""
    shorter = f" --set train.steps={steps}" if steps else ""
    few = " --count 4 --max-new 8" if samples else " --count 64"
    return [
        (
            "What would be captured, and does it fit? Nothing runs yet.",
            [f"plan --model {TARGET}{fewer}"],
        ),
        ("The target runs once.", [f"cache-hidden --model {TARGET}{fewer}"]),
        (
            "Every byte is checked; then what the cache is, and one sample of it.",
            ["verify", "inspect", "inspect --sample 3"],
        ),
        (
            "A draft is trained from the cache alone.",
            [f"train-draft configs/demo.toml --set draft.method=domino{shorter} --out runs/domino"],
        ),
        ("How it went, at a glance.", ["watch runs/domino --once"]),
        (
            "What it gains, and that no reply changes; then the same of a second method, side by side.",
            [
                f"evaluate --draft runs/domino{few} --out domino.json",
                f"train-draft configs/demo.toml --set draft.method=dflash{shorter} --out runs/dflash",
                f"evaluate --draft runs/dflash{few} --out dflash.json",
                "report domino.json dflash.json --page report.html",
                "report domino.json --against dflash.json",
            ],
        ),
        (
            "As an engine loads it, checked from its files alone.",
            ["export --draft runs/dflash --format speculators --out my-draft", "check-export my-draft"],
        ),
        (
            "Lists of settings, run after run, from the same cache.",
            [
                f"sweep configs/sweep.toml --set train.steps={min(steps or 20, 20)} --set train.eval_samples=8 "
                "--out runs/sweep"
            ],
        ),
        ("Why does the last of them accept so little?", ["doctor {last}"]),
    ]


def run(typed: str, folder: Path) -> tuple[str, int]:
    """Run a command; return what it printed, trimmed, and its exit code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(WIDTH), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *shlex.split(typed)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return trimmed(done.stdout, folder), done.returncode


def last_run(sweep: Path) -> str:
    """Return the run of a sweep with the shortest accept length, as a path from the day's folder."""
    return read_sweep(sweep).runs[-1].run if (sweep / SWEEP).is_file() else "runs/domino"


def trimmed(text: str, folder: Path) -> str:
    for place in (folder, ROOT):
        text = text.replace(f"{place}/", "").replace(str(place), ".")
    lines = [line.split("\r")[-1].rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).splitlines()]
    if len(lines) > 2 * KEPT + 1:
        left = len(lines) - 2 * KEPT
        lines = [*lines[:KEPT], f"… {left} lines …", *lines[-KEPT:]]
    return "\n".join(lines)


def written(samples: int | None, steps: int | None) -> str:
    """Run the day; return the page."""
    began, parts = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for linked in ("configs", "data"):
            (folder / linked).symlink_to(ROOT / linked)
        if samples:
            chats = (ROOT / "data/chats.jsonl").read_text().splitlines(keepends=True)
            (folder / "few.jsonl").write_text("".join(chats[:: max(1, len(chats) // samples)]))
        for sentence, lines in day(samples, steps):
            known = [line for line in lines if line.split()[0] in commands.commands]
            if known:
                parts.append(f"## {sentence}\n")
            for line in known:
                typed = line.format(last=last_run(folder / "runs/sweep"))
                print(f"pipeline {typed}", flush=True)
                printed, code = run(typed, folder)
                if code not in (0, 1) or (code and not typed.startswith("doctor")):
                    raise SystemExit(f"pipeline {typed} ended with {code}:\n{printed}")
                parts.append(f"```console\n$ pipeline {typed}\n{printed}\n```\n")
    minutes = round((time.monotonic() - began) / 60)
    typed_here = shlex.join(["python", "docs/transcript.py", *sys.argv[1:]])
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    return "\n".join(
        [HEAD.format(typed=typed_here, version=__version__, threads=threads, minutes=minutes, kept=KEPT), *parts]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, help="chats in all, to try this script")
    parser.add_argument("--steps", type=int, help="of each training, to try this script")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/a-day.md")
    given = parser.parse_args()
    page = written(given.samples, given.steps)
    given.out.write_text(page)


if __name__ == "__main__":
    main()
