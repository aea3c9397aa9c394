"""Makes the plan of a cache from a corpus: every sample tokenised, masked, truncated and counted, without the target.

What is left out is counted by reason and reported by file and line. A corpus of which more than a tenth is unusable is
refused: it is probably in another format than it seems, and what is left would be a guess.
Also which columns of a plan are still to be captured.
"""

import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.cache.atomic import free_bytes
from pipeline.cache.catalog import Catalog, Work
from pipeline.cache.codecs import CODECS
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.file_writer import create_identity
from pipeline.cache.plan import Plan
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.samples import PlannedSample, ShardPlan
from pipeline.cache.schema import Identity
from pipeline.corpus.file_formats import CHUNK_RECORDS
from pipeline.corpus.regenerated import check_regenerated
from pipeline.corpus.rejections import Tally, report_unknown_keys
from pipeline.corpus.sources import (
    corpus_chunks,
    corpus_files,
    file_sources,
    hub_dataset,
    parse_roles,
    report_skipped_files,
    source_roles,
)
from pipeline.errors import UsageError
from pipeline.target.files import is_quantised, read_text_config
from stages.cache_hidden.budget import SampleChooser
from stages.cache_hidden.prepare_records import Job, RecordOutcome, samples_of
from stages.cache_hidden.settings import CaptureSettings
from stages.cache_hidden.worker_pool import WorkerPool

FREE_SHARE = 0.25  # of the free disk that the default corpus may take
LOST_SHARE = 0.05  # of the supervised tokens; one sample for each turn is the default where one a record loses more


def make_plan(
    corpus: str,
    out: Path,
    settings: CaptureSettings,
    max_samples: int | None,
    *,
    spare_disk: bool = False,
    budget: SampleChooser | None = None,
    roles: str | None = None,
) -> Plan:
    """Tokenise the corpus and write the plan, and cache.json once the corpus has turned out usable.

    max_samples: at most so many usable conversations (None: all). spare_disk: no more than FREE_SHARE of the free
    disk. budget: chooses among these samples; the plan then replaces an existing one. roles: the text of `--roles`.
    Raises DataError for an unusable corpus, UsageError when corpus or target is not there.
    """
    files, known_roles = corpus_files(corpus), parse_roles(roles)
    if is_quantised(settings.folder):
        from pipeline.target.config import check_quantised, load_config  # brings torch

        check_quantised(settings.folder, load_config(settings.folder, settings.model))
    if files:
        work, sources = corpus_chunks(corpus, files), file_sources(corpus, files, roles)
        report_skipped_files(corpus)
    else:
        records, source = hub_dataset(corpus, known_roles)
        work = iter(lambda: list(islice(records, CHUNK_RECORDS)), [])  # until there are no more
        sources = [{**source, **source_roles(roles)}]
    max_bytes = int(FREE_SHARE * free_bytes(out)) if spare_disk else None
    tally, notes, rules = Tally(), {"max_samples": max_samples}, settings.identity.samples
    arguments = rules.template_kwargs, rules.template_date
    vocab_size = read_text_config(settings.folder)["vocab_size"]
    job = Job(settings.folder, settings.max_length, vocab_size, known_roles, *arguments, model=settings.model)

    def checked(samples: Iterator[PlannedSample]) -> Iterator[PlannedSample]:
        usable, bytes_left, record = 0, max_bytes, None
        for sample in samples:
            if bytes_left is not None:
                bytes_left -= len(sample.ids) * settings.row_bytes
                if bytes_left < 0:
                    break
            if record != (record := (sample.file, sample.line)):
                if usable == max_samples:
                    break
                usable += 1
            yield sample
        tally.check_usable(corpus, usable)

    def chosen(parts: list[ShardPlan]) -> np.ndarray:
        chosen_n, turns = choose_turns(parts, rules.turns)
        notes.update(tally.as_notes(), turns=turns, template={"kwargs": json.dumps(arguments[0]), "date": arguments[1]})
        if budget:
            within_budget_n, notes["budget"] = budget(chosen_parts(parts, chosen_n))
            chosen_n[chosen_n] = within_budget_n
        identity = settings.identity.as_dict()
        create_identity(out, {**identity, "samples": {**rules.as_dict(), "turns": turns["chosen"]}})
        return chosen_n

    with WorkerPool(job) as pool:
        plan = write_segment(
            out,
            checked(_count_outcomes(pool.outcomes(work), tally, settings.identity)),
            row_bytes=settings.row_bytes,
            sources=sources,
            notes=notes,
            choose=chosen,
            replace=budget is not None,
        )
    report_unknown_keys(tally)
    return plan


def _count_outcomes(outcomes: Iterable[RecordOutcome], tally: Tally, identity: Identity) -> Iterator[PlannedSample]:
    """Yield the samples of the records. UsageError for replies regenerated by another target, or in another mode."""
    rules, checked_records = identity.samples, {""}
    for outcome in outcomes:
        tally.records += 1
        if outcome.regenerated not in checked_records:
            check_regenerated(
                json.loads(outcome.regenerated), identity.as_dict(), rules.template_kwargs, rules.template_date
            )
            checked_records.add(outcome.regenerated)
        yield from samples_of(outcome, tally)


def choose_turns(parts: Sequence[ShardPlan], requested: str | None) -> tuple[np.ndarray, dict]:
    """Return which samples are planned, bool [n], and the plan's note: the choice, its reason, the sizes of both.

    Where a template rewrites earlier turns (Qwen3 drops their reasoning, gpt-oss their analyses), the sample of a
    record's last turn supervises that turn only. A sample for each turn, after its own prompt, supervises more tokens
    for every byte, since prompts are shorter then, but takes more bytes in all. requested: `last`, `each`, or None.
    The samples of one record follow each other, the one of its last turn first.
    """
    first_n = np.concatenate([*_first_of_record(parts)])
    lengths_n = np.concatenate([part.lengths for part in parts])
    supervised_n = np.concatenate([part.supervised for part in parts])
    priced = {
        name: {
            "samples": int(chosen_samples.sum()),
            "tokens": int(lengths_n[chosen_samples].sum()),
            "supervised": int(supervised_n[chosen_samples].sum()),
        }
        for name, chosen_samples in (("last", first_n), ("each", np.ones_like(first_n)))
    }
    lost = 1 - priced["last"]["supervised"] / priced["each"]["supervised"]
    chosen = requested or ("each" if lost > LOST_SHARE else "last")
    why = f"`last` supervises {1 - lost:.1%} of the tokens that `each` does"
    if not lost:
        why = "one sample holds every turn of its conversation, so both are the same"
    elif requested:
        why = f"asked for; {why}"
    return (first_n if chosen == "last" else np.ones_like(first_n)), {"chosen": chosen, "why": why, **priced}


def _first_of_record(parts: Sequence[ShardPlan]):
    """Yield for each part which of its samples are the first of their record, bool [n]."""
    before = None
    for part in parts:
        records = list(zip(part.text("source"), part.batch.column("line").to_pylist(), strict=True))
        yield np.array([record != other for other, record in zip([before, *records], records, strict=False)], bool)
        before = records[-1]


def chosen_parts(parts: Sequence[ShardPlan], chosen_n: np.ndarray) -> list[ShardPlan]:
    """Return the parts with only their chosen samples; a part without any is left out."""
    ends = np.cumsum([len(part) for part in parts])[:-1]
    masks = np.split(chosen_n, ends)
    found = [ShardPlan(part.batch.filter(pa.array(mask)), part.number) for part, mask in zip(parts, masks, strict=True)]
    return [part for part in found if len(part)]


def missing_columns(catalog: Catalog, columns: tuple[ColumnSpec, ...]) -> Work:
    """Return the shards that lack columns, and which. UsageError where one is stored with other rows or codec."""
    work = catalog.missing(columns)
    for shard in range(catalog.shards):
        for spec in columns:
            manifest = catalog.captured(shard, spec.name)
            stored = manifest.spec if manifest else spec
            if stored.keeps != spec.keeps:
                raise UsageError(
                    f"{catalog.path} holds {spec.name} on {stored.keeps} rows, this command asks for {spec.keeps}; "
                    f"pass --final {stored.keeps}, or another --out"
                )
            if stored.codec != spec.codec:
                raise UsageError(codec_mismatch(catalog.path, spec, stored.codec))
    return work


def codec_mismatch(out: Path, spec: ColumnSpec, current: str) -> str:
    """Return the error message for a column that some shards store in another codec than the one asked for."""
    recode = shlex.join(["pipeline", "recode", str(out), "--codec", f"{spec.name}={spec.codec}"])
    remedy = f"`{recode}` makes it so without the target"
    if CODECS[current].lossy:
        remedy = f"what {current} has rounded stays so: leave --codec out, or pass another --out"
    return f"{out} holds {spec.name} in {current}, and {spec.codec} is asked for or in other shards; {remedy}"
