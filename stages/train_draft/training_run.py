"""A training in progress: from the newest checkpoint to the last step, with logs, checkpoints and evaluations.

A signal saves first. On several ranks the same in step on all, of which the first writes and prints (see ranks.py).
"""

import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from pipeline.cache import HiddenCache
from pipeline.drafts import Draft, fused
from pipeline.errors import CacheError, RoomError, UsageError, first_line, refuse_limit
from pipeline.evaluation.accept_length import Span, accept_spans, replies_of, summarise
from pipeline.runs import checkpoint
from pipeline.runs.folder import (
    Evaluation,
    Result,
    write_result,
)
from pipeline.runs.recipe import Resolved
from pipeline.runs.run_logs import METRICS, TIMING
from pipeline.runs.training_data import Split, stratified_subset
from pipeline.tensors import refuse_out_of_memory
from pipeline.visible_text import visible
from stages.train_draft.batches import Batch, Sampler
from stages.train_draft.loader import BatchLoader, Prefetcher
from stages.train_draft.logs import (
    Display,
    MetricsLog,
    Throughput,
    evaluation_text,
)
from stages.train_draft.memory import MEANS, Fit
from stages.train_draft.optimizers import load_state_tensors, make_optimizer, state_tensors
from stages.train_draft.ranks import Ranks
from stages.train_draft.sharding import shard, whole_draft, whole_tensors
from stages.train_draft.step import Trainer
from stages.train_draft.stop import raise_signal
from stages.train_draft.tracking import Tracking
from stages.train_draft.training_time import time_to_tell

EVAL_BATCH = 8  # samples; a signal is noticed between two such batches
EVAL_REMEDY = "the step is saved: go on with the same command on a larger device"


def digests(store: HiddenCache, split: Split, resolved: Resolved) -> dict[str, str]:
    """Return the digests of what a run must be to go on from a checkpoint."""
    return {"recipe": resolved.recipe.digest(), "cache": store.digest, "split": split.digest}


class TrainingRun:
    """A run in progress: its folder, draft, optimiser and batches, after `step` steps.

    fit: what of a step the draft's device has memory for; None: all of it.
    """

    def __init__(
        self,
        path: Path,
        cache: HiddenCache,
        split: Split,
        resolved: Resolved,
        draft: Draft,
        ranks: Ranks | None = None,
        fit: Fit | None = None,
    ):
        self.kernels = fused.kernels  # which several runs in one process may not have in common
        self.parameters = sum(weight.numel() for weight in draft.parameters())
        self.path, self.cache, self.ranks = path, cache, ranks or Ranks(draft.device)
        self.train = resolved.recipe.train
        self.digests = digests(cache, split, resolved)
        self.device = draft.device
        self.draft = draft = shard(draft, self.ranks) if self.ranks.sharded else draft
        self.uses = fit or Fit(self.train.cell_anchors)
        self.optimizer = make_optimizer(self.train.optimizer, draft, self.uses.moments_on_host)
        sampler = Sampler(cache, split, resolved.draft, self.train)
        self.loader = BatchLoader(sampler, self.device.type != "cpu", self.ranks.rank, self.ranks.size)
        self.eval_samples = stratified_subset(cache, split.heldout, self.train.eval_samples) if cache.has_final else ()
        log = MetricsLog if self.ranks.first else UnwrittenLog
        self.metrics, self.timing_log = log(path / METRICS), log(path / TIMING)
        self.trainer = Trainer(draft, self.optimizer, self.loader, self.ranks)
        if self.uses.at_once < self.train.cell_anchors:
            self.trainer.blocks_per_pass = max(1, self.uses.at_once)  # one is tried where none seems to fit
        self._use(self.uses)
        self.step = 0
        self.recipe = resolved.recipe
        self.tracking: Tracking | None = None  # from `begin` on

    def _use(self, fit: Fit) -> None:
        """Do from now on what a step's memory asks for, beside parts."""
        if fit.moments_on_host != self.optimizer.on_host and self.train.optimizer == "adamw":
            self.trainer.optimizer = self.optimizer = make_optimizer("adamw", self.draft, fit.moments_on_host)
        self.draft.recomputes_layers = fit.recomputes_layers
        if fit.embedding_on_host:
            self.draft.target = self.draft.target.with_embedding_on_host()
        self.uses = fit

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
            self._use(self.uses.over([self._recorded(found.state)]))
            try:
                checkpoint.load_tensors(found.path / checkpoint.DRAFT, self.draft.state_dict())
                moments = state_tensors(self.optimizer)
                checkpoint.load_tensors(found.path / checkpoint.OPTIMIZER, moments)
                load_state_tensors(self.optimizer, moments, found.step)
            except (OSError, RuntimeError, KeyError) as error:  # its bytes were checked: written by another program
                refuse_limit(found.path, error)
                raise CacheError(
                    f"{found.path}: not the weights and moments of this run's draft ({first_line(error, None)}); "
                    "remove it to go on from the checkpoint before"
                ) from error
        self.metrics.truncate(self.step, found.state.metrics if found else "")
        self.timing_log.truncate(self.step)
        return self.step

    def _recorded(self, state: checkpoint.CheckpointState) -> Fit:
        """Return what a checkpoint's run did for want of memory, which decides the last digits of what follows."""
        means = {name: getattr(state, name) for name in MEANS}
        if self.ranks.sharded:
            means["moments_on_host"] = False
        return Fit(self.uses.at_once, **means)

    def idle_ranks(self) -> str | None:
        """Return in words that the next batch has fewer cells than there are ranks; None where it has as many."""
        if self.ranks.size == 1:
            return None
        cells = len(self.loader.sampler.batch(min(self.step, self.train.steps - 1)).cells)
        if cells >= self.ranks.size:
            return None
        return (
            f"the next batch has {cells} {'cell' if cells == 1 else 'cells'} for {self.ranks.size} ranks, and a rank "
            "without one waits: start fewer, or raise train.batch or train.cells, which makes another run"
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

    def announce_time(self, display: Display) -> None:
        """Say how long the run will take, where that is long; on a CPU, whose user may have meant the defaults of a
        GPU."""
        left = self.train.steps - self.step
        if self.device.type != "cpu" or self.ranks.size > 1 or not left:
            return
        told = time_to_tell(self.trainer, self.loader.sampler.batch(self.step), left)
        if told:
            display.print_line(told)

    def begin(self, display: Display) -> None:
        """Prepare for steps from here on; evaluate where a checkpoint was saved and its evaluation was not."""
        self.throughput = Throughput(self.step, self.train.steps, self.device)
        self.draft.clock = self.throughput.clock
        self.blocks_noted = self.trainer.blocks_per_pass
        if self.tracking is None:
            self.tracking = self._tracking(display)
        began = time.perf_counter()
        self._evaluate(display)
        self.throughput.excluded += time.perf_counter() - began

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
            self._record(self.metrics, metrics)
            self._record(self.timing_log, {"step": self.step, **timing, "time": self.throughput.time_shares(waited)})
        display.step(self.step, metrics, timing)
        began = time.perf_counter()
        if self.step % self.train.save_every == 0 or self.step == self.train.steps:
            self.save()
        self._evaluate(display)
        self.throughput.excluded += time.perf_counter() - began

    def _tracking(self, display: Display) -> Tracking:
        """Return the trackers of the first rank, told all steps so far; those of another track nothing."""
        names = self.train.track if self.ranks.first else ()
        return Tracking(self.path, names, self.recipe.model_dump(mode="json", exclude_none=True), display.print_line)

    def _record(self, log: MetricsLog, record: dict) -> None:
        """Append a line to a log, and tell the trackers."""
        log.write(record)
        self.tracking.add(record)

    def close(self) -> None:
        """End the trackers, with all steps that are in the logs."""
        if self.tracking is not None:
            self.tracking.close()

    def finish(self) -> Result:
        """Write the result of a run that has taken its last step, and return it."""
        figures = self.evaluated()
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
            facts |= {name: True for name in MEANS if getattr(self.uses, name)}
            checkpoint.save(self.path, self.step, self.draft, moments, facts, self.train.keep, weights)

    def evaluated(self) -> Evaluation | None:
        """Return the evaluation of this step from the metrics log, None when there is none yet."""
        return next((line.eval for line in self.metrics.lines if line.step == self.step and line.eval), None)

    def _evaluate(self, display: Display) -> None:
        """Measure the exact accept length on held-out samples when one is due. On a signal: save and exit."""
        due = self.step > 0 and (self.step % self.train.eval_every == 0 or self.step == self.train.steps)
        spans = []
        if due and len(self.eval_samples) and self.ranks.of_first(self.evaluated() is None):
            spans = self._measure_all()
        if (number := self.ranks.signal) is not None:
            self.save()
            display.print_line(
                f"stopped at step {self.step}, saved in {visible(self.path)}; the same command goes on from there"
            )
            self.ranks.wait()  # torchrun ends all ranks once one has ended
            raise_signal(number)
        if spans and self.ranks.first:
            self._record(self.metrics, {"step": self.step, "eval": summarise(spans) | {"replies": replies_of(spans)}})
            display.print_line(f"step {self.step}: {evaluation_text(self.evaluated())}")

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
