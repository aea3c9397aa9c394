"""`pipeline train-draft`: train a draft from a cache. Nothing here, or in what it imports, can load a target.

A run's folder is made or checked and its draft made; `training_run.py` takes the steps. Under torchrun all ranks do so,
of which the first writes and prints (see ranks.py).
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.cache import HiddenCache
from pipeline.drafts import DRAFTS, Draft, init_weights
from pipeline.runs.folder import (
    RUN,
    Result,
    chunk_rule,
    create_or_check,
    default_folder,
    read_result,
    read_run,
    run_lock,
)
from pipeline.runs.recipe import Recipe, Resolved, load_recipe, resolve
from pipeline.runs.training_data import Split, check_complete, split_samples
from pipeline.target.head import TargetHead
from pipeline.tensors import keep_freed_memory, refuse_out_of_memory
from pipeline.visible_text import print_visible, visible
from stages.train_draft.device_fit import fit_device, run_facts, shards
from stages.train_draft.kernels import compile_if_equal, kernels_of, use_deterministic_kernels
from stages.train_draft.logs import (
    Display,
    run_description,
    summary,
)
from stages.train_draft.ranks import Ranks, joined
from stages.train_draft.stop import GracefulStop
from stages.train_draft.tracking import check_trackers
from stages.train_draft.training_run import TrainingRun, digests

if TYPE_CHECKING:
    from pipeline.published.init_from import InitialDraft, InitialWeights


@dataclass(frozen=True)
class TrainResult:
    """A finished run. `accept_len` is None where no held-out reply is the target's own greedy one, or the cache holds
    no final states."""

    run: Path
    steps: int
    accept_len: float | None

    def as_dict(self) -> dict:
        """Return the figures of the run, as --json prints them."""
        result = read_result(self.run)
        measured = result.eval if self.accept_len is not None else None
        return {
            "run": str(self.run),
            "steps": self.steps,
            "parameters": result.parameters,
            "accept_len": self.accept_len,
            "interval": measured and measured.interval,
            "calls": measured and measured.calls,
        }


def run(
    cache: Path,
    recipe: Path | None = None,
    sets: tuple[str, ...] = (),
    out: Path | None = None,
    device: str | None = None,
    init_from: "InitialDraft | None" = None,
    sharded: bool | None = None,
) -> TrainResult:
    """Train the draft that the recipe describes, from the newest checkpoint if there is one; under torchrun on all of
    its ranks.

    init_from: a checkpoint, run or published draft whose weights are the initial ones. sharded: whether to divide the
    draft among the ranks; None: where a device does not hold it whole.

    Raises UsageError for a recipe or run folder that does not fit, DataError when no sample can train, CacheError for
    damage, RoomError, ProofError for a loss that is not finite; SystemExit(143) or KeyboardInterrupt when stopped,
    after a checkpoint is saved.
    """
    with joined(device) as ranks:
        store = HiddenCache.open(cache)
        resolved, split = complete_recipe(store, load_recipe(recipe, tuple(sets)))
        start = init_from and init_from.weights_for(resolved.draft, store.head(dtype=store.dtype))
        if start is not None:
            resolved = resolved.with_rope_scaling(start.rope_scaling)
        folder = out or default_folder(resolved, store, split, start)
        return train_resolved(folder, store, split, resolved, ranks.device, start, ranks, sharded)


def complete_recipe(store: HiddenCache, stated: Recipe) -> tuple[Resolved, Split]:
    """Return a recipe with every field filled from a cache, and that cache's samples. Raises UsageError, DataError."""
    check_complete(store, stated.draft.layers)
    resolved = resolve(stated, store)
    split = split_for(resolved, store)
    return resolved.with_steps(len(split.train)), split


def split_for(resolved: Resolved, store: HiddenCache) -> Split:
    """Return which samples train the draft and which are held out; it depends on the columns that the loss reads."""
    draft, heldout = resolved.draft, resolved.recipe.train.heldout
    return split_samples(store, draft.mask_token_id, heldout, draft.target_layer_ids, draft.needs_final_states)


def train_resolved(
    path: Path,
    store: HiddenCache,
    split: Split,
    resolved: Resolved,
    device: torch.device,
    start: "InitialWeights | None" = None,
    ranks: Ranks | None = None,
    sharded: bool | None = None,
) -> TrainResult:
    """Train one resolved recipe in the folder `path`, or resume it there; print the result. Raises what `run` does."""
    ranks = ranks or Ranks(device)
    ranks.check_same(digests(store, split, resolved) | {"initial weights": start.digest if start else "fresh"})
    with run_lock(path) if ranks.first else contextlib.nullcontext():
        ranks.sharded = shards(sharded, ranks, store, resolved)
        opened = open_run(path, store, split, resolved, ranks, start)
        if isinstance(opened, TrainingRun):
            shown = Display(opened.step, opened.train.steps)
            with GracefulStop() as ranks.stop, shown as display, contextlib.closing(opened):
                display.print_line(opened.description)
                if idle := opened.idle_ranks():
                    display.print_line(idle)
                opened.announce_time(display)
                opened.fit(display)
            opened = opened.finish()
    print_visible(summary(path, store, opened))
    return TrainResult(path, opened.steps, opened.accept_len)


def open_run(
    path: Path,
    store: HiddenCache,
    split: Split,
    resolved: Resolved,
    ranks: Ranks,
    start: "InitialWeights | None" = None,
    head: TargetHead | None = None,
    taken: int = 0,
) -> "TrainingRun | Result":
    """Print what a run is, whose folder is locked; return it at its newest checkpoint, or the result of a finished one.

    head: the target's, where it is on the device already. taken: bytes of the device that others have.
    """
    device, differs = ranks.device, []
    if ranks.first:
        check_trackers(resolved.recipe.train.track)
        differs = create_or_check(path, resolved, store, split, run_facts(ranks), start)
    ranks.wait_for(path / RUN)
    resolved = resolved.with_rope_scaling(read_run(path).rope_scaling)
    result = read_result(path)
    ranks.check_same({"state of the run": "unfinished" if result is None else "finished"})
    if result is not None:
        print_visible(f"{visible(path)} is finished: nothing to do")
        return result
    for line in run_description(path, store, split, resolved, device):
        print_visible(line)
    if start is not None:
        print_visible(visible(start.summary))
    if differs:
        began = visible("; ".join(differs))
        print_visible(f"began with {began}: the run goes on, its last digits may differ")
    use_deterministic_kernels(device)
    keep_freed_memory(device)
    samples = (ids_T[mask_T] for ids_T, mask_T in map(store.tokens_of, map(int, split.train)))
    draft = make_draft(resolved, store, device, start, samples, head)
    draft.chunk_rule = chunk_rule(path)
    if kernels_of(device) == "compiled":
        print_visible(visible(compile_if_equal(draft, resolved.recipe.train)))
    ranks.check_same_weights(draft)
    fit = fit_device(resolved, draft, ranks, taken, head is not None)
    training = TrainingRun(path, store, split, resolved, draft, ranks, fit)
    training.resume()
    return training


def make_draft(
    resolved: Resolved,
    store: HiddenCache,
    device: torch.device,
    start: "InitialWeights | None" = None,
    samples: Iterable[np.ndarray] = (),
    head: TargetHead | None = None,
) -> Draft:
    """Return a draft in training mode on its device: float32 weights, random where `start` has none, and the
    target's frozen head in the dtype of the arithmetic. samples: supervised ids of the training samples, which a method
    may count. head: that head, where it is on the device already.

    Raises RoomError when memory is too small.
    """
    with refuse_out_of_memory("the draft", "make its sizes in [draft] smaller"):
        draft = DRAFTS[resolved.draft.method](resolved.draft, head or load_head(resolved, store, device))
        init_weights(draft, resolved.recipe.train.seed)
        draft.before_training(samples)
        if start is not None:
            start.load_into(draft)
        return draft.to(device).train()


def load_head(resolved: Resolved, store: HiddenCache, device: torch.device) -> TargetHead:
    """Return the target's frozen head on a device, in the dtype of the arithmetic."""
    return store.head(str(device), torch.bfloat16 if resolved.recipe.train.dtype == "bfloat16" else torch.float32)
