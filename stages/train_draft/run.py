"""`pipeline train-draft`: train a draft from a cache. Nothing here, or in what it imports, can load a target.

The loop goes from the newest checkpoint to the last step, with logs, checkpoints and evaluations; a signal saves first.
"""

import signal
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file

from pipeline.cache import HiddenCache
from pipeline.drafts import DRAFTS, Draft, fused, init_weights
from pipeline.drafts.fused import compiles
from pipeline.errors import CacheError, RoomError, UsageError, first_line
from pipeline.evaluation.accept_length import Span, accept_spans, summarise
from pipeline.runs import checkpoint
from pipeline.runs.folder import (
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
from pipeline.tensors import device_bytes, find_device, refuse_out_of_memory
from pipeline.visible_text import print_visible, visible
from stages.train_draft.batches import Batch, Sampler
from stages.train_draft.kernels import compile_if_equal, kernels_of, machine_facts, use_deterministic_kernels
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
from stages.train_draft.memory import Fit, memory_lines, step_memory
from stages.train_draft.step import Trainer, load_state_tensors, make_optimizer, state_tensors

if TYPE_CHECKING:
    from pipeline.published.weights import InitialDraft, InitialWeights

EVAL_BATCH = 8  # samples; a signal is noticed between two such batches
EVAL_REMEDY = "the step is saved: go on with the same command on a larger device"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
REPEAT_SECONDS = 2.0


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
) -> TrainResult:
    """Train the draft that the recipe describes, from the newest checkpoint if there is one.

    init_from: a checkpoint, run or published draft whose weights are the initial ones.

    Raises UsageError for a recipe or run folder that does not fit, DataError when no sample can train, CacheError for
    damage, RoomError, ProofError for a loss that is not finite; SystemExit(143) or KeyboardInterrupt when stopped,
    after a checkpoint is saved.
    """
    store = HiddenCache.open(cache)
    torch_device = find_device(device)
    stated = load_recipe(recipe, tuple(sets))
    check_complete(store, stated.draft.layers)
    resolved = resolve(stated, store)
    split = split_for(resolved, store)
    resolved = resolved.with_steps(len(split.train))
    start = init_from and init_from.weights_for(resolved.draft, store.head(dtype=store.dtype))
    if start is not None:
        resolved = resolved.with_rope_scaling(start.rope_scaling)
    folder = out or default_folder(resolved, store, split, start)
    return train_resolved(folder, store, split, resolved, torch_device, start)


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
) -> TrainResult:
    """Train one resolved recipe in the folder `path`, or resume it there; print the result. Raises what `run` does."""
    with run_lock(path):
        opened = open_run(path, store, split, resolved, device, start)
        if isinstance(opened, TrainingRun):
            with GracefulStop() as stop, Display(opened.step, opened.train.steps) as display:
                display.print_line(opened.description)
                opened.fit(display, stop)
            opened = opened.finish()
    print_visible(summary(path, store, opened))
    return TrainResult(path, opened.steps, opened.accept_len)


def open_run(
    path: Path,
    store: HiddenCache,
    split: Split,
    resolved: Resolved,
    device: torch.device,
    start: "InitialWeights | None" = None,
    head: TargetHead | None = None,
    taken: int = 0,
) -> "TrainingRun | Result":
    """Print what a run is, whose folder is locked; return it at its newest checkpoint, or the result of a finished one.

    head: the target's, where it is on the device already. taken: bytes of the device that others have.
    """
    differs = create_or_check(path, resolved, store, split, machine_facts(device), start)
    resolved = resolved.with_rope_scaling(read_run(path).rope_scaling)
    result = read_result(path)
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
    training = TrainingRun(path, store, split, resolved, draft, taken)
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


class GracefulStop:
    """Records SIGTERM, SIGHUP and Ctrl-C so that the loop can save before it ends; a second signal acts at once.

    One within REPEAT_SECONDS is the same: a scheduler signals every process, and the one that started it does so again.

    Signals that were ignored (SIGHUP under nohup) stay ignored.
    """

    def __init__(self):
        self.received: int | None = None
        self.received_at = 0.0
        self.previous_handlers: dict = {}

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in STOP_SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self.previous_handlers = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}

    def _note(self, number: int, frame) -> None:
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
        elif time.monotonic() - self.received_at > REPEAT_SECONDS:
            self.__exit__()
            signal.raise_signal(number)

    def raise_signal(self) -> None:
        """Raise what ends the process as the signal would: SystemExit(143), SystemExit(129) or KeyboardInterrupt."""
        raise KeyboardInterrupt if self.received == signal.SIGINT else SystemExit(128 + self.received)


class TrainingRun:
    """A run in progress: its folder, draft, optimiser and batches, after `step` steps."""

    def __init__(self, path: Path, cache: HiddenCache, split: Split, resolved: Resolved, draft: Draft, taken: int = 0):
        self.path, self.cache, self.draft = path, cache, draft
        self.kernels = fused.kernels  # which several runs in one process may not have in common
        self.train = resolved.recipe.train
        self.digests = {"recipe": resolved.recipe.digest(), "cache": cache.digest, "split": split.digest}
        self.device = draft.device
        fit = fit_device(resolved, draft, taken)
        self.optimizer = make_optimizer(self.train.optimizer, draft, fit is not None and fit.moments_on_host)
        sampler = Sampler(cache, split, resolved.draft, self.train)
        self.loader = BatchLoader(sampler, keep_encoded=self.device.type != "cpu")
        self.eval_samples = stratified_subset(cache, split.heldout, self.train.eval_samples) if cache.has_final else ()
        self.metrics, self.timing_log = MetricsLog(path / METRICS), MetricsLog(path / TIMING)
        self.trainer = Trainer(draft, self.optimizer, self.loader)
        if fit is not None and fit.at_once < self.train.cell_anchors:
            self.trainer.blocks_per_pass = max(1, fit.at_once)  # one is tried where none seems to fit
        self.step = 0

    def resume(self) -> int:
        """Load the newest checkpoint and truncate the metrics to it; return its step, 0 without one.

        Raises UsageError for a checkpoint of another recipe, cache or split; CacheError for a damaged one.
        """
        found = checkpoint.latest(self.path)
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
            device = str(self.device)
            try:
                self.draft.load_state_dict(load_file(found.path / checkpoint.DRAFT, device=device))
                place = "cpu" if self.optimizer.on_host else device
                moments = load_file(found.path / checkpoint.OPTIMIZER, device=place)
                load_state_tensors(self.optimizer, moments, found.step)
            except (OSError, RuntimeError, KeyError) as error:  # its bytes were checked: written by another program
                raise CacheError(
                    f"{found.path}: not the weights and moments of this run's draft ({first_line(error, None)}); "
                    "remove it to go on from the checkpoint before"
                ) from error
        self.metrics.truncate(self.step, found.state.metrics if found else "")
        self.timing_log.truncate(self.step)
        return self.step

    @property
    def description(self) -> str:
        """The size of the draft, and where the run stands."""
        begun = f"going on after step {self.step}" if self.step else "starting at step 0"
        return f"{self.parameters:,} parameters; {begun} of {self.train.steps}"

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.draft.parameters())

    def fit(self, display: Display, stop: GracefulStop, until: int | None = None) -> None:
        """Train to step `until`, by default the last one."""
        self.begin(display, stop)
        batches = Prefetcher(self.loader, self.step, until or self.train.steps, self.device)
        try:
            for batch, cells in batches:
                self.note(batch, self.trainer.step(batch, cells), batches.waited, display, stop)
        finally:
            batches.close()

    def begin(self, display: Display, stop: GracefulStop) -> None:
        """Prepare for steps from here on; evaluate where a checkpoint was saved and its evaluation was not."""
        self.throughput = Throughput(self.step, self.train.steps, self.device)
        self.blocks_noted = self.trainer.blocks_per_pass
        self._evaluate(display, stop)

    def note(self, batch: Batch, metrics: dict | None, waited: float, display: Display, stop: GracefulStop) -> None:
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
        self._evaluate(display, stop)
        self.throughput.excluded += time.perf_counter() - began

    def finish(self) -> Result:
        """Write the result of a run that has taken its last step, and return it."""
        figures = self._evaluated()
        accept_len = figures.accept_len if figures and figures.calls else None
        result = Result(steps=self.step, parameters=self.parameters, accept_len=accept_len, eval=figures)
        write_result(self.path, result)
        return result

    def save(self) -> None:
        facts = self.digests | {"metrics": self.metrics.last_checksum}
        if self.trainer.blocks_per_pass is not None:
            facts["blocks_per_pass"] = self.trainer.blocks_per_pass
        checkpoint.save(self.path, self.step, self.draft, state_tensors(self.optimizer), facts, self.train.keep)

    def _evaluated(self) -> Evaluation | None:
        """Return the evaluation of this step from the metrics log, None when there is none yet."""
        return next((line.eval for line in self.metrics.lines if line.step == self.step and line.eval), None)

    def _evaluate(self, display: Display, stop: GracefulStop) -> None:
        """Measure the exact accept length on held-out samples when one is due. On a signal: save and exit."""
        due = self.step > 0 and (self.step % self.train.eval_every == 0 or self.step == self.train.steps)
        spans = []
        if due and len(self.eval_samples) and self._evaluated() is None:
            self.draft.eval()
            for first in range(0, len(self.eval_samples), EVAL_BATCH):
                if stop.received:
                    break
                spans += self._measure(self.eval_samples[first : first + EVAL_BATCH])
            self.draft.train()
        if stop.received:
            self.save()
            display.print_line(
                f"stopped at step {self.step}, saved in {visible(self.path)}; the same command goes on from there"
            )
            stop.raise_signal()
        if spans:
            # Reply by reply, so that runs can be pooled and compared on the same replies: sample, row, tokens, calls.
            replies = [
                [span.sample, span.start, sum(span.lengths), len(span.lengths)] for span in spans if span.lengths
            ]
            self.metrics.write({"step": self.step, "eval": summarise(spans) | {"replies": replies}})
            display.print_line(f"step {self.step}: {evaluation_text(self._evaluated())}")

    def _measure(self, samples: Sequence[int]) -> list[Span]:
        """Return the samples' spans. RoomError, with the step saved, where the device has no memory for one block."""
        try:
            with refuse_out_of_memory(f"the evaluation of step {self.step}", EVAL_REMEDY):
                return accept_spans(self.draft, self.cache, samples)[0]
        except RoomError:
            self.save()
            raise


def fit_device(resolved: Resolved, draft: Draft, taken: int = 0) -> Fit | None:
    """Return what of a step the draft's device has memory for, where others have `taken` bytes of it, and print it;
    None on a CPU."""
    memory, train = device_bytes(draft.device), resolved.recipe.train
    if memory is None:
        return None
    head, compiled = draft.target, compiles(draft.device)
    step = step_memory(resolved.draft, train, head.head_VD.dtype, head.tied, compiled)
    for line in memory_lines(step, train.context, memory - taken):
        print_visible(line)
    return step.fit(memory - taken)
