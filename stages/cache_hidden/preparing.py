"""From some rows to samples: what a worker of the pool does, and what planning does where there is no pool.

Rows are rendered and tokenised together; where that fails, each alone, so that a template's failure costs its row only.

    T tokens of a sample
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.cache.samples import PlannedSample, sample_id
from pipeline.intake import Tally, Unusable, check_ids, check_mask, trim
from stages.cache_hidden.conversation import Conversation, Fault
from stages.cache_hidden.corpus import chunk_rows
from stages.cache_hidden.corpus_files import Chunk
from stages.cache_hidden.outcome import Job, Outcome, samples_of
from stages.cache_hidden.template import ChatTemplate

LETTERS_OF_TOKEN = 64  # a text is cut behind so many for each token that is kept; the longest tokens are rarer


class Preparer:
    """Prepares rows as a job says."""

    def __init__(self, job: Job, template: ChatTemplate | None = None):
        self.job, self.template = job, template or ChatTemplate(job.folder)

    def outcomes(self, work: Chunk | Sequence[Conversation | Fault], only: int | None = None) -> list[Outcome]:
        """Return what the rows of a chunk, or of a list, come to, in order; `only` names one of them."""
        if isinstance(work, Chunk) and only is not None:
            work = work.alone(only)
        rows = list(chunk_rows(work, self.job.roles)) if isinstance(work, Chunk) else work
        if only is not None and not isinstance(work, Chunk):
            rows = [work[only]]
        usable = [row for row in rows if isinstance(row, Conversation)]
        prepared = iter(self._prepared(usable))
        return [self._outcome(row, next(prepared) if isinstance(row, Conversation) else None) for row in rows]

    def _prepared(self, rows: list[Conversation]) -> list:
        try:
            return prepare(self.template, rows, self.job.max_length) if rows else []
        except Exception:  # a template is a stranger's program, and may raise anything
            return [self._alone(row) for row in rows]

    def _alone(self, row: Conversation):
        try:
            return prepare(self.template, [row], self.job.max_length)[0]
        except MemoryError:
            return Unusable("too large", f"takes more than {self.job.row_bytes / 2**30:.1f} GiB to prepare")
        except Exception as error:
            said = str(error).strip().split("\n")[0][:120]
            return Unusable("template error", f"the chat template fails on it ({type(error).__name__}: {said})")

    def _outcome(self, row: Conversation | Fault, prepared) -> Outcome:
        if isinstance(row, Fault):
            return Outcome(row.file, row.line, fault=(row.reason, row.detail))
        if isinstance(prepared, Unusable):
            return Outcome(row.file, row.line, fault=(prepared.reason, prepared.detail), unknown=row.unknown)
        made, rewritten = prepared
        kept, notes, truncated, short = [], [], 0, 0
        try:
            for ids, mask in made:
                check_mask(mask)
                check_ids(ids, self.job.vocab_size)
                truncated += len(ids) > self.job.max_length
                cut = trim(ids[: self.job.max_length], mask[: self.job.max_length])
                if cut is None:
                    short += 1
                    continue
                packed = np.packbits(cut[1], bitorder="little").tobytes()
                kept.append((cut[0].astype("<i4", copy=False).tobytes(), packed, sample_id(*cut)))
        except Unusable as fault:
            return Outcome(row.file, row.line, fault=(fault.reason, fault.detail), unknown=row.unknown)
        if short:
            notes.append(("too short", f"no two supervised tokens in a row within {self.job.max_length}"))
        if rewritten:
            notes.append(("rewritten turns", f"{rewritten} turns not supervised"))
        place = (row.file, row.line, row.domain, row.split)
        return Outcome(*place, tuple(kept), None, tuple(notes), truncated, short, rewritten, row.unknown)


def prepare(
    template: ChatTemplate, rows: list[Conversation], max_length: int
) -> list[tuple[list[tuple[np.ndarray, np.ndarray]], int] | Unusable]:
    """Return each row's samples, (ids int32 [T], mask bool [T]), and how many of its turns are left out; or why not.

    The one place that asks the chat template.
    """
    rendered = [_rendered(template, row) for row in rows]
    texts = [_cut(one, max_length) for one in rendered if not isinstance(one, Unusable | None)]
    encoded = iter(template.encode(texts) if texts else [])
    made: list = []
    for row, one in zip(rows, rendered, strict=True):
        if isinstance(one, Unusable):
            made.append(one)
        elif one is None:
            made.append(([(np.array(row.tokens[0], np.int32), np.array(row.tokens[1], bool))], 0))
        else:
            made.append(([next(encoded)], one.rewritten))
    return made


def _rendered(template: ChatTemplate, row: Conversation):
    try:
        return template.render(row.messages, row.tools) if row.tokens is None else None
    except Unusable as fault:
        return fault


def _cut(rendered, max_length: int):
    """Return a text without what lies far behind `max_length` tokens, which nobody should have to tokenise."""
    most = LETTERS_OF_TOKEN * (max_length + 1)
    if len(rendered.text) <= most:
        return rendered
    spans = [(start, min(stop, most)) for start, stop in rendered.spans if start < most]
    return type(rendered)(rendered.text[:most], spans, rendered.rewritten)


def planned(
    rows: Iterable[Conversation | Fault], template: ChatTemplate, max_length: int, tally: Tally, vocab_size: int
) -> Iterator[PlannedSample]:
    """Yield the samples of rows, in order, in this process; whatever is left out goes into the tally."""
    preparer = Preparer(Job(Path(), max_length, vocab_size), template)
    for row in rows:
        tally.rows += 1
        for outcome in preparer.outcomes([row]):
            yield from samples_of(outcome, tally)
