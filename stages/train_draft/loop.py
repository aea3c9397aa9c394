"""The run from its checkpoint to its horizon: step, log, save, evaluate; stop when told to, losing nothing."""

import signal
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.cache import HiddenCache
from pipeline.drafts import Draft
from pipeline.errors import CacheError, UsageError
from pipeline.evaluation.accept_length import accept_spans, summarise
from pipeline.runs import checkpoint
from pipeline.runs.recipe import Resolved
from pipeline.runs.split import Split, spread
from pipeline.visible_text import visible
from stages.train_draft.loader import Stream
from stages.train_draft.metrics_log import METRICS, TIMING, Journal
from stages.train_draft.optimizer import make_optimizer
from stages.train_draft.progress import Clock, Display
from stages.train_draft.step import Trainer

EVALUATED_AT_ONCE = 8  # samples; between them we look whether somebody wants us to stop
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stop:
    """Notes SIGTERM, SIGHUP and Ctrl-C so that the loop can save first; a second one acts at once.

    Those that are ignored, SIGHUP under nohup say, stay so.
    """

    def __init__(self):
        self.received: int | None = None
        self.before: dict = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self.before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, frame) -> None:
        self.received = number
        self.__exit__()

    def leave(self) -> None:
        """Raise what ends the process as its signal would: exit code 143 or 129, or KeyboardInterrupt."""
        raise KeyboardInterrupt if self.received == signal.SIGINT else SystemExit(128 + self.received)


class Run:
    """A run's folder, draft and data, at some step."""

    def __init__(self, path: Path, cache: HiddenCache, split: Split, resolved: Resolved, draft: Draft):
        self.path, self.cache, self.draft = path, cache, draft
        self.train = resolved.recipe.train
        self.contract = {"recipe": resolved.recipe.digest(), "cache": cache.digest, "split": split.digest}
        self.optimizer = make_optimizer(self.train.optimizer, draft)
        self.device = draft.fc.weight.device
        self.stream = Stream(cache, split, resolved.draft, self.train, coded=self.device.type != "cpu")
        self.probed = spread(cache, split.heldout, self.train.eval_samples) if cache.has_final else ()
        self.metrics, self.timing = Journal(path / METRICS), Journal(path / TIMING)
        self.step = 0

    def resume(self) -> int:
        """Go to the newest checkpoint and cut the metrics back to it; return its step, 0 without one."""
        found = checkpoint.latest(self.path)
        if found is not None:
            differs = [key for key, value in self.contract.items() if found.state.get(key) != value]
            if differs:
                key, there, here = differs[0], found.state.get(differs[0]), self.contract[differs[0]]
                raise UsageError(
                    f"{found.path} was made with another {key}: digest {there}, this run has {here}; "
                    "remove it to go on from the checkpoint before"
                )
            self.step = found.step
            device = str(self.device)
            try:
                self.draft.load_state_dict(load_file(found.path / checkpoint.DRAFT, device=device))
                self.optimizer.load_state_dict(load_file(found.path / checkpoint.OPTIMIZER, device=device), found.step)
            except (OSError, RuntimeError, KeyError) as error:  # its bytes were checked: written by another program
                raise CacheError(
                    f"{found.path}: not the weights and moments of this run's draft ({str(error).splitlines()[0]}); "
                    "remove it to go on from the checkpoint before"
                ) from error
        self.metrics.rewind(self.step, found.state.get("metrics", "") if found else "")
        self.timing.rewind(self.step)
        return self.step

    def go(self, display: Display, stop: Stop) -> dict | None:
        """Train to the horizon; return the last evaluation."""
        trainer = Trainer(self.draft, self.optimizer, self.stream, self.train)
        clock = Clock(self.step, self.train.steps)
        self._evaluate(display, stop)  # a checkpoint may have been saved between a step and its evaluation
        batches = self.stream.ahead(self.step, self.train.steps, self.device)
        try:
            for batch in batches:
                before = trainer.at_once
                metrics = trainer.step(batch)
                if trainer.at_once != before:
                    display.say(f"out of memory: from step {batch.step + 1} on {trainer.at_once} blocks at a time")
                self.step = batch.step + 1
                clock.done(batch)
                facts = clock.facts(batches.waited)
                if metrics:
                    self.metrics.write(metrics)
                    self.timing.write({"step": self.step, **facts})
                display.step(self.step, metrics, facts)
                asked = time.perf_counter()
                if self.step % self.train.save_every == 0 or self.step == self.train.steps:
                    self.save()
                self._evaluate(display, stop)
                clock.pause(time.perf_counter() - asked)
        finally:
            batches.close()
        return self._evaluated()

    def save(self) -> None:
        state = self.contract | {"metrics": self.metrics.last}
        checkpoint.save(self.path, self.step, self.draft, self.optimizer.state_dict(), state, self.train.keep)

    def _evaluated(self) -> dict | None:
        """The evaluation of this step, once it is in the metrics."""
        return next((line["eval"] for line in self.metrics.lines if line["step"] == self.step and "eval" in line), None)

    def _evaluate(self, display: Display, stop: Stop) -> None:
        """Measure the exact accept length on held-out samples, when it is time. Leave when told to, saved."""
        due = self.step > 0 and (self.step % self.train.eval_every == 0 or self.step == self.train.steps)
        spans = []
        if due and len(self.probed) and self._evaluated() is None:
            self.draft.eval()
            for first in range(0, len(self.probed), EVALUATED_AT_ONCE):
                if stop.received:
                    break
                spans += accept_spans(self.draft, self.cache, self.probed[first : first + EVALUATED_AT_ONCE])
            self.draft.train()
        if stop.received:
            self.save()
            display.say(
                f"stopped at step {self.step}, saved in {visible(self.path)}; the same command goes on from there"
            )
            stop.leave()
        if spans:
            # Reply by reply, so that runs can be pooled and compared on the same replies: sample, row, tokens, calls.
            walked = [[span.sample, span.start, sum(span.lengths), len(span.lengths)] for span in spans if span.lengths]
            figures = summarise(spans) | {"replies": walked}
            self.metrics.write({"step": self.step, "eval": figures})
            display.say(f"step {self.step}: {said(figures)}")


def said(figures: dict) -> str:
    """Return an evaluation in a few words."""
    if not figures["calls"]:
        return "no accept length: no held-out reply is the target's own"
    named = {visible(name): of["accept_len"] for name, of in figures["domains"].items() if of["calls"] and name}
    domains = f" ({', '.join(f'{name} {length:.2f}' for name, length in named.items())})" if named else ""
    low, high = figures["interval"]
    return f"accept length {figures['accept_len']:.2f} [{low:.2f}, {high:.2f}] on held-out samples{domains}"


def deterministic(device: torch.device) -> None:
    """Ask for kernels that repeat to the bit. CPU kernels do, for a given number of threads."""
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # A GRU would else multiply in TF32, where every other product of a float32 draft does not.
        torch.backends.cudnn.allow_tf32 = False
