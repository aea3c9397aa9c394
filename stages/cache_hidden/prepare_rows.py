"""Turns corpus rows into samples: rendered, tokenised, masked, truncated. Runs in the pool's workers.

Rows are rendered and tokenised together; where that fails, each alone, so that a template's failure costs its row only.
Chat templates are untrusted programs and a corpus is untrusted data, so a worker has limits of CPU time and memory; the
system ends one that takes more, even inside one call of C.
The planner, too, imports this module, for the job and the outcomes; only a `RowPreparer` imports transformers.

    T tokens of a sample
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.cache.samples import PlannedSample, sample_id
from pipeline.corpus.file_formats import Chunk
from pipeline.corpus.record_formats import Conversation, RejectedRow
from pipeline.corpus.rejections import Tally, Unusable, check_ids, check_mask, trim
from pipeline.corpus.sources import chunk_rows
from pipeline.errors import first_line
from pipeline.target.files import TEMPLATE_DATE

ROW_SECONDS = 10.0  # of CPU, for the rows that a worker is sent at once: a batch, or one row on its own
ROW_BYTES = 2 << 30  # of address space, beyond what a worker started with, for these rows
TEMPLATE_SECONDS = 120.0  # of CPU, to read a tokenizer and compile a chat template, constants and all


@dataclass(frozen=True)
class Job:
    """The settings by which workers turn rows into samples: target folder, tokens a sample, vocabulary size, roles.

    template_kwargs, template_date: the chat template's arguments, and the date it gets as today's.
    model: the target's name in errors; its config is checked before any row. None: no check.
    row_seconds, row_bytes: limits for the rows that a worker is sent at once.
    """

    folder: Path
    max_length: int
    vocab_size: int
    roles: dict[str, str] | None = None
    template_kwargs: dict | None = None
    template_date: str = TEMPLATE_DATE
    row_seconds: float = ROW_SECONDS
    row_bytes: int = ROW_BYTES
    model: str | None = None


class RowOutcome(NamedTuple):
    """The outcome of one row: its samples, or why it was rejected.

    samples: (ids as int32, mask as packed bits, sample id), each in bytes; kinds: of their turns. fault, notes,
    unproven: (reason, detail); only `fault` rejects the row. turns: how many are supervised, `last_turns` of them in
    the first sample. regenerated: the row's record of which model wrote its replies, as JSON, without `stops`.
    """

    file: str
    line: int
    domain: str = ""
    split: str = ""
    samples: tuple[tuple[bytes, bytes, bytes], ...] = ()
    rejected: tuple[str, str] | None = None
    notes: tuple[tuple[str, str], ...] = ()
    truncated: int = 0
    too_short: int = 0
    turns: int = 0
    last_turns: int = 0
    unproven: tuple[tuple[str, str], ...] = ()
    kinds: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    regenerated: str = ""


class RowPreparer:
    """Turns corpus rows into samples with a job's settings."""

    def __init__(self, job: Job):
        from pipeline.target.chat_template import ChatTemplate
        from stages.cache_hidden.tokenise import SampleMaker

        self.job = job
        self.maker = SampleMaker(ChatTemplate(job.folder, job.template_kwargs, job.template_date))

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
            cause = first_line(error, 120)
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


def samples_of(outcome: RowOutcome, tally: Tally) -> Iterator[PlannedSample]:
    """Yield the samples of a row, and count in the tally what was left out of it; the row itself is counted before."""
    where = f"{outcome.file}:{outcome.line}"
    for key in outcome.unknown:
        tally.add_unknown_key(key, where)
    if outcome.rejected:
        reason, detail = outcome.rejected
        tally.reject(reason, f"{where}: {detail}")
        return
    for reason, detail in outcome.notes:
        tally.add_example(reason, f"{where}: {detail}")
    tally.truncated += outcome.truncated
    tally.too_short += outcome.too_short
    unproven = [(reason, f"{where}: {detail}") for reason, detail in outcome.unproven]
    tally.count_turns(outcome.turns, outcome.last_turns, unproven)
    tally.count_turn_kinds(outcome.kinds, outcome.file, outcome.line)
    for data, bits, name in outcome.samples:
        ids = np.frombuffer(data, "<i4")
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=len(ids), bitorder="little").view(bool)
        yield PlannedSample(ids, mask, outcome.domain, outcome.split, outcome.file, outcome.line, name)
