"""`pipeline train-draft`: train a draft from a cache. Nothing here, or in what it imports, can load a target.

The loop goes from the newest checkpoint to the last step, with logs, checkpoints and evaluations; a signal saves first.
Under torchrun the same in step on all ranks, of which the first writes and prints (see ranks.py).
"""

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.cache import HiddenCache
from pipeline.drafts import DRAFTS, Draft, fused, init_weights
from pipeline.errors import CacheError, RoomError, UsageError, first_line
from pipeline.evaluation.accept_length import Span, accept_spans, summarise
from pipeline.runs import checkpoint
from pipeline.runs.folder import (
    RUN,
    Evaluation,
    Result,
    chunk_rule,
    create_or_check,
    default_folder,
    read_result,
    read_run,
    run_lock,
    write_result,
)
from pipeline.runs.recipe import Resolved, load_recipe, resolve
from pipeline.runs.training_data import Split, check_complete, split_samples, stratified_subset
from pipeline.target.head import TargetHead
from pipeline.tensors import refuse_out_of_memory
from pipeline.visible_text import print_visible, visible
from stages.train_draft.batches import Batch, Sampler
from stages.train_draft.device import fit_device, run_facts, shards
from stages.train_draft.kernels import compile_if_equal, kernels_of, use_deterministic_kernels
from stages.train_draft.loader import BatchLoader, Prefetcher
from stages.train_draft.logs import (
    METRICS,
    TIMING,
    Display,
    MetricsLog,
    Throughput,
    evaluation_text,
    run_description,
    summary,
)
from stages.train_draft.ranks import Ranks, joined
from stages.train_draft.sharding import shard, whole_draft, whole_tensors
from stages.train_draft.step import Trainer, load_state_tensors, make_optimizer, state_tensors
from stages.train_draft.stop import GracefulStop, raise_signal

if TYPE_CHECKING:
    from pipeline.published.weights import InitialDraft, InitialWeights

EVAL_BATCH = 8  # samples; a signal is noticed between two such batches
EVAL_REMEDY = "the step is saved: go on with the same command on a larger device"


@dataclass(frozen=True)
class TrainResult:
    """A finished run. `accept_len` is None where no held-out reply is the target's own greedy one, or the cache holds
    no final states."""

    run: Path
    steps: int
    accept_len: float | None


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
        stated = load_recipe(recipe, tuple(sets))
        check_complete(store, stated.draft.layers)
        resolved = resolve(stated, store)
        split = split_for(resolved, store)
        resolved = resolved.with_steps(len(split.train))
        start = init_from and init_from.weights_for(resolved.draft, store.head(dtype=store.dtype))
        if start is not None:
            resolved = resolved.with_rope_scaling(start.rope_scaling)
        folder = out or default_folder(resolved, store, split, start)
        return train_resolved(folder, store, split, resolved, ranks.device, start, ranks, sharded)


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
            with GracefulStop() as ranks.stop, Display(opened.step, opened.train.steps) as display:
                display.print_line(opened.description)
                if idle := opened.idle_ranks():
                    display.print_line(idle)
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
    samples = (store.tokens_of(int(index))[0] for index in split.train)
    draft = make_draft(resolved, store, device, start, samples, head)
    draft.chunk_rule = chunk_rule(path)
    if kernels_of(device) == "compiled":
        print_visible(visible(compile_if_equal(draft, resolved.recipe.train)))
    ranks.check_same_weights(draft)
    training = TrainingRun(path, store, split, resolved, draft, ranks, taken)
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
    target's frozen head in the dtype of the arithmetic. samples: ids of the training samples, which a method may count.
    head: that head, where it is on the device already.

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


def digests(store: HiddenCache, split: Split, resolved: Resolved) -> dict[str, str]:
    """Return the digests of what a run must be to go on from a checkpoint."""
    return {"recipe": resolved.recipe.digest(), "cache": store.digest, "split": split.digest}


class TrainingRun:
    """A run in progress: its folder, draft, optimiser and batches, after `step` steps."""

    def __init__(
        self,
        path: Path,
        cache: HiddenCache,
        split: Split,
        resolved: Resolved,
        draft: Draft,
        ranks: Ranks | None = None,
        taken: int = 0,
    ):
        self.kernels = fused.kernels  # which several runs in one process may not have in common
        self.parameters = sum(weight.numel() for weight in draft.parameters())
        self.path, self.cache, self.ranks = path, cache, ranks or Ranks(draft.device)
        self.train = resolved.recipe.train
        self.digests = digests(cache, split, resolved)
        self.device = draft.device
        fit = fit_device(resolved, draft, self.ranks, taken)
        self.draft = draft = shard(draft, self.ranks) if self.ranks.sharded else draft
        self.optimizer = make_optimizer(self.train.optimizer, draft, fit is not None and fit.moments_on_host)
        sampler = Sampler(cache, split, resolved.draft, self.train)
        self.loader = BatchLoader(sampler, self.device.type != "cpu", self.ranks.rank, self.ranks.size)
        self.eval_samples = stratified_subset(cache, split.heldout, self.train.eval_samples) if cache.has_final else ()
        log = MetricsLog if self.ranks.first else UnwrittenLog
        self.metrics, self.timing_log = log(path / METRICS), log(path / TIMING)
        self.trainer = Trainer(draft, self.optimizer, self.loader, self.ranks)
        if fit is not None and fit.at_once < self.train.cell_anchors:
            self.trainer.blocks_per_pass = max(1, fit.at_once)  # one is tried where none seems to fit
        self.step = 0

    def resume(self) -> int:
        """Load the newest checkpoint and truncate the metrics to it; return its step, 0 without one.

        Raises UsageError for a checkpoint of another recipe, cache or split; CacheError for a damaged one.
        """
        found = checkpoint.latest(self.path, self.ranks.of_first(checkpoint.steps(self.path)))
        if found is not None:
            for key, digest in self.digests.items():
                recorded = getattr(found.state, key)
                if recorded != digest:
                    raise UsageError(
                        f"{found.path} was made with another {key}: digest {recorded}, this run has {digest}; "
                        "remove it to go on from the checkpoint before"
                    )
            self.step = found.step
            self.trainer.blocks_per_pass = found.state.blocks_per_pass or self.trainer.blocks_per_pass
            try:
                checkpoint.load_tensors(found.path / checkpoint.DRAFT, self.draft.state_dict())
                moments = state_tensors(self.optimizer)
                checkpoint.load_tensors(found.path / checkpoint.OPTIMIZER, moments)
                load_state_tensors(self.optimizer, moments, found.step)
            except (OSError, RuntimeError, KeyError) as error:  # its bytes were checked: written by another program
                raise CacheError(
                    f"{found.path}: not the weights and moments of this run's draft ({first_line(error, None)}); "
                    "remove it to go on from the checkpoint before"
                ) from error
        self.metrics.truncate(self.step, found.state.metrics if found else "")
        self.timing_log.truncate(self.step)
        return self.step

    def idle_ranks(self) -> str | None:
        """Return in words that the next batch has fewer cells than there are ranks; None where it has as many."""
        if self.ranks.size == 1:
            return None
        cells = len(self.loader.sampler.batch(min(self.step, self.train.steps - 1)).cells)
        if cells >= self.ranks.size:
            return None
        return (
            f"the next batch has {cells} cells for {self.ranks.size} ranks, and a rank without one waits: start fewer, "
            "or raise train.batch or train.cells, which makes another run"
        )

    @property
    def description(self) -> str:
        """The size of the draft, and where the run stands."""
        begun = f"going on after step {self.step}" if self.step else "starting at step 0"
        if self.ranks.size > 1:
            begun = f"{self.ranks.size} ranks{', sharded' * self.ranks.sharded}; {begun}"
        return f"{self.parameters:,} parameters; {begun} of {self.train.steps}"

    def fit(self, display: Display, until: int | None = None) -> None:
        """Train to step `until`, by default the last one."""
        self.begin(display)
        batches = Prefetcher(self.loader, self.step, until or self.train.steps, self.device)
        try:
            for batch, cells in batches:
                self.note(batch, self.trainer.step(batch, cells), batches.waited, display)
        finally:
            batches.close()

    def begin(self, display: Display) -> None:
        """Prepare for steps from here on; evaluate where a checkpoint was saved and its evaluation was not."""
        self.throughput = Throughput(self.step, self.train.steps, self.device)
        self.blocks_noted = self.trainer.blocks_per_pass
        self._evaluate(display)

    def note(self, batch: Batch, metrics: dict | None, waited: float, display: Display) -> None:
        """Log and show a step that was taken; save and evaluate where that is due.

        waited: seconds waited for data since `begin`.
        """
        if self.trainer.blocks_per_pass != self.blocks_noted:
            self.blocks_noted = self.trainer.blocks_per_pass
            display.print_line(f"out of memory: from step {batch.step + 1} on {self.blocks_noted} blocks at a time")
        self.step = batch.step + 1
        timing = self.throughput.count(batch, waited)
        if metrics:
            self.metrics.write(metrics)
            self.timing_log.write({"step": self.step, **timing})
        display.step(self.step, metrics, timing)
        began = time.perf_counter()
        if self.step % self.train.save_every == 0 or self.step == self.train.steps:
            self.save()
        self._evaluate(display)
        self.throughput.excluded += time.perf_counter() - began

    def finish(self) -> Result:
        """Write the result of a run that has taken its last step, and return it."""
        figures = self._evaluated()
        accept_len = self.ranks.of_first(figures.accept_len if figures and figures.calls else None)
        result = Result(steps=self.step, parameters=self.parameters, accept_len=accept_len, eval=figures)
        if self.ranks.first:
            write_result(self.path, result)
        return result

    def save(self) -> None:
        """Write a checkpoint of this step, on rank 0; every rank of a sharded draft has to call it."""
        weights, moments = self.draft.state_dict(), state_tensors(self.optimizer)
        if self.ranks.sharded:
            weights, moments = (whole_tensors(tensors, self.ranks.first) for tensors in (weights, moments))
        if self.ranks.first:
            facts = self.digests | {"metrics": self.metrics.last_checksum}
            if self.trainer.blocks_per_pass is not None:
                facts["blocks_per_pass"] = self.trainer.blocks_per_pass
            checkpoint.save(self.path, self.step, self.draft, moments, facts, self.train.keep, weights)

    def _evaluated(self) -> Evaluation | None:
        """Return the evaluation of this step from the metrics log, None when there is none yet."""
        return next((line.eval for line in self.metrics.lines if line.step == self.step and line.eval), None)

    def _evaluate(self, display: Display) -> None:
        """Measure the exact accept length on held-out samples when one is due. On a signal: save and exit."""
        due = self.step > 0 and (self.step % self.train.eval_every == 0 or self.step == self.train.steps)
        spans = []
        if due and len(self.eval_samples) and self.ranks.of_first(self._evaluated() is None):
            spans = self._measure_all()
        if (number := self.ranks.signal) is not None:
            self.save()
            display.print_line(
                f"stopped at step {self.step}, saved in {visible(self.path)}; the same command goes on from there"
            )
            self.ranks.wait()  # torchrun ends all ranks once one has ended
            raise_signal(number)
        if spans and self.ranks.first:
            # Reply by reply, so that runs can be pooled and compared on the same replies: sample, row, tokens, calls.
            replies = [
                [span.sample, span.start, sum(span.lengths), len(span.lengths)] for span in spans if span.lengths
            ]
            self.metrics.write({"step": self.step, "eval": summarise(spans) | {"replies": replies}})
            display.print_line(f"step {self.step}: {evaluation_text(self._evaluated())}")

    def _measure_all(self) -> list[Span]:
        """Return the spans of the held-out samples, of which ranks measure a batch each in turn; those of fewer where a
        signal comes. RoomError, with the step saved, where a device has no memory for one block."""
        if self.ranks.sharded:
            self.save()  # a rank without memory for the whole draft could not save it afterwards
        with refuse_out_of_memory(f"the evaluation of step {self.step}", EVAL_REMEDY):
            draft = whole_draft(self.draft).eval()
        batches, measured = range(0, len(self.eval_samples), EVAL_BATCH), []
        for at in range(self.ranks.rank, len(batches) + self.ranks.rank, self.ranks.size):
            self.ranks.wait()
            if self.ranks.signal is not None:
                break
            failure = None
            try:
                for first in batches[at : at + 1]:
                    spans = self._measure(draft, self.eval_samples[first : first + EVAL_BATCH])
                    measured.append([first, [astuple(span) for span in spans]])
            except RoomError as error:
                failure = error
            if self.ranks.any(failure is not None):
                self.save()
                self.ranks.wait()
                if failure is not None:
                    raise failure
                self.ranks.wait()  # in vain: the rank that has no memory ends, and so do all
        self.draft.train()
        every = sorted(batch for of_rank in self.ranks.gather(measured) for batch in of_rank)
        return [Span(*values) for _, spans in every for values in spans]

    def _measure(self, draft: Draft, samples: Sequence[int]) -> list[Span]:
        with refuse_out_of_memory(f"the evaluation of step {self.step}", EVAL_REMEDY):
            return accept_spans(draft, self.cache, samples)[0]


class UnwrittenLog(MetricsLog):
    """The log of a rank that writes none."""

    def truncate(self, step: int, expected_checksum: str = "") -> None:
        pass

    def write(self, record: dict) -> None:
        pass
