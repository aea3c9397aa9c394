"""From a corpus to the plan of a cache: every sample tokenised, masked, cut and counted, before the target runs.

What is left out is counted by reason and shown by file and line. A corpus of which more than a tenth cannot be used is
refused: it is another format than we think, and what is left would be a guess.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.cache.disk import free_bytes
from pipeline.cache.manifest import create_identity
from pipeline.cache.plan import Plan, write_segment
from pipeline.cache.samples import PlannedSample, ShardPlan
from pipeline.intake import Tally, Unusable, check_ids, check_mask, trim
from pipeline.target import check_known
from pipeline.target_files import text_config
from stages.cache_hidden.budget import Chooser
from stages.cache_hidden.corpus import (
    Conversation,
    Fault,
    corpus_files,
    file_sources,
    hub_dataset,
    read_files,
)
from stages.cache_hidden.settings import Settings
from stages.cache_hidden.template import ChatTemplate

ENCODED_AT_ONCE = 128  # conversations
FREE_SHARE = 0.25  # of the disk, that a corpus nobody named may take


def make_plan(
    corpus: str,
    out: Path,
    settings: Settings,
    max_samples: int | None,
    *,
    spare_disk: bool = False,
    budget: Chooser | None = None,
) -> Plan:
    """Tokenise the corpus and write the plan; what the cache is, cache.json, comes when the corpus has proven usable.

    At most `max_samples` usable samples (None: all) and, with `spare_disk`, no more than a share of the free disk; of
    these, what `budget` chooses, as a plan afresh.
    Raises DataError for a corpus that is not, UsageError when it or the target is not there.
    """
    check_known(settings.model, settings.folder)
    files = corpus_files(corpus)
    if files:
        rows, sources = read_files(corpus, files), file_sources(corpus, files)
    else:
        rows, source = hub_dataset(corpus)
        sources = [source]
    max_bytes = int(FREE_SHARE * free_bytes(out)) if spare_disk else None
    template, tally, notes = ChatTemplate(settings.folder), Tally(), {"max_samples": max_samples}
    vocab_size = text_config(settings.folder)["vocab_size"]

    def checked() -> Iterator[PlannedSample]:
        usable, room = 0, max_bytes
        for sample in islice(planned(rows, template, settings.max_length, tally, vocab_size), max_samples):
            if room is not None:
                room -= len(sample.ids) * settings.row_bytes
                if room < 0:
                    break
            usable += 1
            yield sample
        tally.check(corpus, usable)
        notes.update(tally.as_notes())
        if budget is None:
            create_identity(out, settings.identity)

    def chosen(parts: list[ShardPlan]) -> np.ndarray:
        kept_n, notes["budget"] = budget(parts)
        create_identity(out, settings.identity)
        return kept_n

    choose = chosen if budget else None
    afresh = budget is not None
    return write_segment(
        out, checked(), row_bytes=settings.row_bytes, sources=sources, notes=notes, choose=choose, afresh=afresh
    )


def planned(
    rows: Iterable[Conversation | Fault], template: ChatTemplate, max_length: int, tally: Tally, vocab_size: int
) -> Iterator[PlannedSample]:
    """Yield the samples of the rows, in order; whatever is left out goes into the tally."""
    waiting = []
    for row in rows:
        tally.rows += 1
        if isinstance(row, Fault):
            tally.fault(row.reason, str(row))
            continue
        try:
            rendered = template.render(row.messages, row.tools)
        except Unusable as fault:
            tally.fault(fault.reason, f"{row.file}:{row.line}: {fault}")
            continue
        if rendered.rewritten:
            tally.rewritten += rendered.rewritten
            tally.show("rewritten turns", f"{row.file}:{row.line}: {rendered.rewritten} turns not supervised")
        waiting.append((row, rendered))
        if len(waiting) == ENCODED_AT_ONCE:
            yield from _samples(waiting, template, max_length, tally, vocab_size)
            waiting = []
    yield from _samples(waiting, template, max_length, tally, vocab_size)


def _samples(
    waiting: list, template: ChatTemplate, max_length: int, tally: Tally, vocab_size: int
) -> Iterator[PlannedSample]:
    encoded = template.encode([rendered for _, rendered in waiting]) if waiting else []
    for (row, _), (ids, mask) in zip(waiting, encoded, strict=True):
        where = f"{row.file}:{row.line}"
        try:
            check_mask(mask)
            check_ids(ids, vocab_size)
        except Unusable as fault:
            tally.fault(fault.reason, f"{where}: {fault}")
            continue
        tally.truncated += len(ids) > max_length
        cut = trim(ids[:max_length], mask[:max_length])
        if cut is None:
            tally.short += 1
            tally.show("too short", f"{where}: no two supervised tokens in a row within {max_length}")
            continue
        yield PlannedSample(*cut, domain=row.domain, split=row.split, file=row.file, line=row.line)
