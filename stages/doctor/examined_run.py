"""A run as the doctor reads it: its records and logs as far as they are sound, its cache, and figures measured anew.

Nothing is written. The draft is measured by value on held-out samples of its cache, without the target, for a limited
time.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from pipeline.cache import HiddenCache
from pipeline.drafts import Draft, DraftConfig, draft_config, metrics_of
from pipeline.errors import DataError, UsageError
from pipeline.evaluation.accept_length import Span, accept_spans, summarise
from pipeline.evaluation.reports import Report
from pipeline.evaluation.teacher_forced import add_metric_sums
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import CheckpointState, load_config, load_draft
from pipeline.runs.folder import chunk_rule
from pipeline.runs.recipe import Resolved, resolve
from pipeline.runs.recorded_run import RecordedRun
from pipeline.runs.training_data import Split, split_samples, stratified_subset

LOW = 1.5  # accept length below which something has to be found
SAMPLES = 16  # measured at most, of the held-out ones and of those trained on
SECONDS = 20.0  # for each kind of figure; one sample is measured in any case


@dataclass
class Case(RecordedRun):
    """A run. path: its folder. report: an evaluation of it, where that was named. named_cache: in place of the one that
    run.json names."""

    report: Report | None = None
    named_cache: Path | None = None

    @cached_property
    def state(self) -> CheckpointState | None:
        """What the newest checkpoint says of itself, every byte of it checked; None without one."""
        found = checkpoint.latest(self.path)
        return found and found.state

    @cached_property
    def config(self) -> DraftConfig | None:
        """The newest checkpoint's."""
        return load_config(self.path) if self.state else None

    @property
    def timing(self) -> dict | None:
        """The newest line of timing.jsonl."""
        return self.timings[-1] if self.timings else None

    @cached_property
    def cache(self) -> HiddenCache:
        """The cache that the run was trained from. UsageError where it is not there."""
        place = self.named_cache or Path(self.record.cache.path)
        if not place.is_dir():
            raise UsageError(f"the run's cache, {place}, is not there; pass --cache DIR where it lies now")
        return HiddenCache.open(place)

    @cached_property
    def resolved(self) -> Resolved:
        """The recipe, against the cache that is there now."""
        return resolve(self.recipe, self.cache).with_rope_scaling(self.record.rope_scaling)

    @cached_property
    def split(self) -> Split:
        """The samples of its training: where the cache was appended to since, those that were there."""
        draft, share = self.resolved.draft, self.recipe.train.heldout
        needed = (draft.mask_token_id, share, draft.target_layer_ids, draft.needs_final_states)
        whole = split_samples(self.cache, *needed)
        if whole.digest != self.record.split.digest:
            for samples in np.cumsum([segment.samples for segment in self.cache.catalog.plan.manifests])[:-1]:
                with suppress(DataError):  # none to train on among the first
                    before = split_samples(self.cache, *needed, first=int(samples))
                    if before.digest == self.record.split.digest:
                        return before
        return whole

    @cached_property
    def draft(self) -> Draft:
        """The newest checkpoint's, on the CPU in float32."""
        draft = load_draft(self.path, self.cache.head())
        draft.chunk_rule = chunk_rule(self.path)
        return draft

    # Measured here

    @cached_property
    def heldout(self) -> list[int]:
        """Some held-out samples, spread over domains."""
        return stratified_subset(self.cache, self.split.heldout, SAMPLES).tolist()

    @cached_property
    def spans(self) -> list[Span]:
        """Decoding replayed on the held-out samples; none where the cache holds no final states."""
        return self._spans(self.draft, self.heldout) if self.cache.has_final else []

    def _spans(self, draft: Draft, samples: Iterable[int]) -> list[Span]:
        return [
            span
            for spans in in_time(samples, lambda index: accept_spans(draft, self.cache, [index])[0])
            for span in spans
        ]

    @cached_property
    def accepted(self) -> dict | None:
        """`Figures` of the held-out samples; None where no reply could be followed."""
        figures = summarise(self.spans)
        return figures if figures["calls"] else None

    @cached_property
    def accept_len(self) -> float | None:
        """The exact accept length: measured here, else as the run or the report has it."""
        if self.accepted:
            return self.accepted["accept_len"]
        if self.evaluations:
            return self.evaluations[-1][1].accept_len
        return self.report.overall.accept_len if self.report and self.report.overall.calls else None

    @property
    def is_low(self) -> bool:
        """Whether drafting gains so little that there has to be a cause, or it is not known what it gains."""
        reported = self.report.overall.accept_len if self.report and self.report.overall.calls else None
        known = [length for length in (self.accept_len, reported) if length is not None]
        return min(known, default=0.0) < LOW

    def accept_len_with(self, **changes) -> float | None:
        """The accept length on the same samples of the same weights under another config; None where that cannot be."""
        try:
            config = draft_config(**self.config.model_dump() | changes)
            other = type(self.draft)(config, self.cache.head()).eval()
            other.chunk_rule = self.draft.chunk_rule
            other.load_state_dict(self.draft.state_dict())
        except (UsageError, RuntimeError):
            return None
        figures = summarise(self._spans(other, self.heldout[:8]))
        return figures["accept_len"] if figures["calls"] else None

    @cached_property
    def forced_heldout(self) -> dict:
        """Teacher-forced figures of the held-out samples, as a logged step has them."""
        return self._forced(self.heldout)

    @cached_property
    def forced_train(self) -> dict:
        """The same of samples trained on."""
        return self._forced(stratified_subset(self.cache, self.split.train, SAMPLES).tolist())

    def _forced(self, samples: Sequence[int]) -> dict:
        if not samples or (self.draft.config.needs_final_states and not self.cache.has_final):
            return {}
        sums: dict = {}
        in_time(samples, lambda index: add_metric_sums(sums, self.draft, self.cache, [index]))
        return metrics_of(sums, {}, {})

    @cached_property
    def greedy_share(self) -> tuple[int, int]:
        """Of the supervised tokens of samples trained on: how many are the target's own greedy choice, of how many."""
        return greedy_share(self.cache, stratified_subset(self.cache, self.split.train, SAMPLES).tolist())


def in_time(items: Iterable, do) -> list:
    """Return what `do` returns of each item, until the time is over."""
    until, done = time.monotonic() + SECONDS, []
    for item in items:
        done.append(do(item))
        if time.monotonic() > until:
            break
    return done


@torch.no_grad()
def greedy_share(cache: HiddenCache, samples: Iterable[int]) -> tuple[int, int]:
    """Return how many supervised tokens of samples are what the head says of the `final` state before, of how many."""
    if not cache.has_final:
        return 0, 0
    head, counts = cache.head(), np.zeros(2, int)

    def add(index: int) -> None:
        sample = cache.read(index, layers=cache.layers[:1], final=True)
        rows_R, final_RD = sample.final_rows, sample.final
        next_R = rows_R + 1
        kept_R = next_R < len(sample.ids)
        kept_R[kept_R.clone()] &= sample.mask[next_R[kept_R]]
        chosen_R = head.raw_logits(final_RD[kept_R]).argmax(-1)
        counts[:] += int((chosen_R == sample.ids[next_R[kept_R]]).sum()), int(kept_R.sum())

    in_time(samples, add)
    return int(counts[0]), int(counts[1])
