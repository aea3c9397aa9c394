"""Turns corpus rows into samples: rendered, tokenised, masked, truncated. Runs in the pool's workers.

Rows are rendered and tokenised together; where that fails, each alone, so that a template's failure costs its row only.

    T tokens of a sample
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.cache.samples import PlannedSample, sample_id
from pipeline.corpus.file_formats import Chunk
from pipeline.corpus.record_formats import Conversation, RejectedRow
from pipeline.corpus.rejections import Tally, Unusable, check_ids, check_mask, trim
from pipeline.corpus.sources import chunk_rows
from pipeline.target.chat_template import ChatTemplate
from stages.cache_hidden.row_outcome import Job, RowOutcome, samples_of
from stages.cache_hidden.tokenise import SampleMaker


class RowPreparer:
    """Turns corpus rows into samples with a job's settings."""

    def __init__(self, job: Job, template: ChatTemplate | None = None):
        self.job = job
        self.maker = SampleMaker(template or ChatTemplate(job.folder, job.template_kwargs, job.template_date))

    def outcomes(self, work: Chunk | Sequence[Conversation | RejectedRow], only: int | None = None) -> list[RowOutcome]:
        """Return the outcomes of the rows of a chunk or list, in order; `only`: of the row with this number alone."""
        if isinstance(work, Chunk) and only is not None:
            work = work.single_row(only)
        rows = list(chunk_rows(work, self.job.roles)) if isinstance(work, Chunk) else work
        if only is not None and not isinstance(work, Chunk):
            rows = [work[only]]
        usable = [row for row in rows if isinstance(row, Conversation)]
        prepared = iter(self._prepared(usable))
        return [self._outcome(row, next(prepared) if isinstance(row, Conversation) else None) for row in rows]

    def _prepared(self, rows: list[Conversation]) -> list:
        try:
            return self.maker.prepare(rows, self.job.max_length) if rows else []
        except Exception:  # a template is a stranger's program, and may raise anything
            return [self._alone(row) for row in rows]

    def _alone(self, row: Conversation):
        try:
            return self.maker.prepare([row], self.job.max_length)[0]
        except MemoryError:
            return Unusable("too large", f"takes more than {self.job.row_bytes / 2**30:.1f} GiB to prepare")
        except Exception as error:
            cause = str(error).strip().split("\n")[0][:120]
            return Unusable("template error", f"the chat template fails on it ({type(error).__name__}: {cause})")

    def _outcome(self, row: Conversation | RejectedRow, prepared) -> RowOutcome:
        if isinstance(row, RejectedRow):
            return RowOutcome(row.file, row.line, rejected=(row.reason, row.detail))
        if isinstance(prepared, Unusable):
            return RowOutcome(row.file, row.line, rejected=(prepared.reason, prepared.detail), unknown=row.unknown)
        packed, kinds, notes, truncated, too_short = [], [], [], 0, 0
        try:
            for sample in prepared.samples:
                if len(sample.ids) <= self.job.max_length:  # a truncated sample may have lost its reply
                    check_mask(sample.mask)
                check_ids(sample.ids, self.job.vocab_size)
                truncated += len(sample.ids) > self.job.max_length
                cut = trim(sample.ids[: self.job.max_length], sample.mask[: self.job.max_length])
                if cut is None:
                    too_short += 1
                    continue
                mask_bits = np.packbits(cut[1], bitorder="little").tobytes()
                packed.append((cut[0].astype("<i4", copy=False).tobytes(), mask_bits, sample_id(*cut)))
                kinds += sample.kinds
        except Unusable as rejected:
            return RowOutcome(row.file, row.line, rejected=(rejected.reason, rejected.detail), unknown=row.unknown)
        if too_short:
            notes.append(("too short", f"no two supervised tokens in a row within {self.job.max_length}"))
        return RowOutcome(
            *(row.file, row.line, row.domain, row.split),
            samples=tuple(packed),
            notes=tuple(notes),
            truncated=truncated,
            too_short=too_short,
            turns=prepared.turns,
            last_turns=prepared.last_turns,
            unproven=tuple(prepared.unproven),
            kinds=tuple(kinds),
            unknown=row.unknown,
            regenerated=_record(row),
        )


def _record(row: Conversation) -> str:
    record = {key: value for key, value in (row.regenerated or {}).items() if key != "stops"}
    return json.dumps(record, sort_keys=True) if row.regenerated else ""


def prepare_rows(
    rows: Iterable[Conversation | RejectedRow], template: ChatTemplate, max_length: int, tally: Tally, vocab_size: int
) -> Iterator[PlannedSample]:
    """Yield the samples of rows, in order, without worker processes; whatever is left out goes into the tally."""
    preparer = RowPreparer(Job(Path(), max_length, vocab_size), template)
    for row in rows:
        tally.rows += 1
        for outcome in preparer.outcomes([row]):
            yield from samples_of(outcome, tally)
