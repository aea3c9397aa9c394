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
from pipeline.chat_template import ChatTemplate
from pipeline.intake import Tally, Unusable, check_ids, check_mask, trim
from pipeline.target_files import text_config
from stages.cache_hidden.budget import Chooser
from stages.cache_hidden.corpus import (
    Conversation,
    Fault,
    corpus_files,
    file_sources,
    hub_dataset,
    read_files,
    source_roles,
    with_roles,
)
from stages.cache_hidden.settings import Settings
from stages.cache_hidden.template import Prepared, Preparer
from stages.cache_hidden.turn_choice import choose_turns, kept_parts

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
    roles: str | None = None,
) -> Plan:
    """Tokenise the corpus and write the plan; what the cache is, cache.json, comes when the corpus has proven usable.

    At most `max_samples` usable conversations (None: all) and, with `spare_disk`, no more than a share of the free
    disk; of these, what `budget` chooses, as a plan afresh.
    Raises DataError for a corpus that is not, UsageError when it or the target is not there.
    """
    files = corpus_files(corpus)
    known = with_roles(roles)
    if files:
        rows, sources = read_files(corpus, files, known), file_sources(corpus, files, roles)
    else:
        rows, source = hub_dataset(corpus, known)
        sources = [{**source, **source_roles(roles)}]
    max_bytes = int(FREE_SHARE * free_bytes(out)) if spare_disk else None
    rules = settings.identity["samples"]
    template = ChatTemplate(settings.folder, rules["template_kwargs"], rules["template_date"])
    tally, notes = Tally(), {"max_samples": max_samples}
    vocab_size = text_config(settings.folder)["vocab_size"]

    def checked() -> Iterator[PlannedSample]:
        usable, room, row = 0, max_bytes, None
        for sample in planned(rows, template, settings.max_length, tally, vocab_size):
            if room is not None:
                room -= len(sample.ids) * settings.row_bytes
                if room < 0:
                    break
            if row != (row := (sample.file, sample.line)):
                if usable == max_samples:
                    break
                usable += 1
            yield sample
        tally.check(corpus, usable)

    def choose(parts: list[ShardPlan]) -> np.ndarray:
        kept_n, turns = choose_turns(parts, rules["turns"])
        notes.update(tally.as_notes(), turns=turns)
        if budget:
            of_kept_n, notes["budget"] = budget(kept_parts(parts, kept_n))
            kept_n[kept_n] = of_kept_n
        create_identity(out, {**settings.identity, "samples": {**rules, "turns": turns["chosen"]}})
        return kept_n

    afresh = budget is not None
    return write_segment(
        out, checked(), row_bytes=settings.row_bytes, sources=sources, notes=notes, choose=choose, afresh=afresh
    )


def planned(
    rows: Iterable[Conversation | Fault], template: ChatTemplate, max_length: int, tally: Tally, vocab_size: int
) -> Iterator[PlannedSample]:
    """Yield the samples of the rows, each row's last turn first; what is left out goes into the tally."""
    preparer, rows = Preparer(template), iter(rows)
    while batch := list(islice(rows, ENCODED_AT_ONCE)):
        conversations = [row for row in batch if isinstance(row, Conversation)]
        prepared = iter(preparer.prepare(conversations, max_length))
        for row in batch:
            tally.rows += 1
            made = next(prepared) if isinstance(row, Conversation) else row
            if isinstance(made, Prepared):
                yield from _checked(row, made, max_length, tally, vocab_size)
            else:
                where = "" if isinstance(made, Fault) else f"{row.file}:{row.line}: "
                tally.fault(made.reason, f"{where}{made}")


def _checked(
    row: Conversation, made: Prepared, max_length: int, tally: Tally, vocab_size: int
) -> Iterator[PlannedSample]:
    """Yield the samples of a row as they are planned."""
    where = f"{row.file}:{row.line}"
    tally.count_turns(made.turns, made.last, [(reason, f"{where}: {detail}") for reason, detail in made.unproven])
    for sample in made.samples:
        try:
            if len(sample.ids) <= max_length:  # what is cut may have lost its reply
                check_mask(sample.mask)
            check_ids(sample.ids, vocab_size)
        except Unusable as fault:
            tally.fault(fault.reason, f"{where}: {fault}")
            return
        tally.truncated += len(sample.ids) > max_length
        cut = trim(sample.ids[:max_length], sample.mask[:max_length])
        if cut is None:
            tally.short += 1
            tally.show("too short", f"{where}: no two supervised tokens in a row within {max_length}")
            continue
        tally.count_kinds(sample.kinds, row.file, row.line)
        yield PlannedSample(*cut, domain=row.domain, split=row.split, file=row.file, line=row.line)
