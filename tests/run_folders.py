"""Folders of runs, changed as tests need them: what is written again has its checksums, as a run writes it."""

import json
import shutil
from pathlib import Path

import torch
from forms import SIZES

from pipeline.drafts import DRAFTS, Draft, draft_config, init_weights
from pipeline.json_files import parse_checksummed
from pipeline.runs import checkpoint
from pipeline.runs.folder import RECIPE, RUN, read_run, write_run
from pipeline.target.head import TargetHead

METHOD_FIELDS = {
    "dflash": {"shift_label": False},
    "domino": {"shift_label": True, "pure_draft_prefix_len": 1, "emb_dim": 4, "gru_hidden_dim": 8},
}


def small_head() -> TargetHead:
    """The head [V 40, D 16] of a target that the drafts of `save_draft_run` belong to."""
    weight = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    return TargetHead(weight, weight)


def save_draft_run(run: Path, method: str = "domino", **changes) -> Draft:
    """Write a random draft to the folder of a run as its checkpoint of step 7, and return the draft."""
    draft = DRAFTS[method](draft_config(method=method, **{**SIZES, **METHOD_FIELDS[method], **changes}), small_head())
    init_weights(draft, 5)
    with torch.no_grad():  # norms of 1 would hide a lost one
        for weight in draft.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    checkpoint.save(run, 7, draft, {}, {}, 1)
    return draft.eval()


def with_recipe(run: Path, out: Path, old: str, new: str) -> Path:
    """Copy a run as if its recipe had said `new` where it says `old`."""
    shutil.copytree(run, out)
    text = (run / RECIPE).read_text()
    assert old in text
    write_run(out, read_run(run), text.replace(old, new, 1))
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
