"""From a corpus to the plan of a cache: every sample tokenised, masked, cut and counted, before the target runs.

What is left out is counted by reason and shown by file and line. A corpus of which more than a tenth cannot be used is
refused: it is another format than we think, and what is left would be a guess.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.cache.atomic import free_bytes
from pipeline.cache.manifest import create_identity
from pipeline.cache.plan import Plan, write_segment
from pipeline.cache.samples import PlannedSample, ShardPlan
from pipeline.corpus.formats import CHUNK_ROWS
from pipeline.corpus.regenerated import check
from pipeline.corpus.sources import (
    Conversation,
    Fault,
    corpus_chunks,
    corpus_files,
    file_sources,
    hub_dataset,
    say_passed_over,
    source_roles,
    with_roles,
)
from pipeline.corpus.tally import Tally, say_unknown_keys
from pipeline.target.files import is_quantised, text_config
from stages.cache_hidden.budget import Chooser
from stages.cache_hidden.row_outcome import Job, Outcome, samples_of
from stages.cache_hidden.settings import Settings
from stages.cache_hidden.turn_samples import choose_turns, kept_parts
from stages.cache_hidden.worker_pool import Pool

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
    files, known = corpus_files(corpus), with_roles(roles)
    if is_quantised(settings.folder):
        from pipeline.target.config import load_config
        from pipeline.target.quantised import check_quantised  # brings torch

        check_quantised(settings.folder, load_config(settings.folder, settings.model))
    if files:
        work, sources = corpus_chunks(corpus, files), file_sources(corpus, files, roles)
        say_passed_over(corpus)
    else:
        rows, source = hub_dataset(corpus, known)
        work, sources = _batches(rows), [{**source, **source_roles(roles)}]
    max_bytes = int(FREE_SHARE * free_bytes(out)) if spare_disk else None
    tally, notes, rules = Tally(), {"max_samples": max_samples}, settings.identity["samples"]
    arguments = rules["template_kwargs"], rules["template_date"]
    vocab_size = text_config(settings.folder)["vocab_size"]
    job = Job(settings.folder, settings.max_length, vocab_size, known, *arguments, model=settings.model)

    def checked(samples: Iterator[PlannedSample]) -> Iterator[PlannedSample]:
        usable, room, row = 0, max_bytes, None
        for sample in samples:
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

    def chosen(parts: list[ShardPlan]) -> np.ndarray:
        kept_n, turns = choose_turns(parts, rules["turns"])
        notes.update(tally.as_notes(), turns=turns, template={"kwargs": json.dumps(arguments[0]), "date": arguments[1]})
        if budget:
            of_kept_n, notes["budget"] = budget(kept_parts(parts, kept_n))
            kept_n[kept_n] = of_kept_n
        create_identity(out, {**settings.identity, "samples": {**rules, "turns": turns["chosen"]}})
        return kept_n

    with Pool(job) as pool:
        plan = write_segment(
            out,
            checked(_counted(pool.outcomes(work), tally, settings.identity)),
            row_bytes=settings.row_bytes,
            sources=sources,
            notes=notes,
            choose=chosen,
            replace=budget is not None,
        )
    say_unknown_keys(tally)
    return plan


def _counted(outcomes: Iterable[Outcome], tally: Tally, identity: dict) -> Iterator[PlannedSample]:
    """Yield the samples of the rows. UsageError for a row that another target has said, or this one in another mode."""
    rules, known = identity["samples"], {""}
    for outcome in outcomes:
        tally.rows += 1
        if outcome.regenerated not in known:
            check(json.loads(outcome.regenerated), identity, rules["template_kwargs"], rules["template_date"])
            known.add(outcome.regenerated)
        yield from samples_of(outcome, tally)


def _batches(rows: Iterator[Conversation | Fault]) -> Iterator[list[Conversation | Fault]]:
    while batch := list(islice(rows, CHUNK_ROWS)):
        yield batch
