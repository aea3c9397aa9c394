"""Train small drafts in one process and on several ranks, and compare their losses, step by step.

    python tests/rank_losses.py                                        every method and objective, whole and sharded
    torchrun --nproc-per-node 2 tests/rank_losses.py CACHE CASES OUT   write the metrics of some, as JSON

A case is a list: whether the draft is sharded, the steps, fields of the recipe, and for a rank whose device has too
little memory how many blocks it can compute together. `test_ranks.py` takes fewer steps.
"""

# ruff: noqa: E402  the path first

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

from pipeline.cache import HiddenCache
from pipeline.drafts import DRAFTS, Draft
from pipeline.drafts.objectives import OBJECTIVES
from pipeline.runs.recipe import load_recipe, resolve
from pipeline.runs.training_data import split_samples
from stages.train_draft.batches import Sampler
from stages.train_draft.loader import BatchLoader, Prefetcher
from stages.train_draft.optimizers import make_optimizer
from stages.train_draft.ranks import Ranks, joined
from stages.train_draft.run import make_draft
from stages.train_draft.sharding import shard, whole_tensors
from stages.train_draft.step import Trainer


def train(ranks: Ranks, cache: Path, sharded: bool, steps: int, sets: list[str], most: int = 0) -> list:
    """Return the metrics of each step, and at last a sum over the weights; `most` blocks fit the last rank, if any."""
    store, ranks.sharded = HiddenCache.open(cache), sharded and ranks.size > 1
    resolved = resolve(load_recipe(None, (f"train.steps={steps}", "train.log_every=1", *sets)), store)
    split = split_samples(store, resolved.draft.mask_token_id, resolved.recipe.train.heldout)
    resolved = resolved.with_steps(len(split.train))
    draft = make_draft(resolved, store, ranks.device)
    if ranks.sharded:
        shard(draft, ranks)
    loader = BatchLoader(Sampler(store, split, resolved.draft, resolved.recipe.train), False, ranks.rank, ranks.size)
    optimizer = make_optimizer(resolved.recipe.train.optimizer, draft, "train.optimizer=adamw" in sets and not sharded)
    trainer = Trainer(draft, optimizer, loader, ranks)
    if most and 0 < ranks.rank == ranks.size - 1:
        run_out_of_memory(draft, most)
    metrics = [trainer.step(batch, cells) for batch, cells in Prefetcher(loader, 0, steps)]
    weights = whole_tensors(draft.state_dict(), keep=True).values()
    return [*metrics, sum(float(weight.double().square().sum()) for weight in weights)]


def run_out_of_memory(draft: Draft, most: int) -> None:
    """Let the device have no memory for more blocks than these together."""
    hidden = draft.hidden

    def small(cell, blocks):
        if len(blocks.anchors_N) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(cell, blocks)

    draft.hidden = small


def found_on(ranks: int, cache: Path, cases: list, folder: Path) -> list:
    """Return the metrics of each case, of so many processes that train together."""
    asked, out = folder / f"cases-{ranks}.json", folder / f"found-{ranks}.json"
    asked.write_text(json.dumps(cases))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] * (ranks > 1)
    command = [sys.executable, *torchrun, __file__, str(cache), str(asked), str(out)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def largest_difference(found: list, wanted: list) -> float:
    """Return the largest relative difference of two losses of the same case and step, or of the weights at the end."""
    pairs = [pair for cases in zip(found, wanted, strict=True) for pair in zip(*cases, strict=True)]
    numbers = [[one["loss"] if isinstance(one, dict) else one for one in pair] for pair in pairs]
    return max(abs(one - other) / abs(other) for one, other in numbers)


def all_combinations(steps: int) -> list[tuple[int, list[str]]]:
    """Return the steps and fields of a case for each method with each objective."""
    sets = ["train.batch=8", "train.cells=4", "train.anchors=3", "train.lr=1e-4"]
    sets += ["draft.block_size=4", "draft.num_hidden_layers=1"]
    return [
        (steps, [f"draft.method={method}", f"draft.objective={objective}", *sets])
        for method in DRAFTS
        for objective in OBJECTIVES
    ]


def compare_all(folder: Path, steps: int = 50) -> None:
    """Print the largest difference of each combination from one process, on 2 and 4 ranks, whole and sharded."""
    from tiny import conversations, save_target, write_jsonl

    from stages.cache_hidden.run import run
    from stages.cache_hidden.settings import CaptureOptions

    corpus = write_jsonl(folder / "chats.jsonl", conversations())
    options = CaptureOptions(layers="1,3,4", max_length=256)
    run(str(save_target(folder / "target")), str(corpus), folder / "cache", options=options)
    cases = all_combinations(steps)
    alone = found_on(1, folder / "cache", [[False, *case] for case in cases], folder)
    for ranks in (2, 4):
        for sharded in (False, True):
            found = found_on(ranks, folder / "cache", [[sharded, *case] for case in cases], folder)
            for (_, sets), one, other in zip(cases, found, alone, strict=True):
                named = " ".join(entry.partition("=")[2] for entry in sets[:2])
                kind = "sharded" if sharded else "whole"
                print(f"{ranks} ranks, {kind}, {named}: {largest_difference([one], [other]):.1e}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder:
            return compare_all(Path(folder))
    cache, cases, out = map(Path, sys.argv[1:])
    with joined("cpu") as ranks:
        found = [train(ranks, cache, *case) for case in json.loads(cases.read_text())]
        if ranks.first:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
