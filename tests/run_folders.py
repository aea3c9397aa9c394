"""Folders of runs, changed as tests need them: what is written again has its checksums, as a run writes it."""

import json
import shutil
from pathlib import Path

from pipeline.checksummed_json import parse_checksummed
from pipeline.runs.folder import RECIPE, RUN, write_run


def with_recipe(run: Path, out: Path, old: str, new: str) -> Path:
    """Copy a run as if its recipe had said `new` where it says `old`."""
    shutil.copytree(run, out)
    text, facts = (run / RECIPE).read_text(), json.loads((run / RUN).read_text())
    assert old in text
    write_run(out, {key: value for key, value in facts.items() if key != "xxh3"}, text.replace(old, new, 1))
    return out


def without_checksums(run: Path) -> None:
    """Make a run's folder as version 0.5.0 wrote it: records that say nothing of themselves or of one another."""
    for path in (run / RUN, run / "done.json", *run.glob("checkpoints/*/state.json")):
        if path.exists():
            facts, _ = parse_checksummed(path.read_bytes())
            for name in ("recipe",) if path.name == RUN else ("state", "metrics"):
                facts.pop(name, None)
            path.write_text(json.dumps(facts, indent=1) + "\n")
    for path in (run / "metrics.jsonl", run / "timing.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "xxh3"}) + "\n" for line in lines))
