"""The training loop: from the newest checkpoint to the last step, with logs, checkpoints and evaluations; a signal
saves first."""

import signal
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.cache import HiddenCache
from pipeline.drafts import Draft
from pipeline.errors import CacheError, UsageError, first_line
from pipeline.evaluation.accept_length import accept_spans
from pipeline.evaluation.figures import summarise
from pipeline.runs import checkpoint
from pipeline.runs.folder import Evaluation
from pipeline.runs.recipe import Resolved
from pipeline.runs.split import Split, stratified_subset
from pipeline.visible_text import visible
from stages.train_draft.loader import BatchLoader, Prefetcher
from stages.train_draft.logs import METRICS, TIMING, Display, MetricsLog, Throughput
from stages.train_draft.optimizer import load_state_tensors, make_optimizer, state_tensors
from stages.train_draft.step import Trainer

EVAL_BATCH = 8  # samples; a signal is noticed between two such batches
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class GracefulStop:
    """Records SIGTERM, SIGHUP and Ctrl-C so that the loop can save before it ends; a second signal acts at once.

    Signals that were ignored (SIGHUP under nohup) stay ignored.
    """

    def __init__(self):
        self.received: int | None = None
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
        self.received = number
        self.__exit__()

    def raise_signal(self) -> None:
        """Raise what ends the process as the signal would: SystemExit(143), SystemExit(129) or KeyboardInterrupt."""
        raise KeyboardInterrupt if self.received == signal.SIGINT else SystemExit(128 + self.received)


class TrainingRun:
    """A run in progress: its folder, draft, optimiser and batches, after `step` steps."""

    def __init__(self, path: Path, cache: HiddenCache, split: Split, resolved: Resolved, draft: Draft):
        self.path, self.cache, self.draft = path, cache, draft
        self.train = resolved.recipe.train
        self.digests = {"recipe": resolved.recipe.digest(), "cache": cache.digest, "split": split.digest}
        self.optimizer = make_optimizer(self.train.optimizer, draft)
        self.device = draft.device
        self.loader = BatchLoader(cache, split, resolved.draft, self.train, keep_encoded=self.device.type != "cpu")
        self.eval_samples = stratified_subset(cache, split.heldout, self.train.eval_samples) if cache.has_final else ()
        self.metrics, self.timing_log = MetricsLog(path / METRICS), MetricsLog(path / TIMING)
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
            device = str(self.device)
            try:
                self.draft.load_state_dict(load_file(found.path / checkpoint.DRAFT, device=device))
                moments = load_file(found.path / checkpoint.OPTIMIZER, device=device)
                load_state_tensors(self.optimizer, moments, found.step)
            except (OSError, RuntimeError, KeyError) as error:  # its bytes were checked: written by another program
                raise CacheError(
                    f"{found.path}: not the weights and moments of this run's draft ({first_line(error, None)}); "
                    "remove it to go on from the checkpoint before"
                ) from error
        self.metrics.truncate(self.step, found.state.metrics if found else "")
        self.timing_log.truncate(self.step)
        return self.step

    def fit(self, display: Display, stop: GracefulStop) -> Evaluation | None:
        """Train to the last step; return the evaluation after it, None where nothing can be measured."""
        trainer = Trainer(self.draft, self.optimizer, self.loader, self.train)
        throughput = Throughput(self.step, self.train.steps)
        self._evaluate(display, stop)  # a checkpoint may have been saved between a step and its evaluation
        batches = Prefetcher(self.loader, self.step, self.train.steps, self.device)
        try:
            for batch, cells in batches:
                before = trainer.blocks_per_pass
                metrics = trainer.step(batch, cells)
                if trainer.blocks_per_pass != before:
                    display.print_line(
                        f"out of memory: from step {batch.step + 1} on {trainer.blocks_per_pass} blocks at a time"
                    )
                self.step = batch.step + 1
                throughput.count(batch)
                timing = throughput.timing(batches.waited)
                if metrics:
                    self.metrics.write(metrics)
                    self.timing_log.write({"step": self.step, **timing})
                display.step(self.step, metrics, timing)
                began = time.perf_counter()
                if self.step % self.train.save_every == 0 or self.step == self.train.steps:
                    self.save()
                self._evaluate(display, stop)
                throughput.exclude(time.perf_counter() - began)
        finally:
            batches.close()
        return self._evaluated()

    def save(self) -> None:
        digests = self.digests | {"metrics": self.metrics.last_checksum}
        checkpoint.save(self.path, self.step, self.draft, state_tensors(self.optimizer), digests, self.train.keep)

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
                spans += accept_spans(self.draft, self.cache, self.eval_samples[first : first + EVAL_BATCH])
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


def evaluation_text(figures: Evaluation) -> str:
    """Return an evaluation as one line of text: accept length, its 95 % interval and that of each domain."""
    if not figures.calls:
        return "no accept length: no held-out reply is the target's own"
    named = [f"{visible(name)} {of.accept_len:.2f}" for name, of in figures.domains.items() if of.calls and name]
    domains = f" ({', '.join(named)})" if named else ""
    low, high = figures.interval
    return f"accept length {figures.accept_len:.2f} [{low:.2f}, {high:.2f}] on held-out samples{domains}"


def use_deterministic_kernels(device: torch.device) -> None:
    """Make PyTorch use deterministic CUDA kernels. CPU kernels are deterministic for a given number of threads."""
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # cuDNN would otherwise compute a GRU in TF32, unlike every other product of a float32 draft.
        torch.backends.cudnn.allow_tf32 = False
