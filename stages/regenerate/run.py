"""Regenerate a corpus: read its prompts, have the target answer those that have no reply yet, write the corpus.

Three passes over the prompts, none of which holds more than a few bytes of each: count them, ask, write.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.corpus.regenerated import Regenerated
from pipeline.corpus.sources import corpus_files, file_sources, report_skipped_files, source_roles
from pipeline.corpus.tally import Tally, report_unknown_keys
from pipeline.errors import DataError, UsageError
from pipeline.target.files import find_target, target_digest, target_name, template_digest, tokenizer_digest
from stages.regenerate.journal import Journal
from stages.regenerate.options import Options
from stages.regenerate.output import failed_row, out_row, write_rows
from stages.regenerate.pending import Failure, Job, open_jobs
from stages.regenerate.prompts import PromptRow, read_prompts
from stages.regenerate.replies import Reply
from stages.regenerate.report import Figures, Progress


def run(options: Options) -> dict:
    """Write what the target says to the prompts of a corpus, and return the report.

    UsageError for options and servers that cannot be asked, DataError for an unusable corpus or prompts that failed,
    RoomError for a full disk. Whatever ends it, every reply that came is kept, and the same command goes on.
    """
    options.check()
    tally = Tally()
    prompts = sum(len(row.segments) for row in _rows(options, tally))
    usable = tally.rows - sum(tally.rejected.values())
    tally.check_usable(options.corpus, usable)
    report_unknown_keys(tally)
    report_skipped_files(options.corpus)
    folder = find_target(options.model) if options.model else None
    engine = _engine(options, folder)
    record = _record(options, engine, folder)
    head = {"regenerated": record.model_dump(exclude={"stops"}), "corpus": _corpus(options)}
    figures, started = Figures(), time.monotonic()
    with Journal(_beside(options.out, "journal"), head) as journal:
        _check_out(options.out, journal)
        figures.kept = len(journal)
        if journal.lost:
            print(f"{journal.path}: {journal.lost} damaged lines, whose replies are asked for again", file=sys.stderr)
        failures = _ask(options, engine, folder, journal, figures, prompts)
        journal.sync()
        seconds = time.monotonic() - started
        rows = write_rows(options.out, _out_rows(options, journal, record, figures))
    _write_failures(options, failures)
    figures.failed = [f"{failure.row.place}, turn {failure.turn}: {failure.cause}" for failure in failures]
    return figures.as_dict(tally, usable, rows, seconds)


def check_failed(report: dict, out: Path) -> None:
    """DataError for a report with prompts that were given up."""
    if count := report["failed"]["prompts"]:
        raise DataError(
            f"{count} prompts have no reply, {report['failed']['examples'][0]}; {_beside(out, 'failed.jsonl')} lists "
            "them, and the same command asks them again"
        )


def _rows(options: Options, tally: Tally | None = None) -> Iterator[PromptRow]:
    return itertools.islice(read_prompts(options.corpus, tally, options.roles), options.max_samples)


def _corpus(options: Options) -> dict | list[dict]:
    """Return what the journal keeps of the corpus: its one file, its files, or its name on the hub."""
    files = corpus_files(options.corpus)
    sources = file_sources(options.corpus, files, options.roles)
    if not files:
        return {"dataset": options.corpus, **source_roles(options.roles)}
    return sources[0] if len(sources) == 1 else sources


def _beside(out: Path, name: str) -> Path:
    """Return OUT.journal or OUT.failed.jsonl, without OUT's own ending in the middle."""
    return out.with_name(f"{out.stem}.{name}")


class _Here:
    """The target decoding here, not loaded before there is something to ask: often all have their reply."""

    engine = "transformers"

    def __init__(self, options: Options, folder: Path):
        self.options, self.folder, self.model = options, folder, target_name(options.model)

    def ask(self, *asked) -> None:
        from stages.regenerate.local_engine import Local

        Local(self.options, self.folder, self.model).ask(*asked)


def _engine(options: Options, folder: Path | None):
    if options.endpoint:
        from stages.regenerate.endpoint import Endpoint

        engine = Endpoint(options)
        if folder is None:
            print(
                "without --model nobody compares the server's prompts with the target's chat template: "
                "what it was really asked stays unknown",
                file=sys.stderr,
            )
        return engine
    return _Here(options, folder)


def _record(options: Options, engine, folder: Path | None) -> Regenerated:
    return Regenerated(
        model=engine.model,
        target=folder and target_digest(folder),
        tokenizer=folder and tokenizer_digest(folder),
        chat_template=folder and template_digest(folder),
        engine=engine.engine,
        temperature=float(options.temperature),
        top_p=float(options.top_p),
        seed=options.seed,
        template_kwargs=options.template_kwargs,
        template_date=options.template_date,
        max_tokens=options.max_new,
    )


def _check_out(out: Path, journal: Journal) -> None:
    """Refuse to write over what no journal speaks of."""
    if out.exists() and not len(journal):
        raise UsageError(
            f"{out} is there, and {journal.path.name} knows nothing of it; name another --out or remove it"
        )


def _ask(
    options: Options, engine, folder: Path | None, journal: Journal, figures: Figures, prompts: int
) -> list[Failure]:
    """Ask what has no reply yet; return the prompts that were given up."""
    failures: list[Failure] = []
    progress = Progress(prompts, len(journal))

    def on_reply(job: Job, reply: Reply) -> None:
        journal.add(job.row.key, job.turn, reply)
        job.replies.append(reply)
        figures.asked += 1
        figures.tokens += reply.tokens or 0
        progress.add(reply.tokens)

    jobs = open_jobs(_rows(options), journal.replies)
    first = next(jobs, None)
    if first is not None:
        engine.ask(itertools.chain([first], jobs), _renderer(options, folder), on_reply, failures.append)
    return sorted(failures, key=lambda failure: _order(failure.row.place))


def _order(place: str) -> tuple[str, int]:
    file, _, line = place.rpartition(":")
    return file, int(line)


def _renderer(options: Options, folder: Path | None):
    if folder is None:
        return None
    from stages.regenerate.rendering import Renderer

    return Renderer(folder, options.template_kwargs, options.template_date)


def _out_rows(options: Options, journal: Journal, record: Regenerated, figures: Figures) -> Iterator[dict]:
    """Yield the corpus: every row that has a reply and is not waiting for another."""
    for row in _rows(options):
        job = Job(row, journal.replies(row.key))
        if job.done:
            for reply in job.replies:
                figures.count(reply)
            yield out_row(row, job.replies, record, options.token_ids)


def _write_failures(options: Options, failures: list[Failure]) -> None:
    path = _beside(options.out, "failed.jsonl")
    if failures:
        write_rows(path, map(failed_row, failures))
    else:
        path.unlink(missing_ok=True)
