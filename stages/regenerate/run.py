"""`pipeline regenerate`: read a corpus' prompts, generate the replies that are missing, write the corpus.

Three passes over the prompts, none of which keeps more than a few bytes of each: count, generate, write.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.corpus.regenerated import Regenerated
from pipeline.corpus.rejections import Tally, report_unknown_keys
from pipeline.corpus.sources import corpus_files, file_sources, report_skipped_files, source_roles
from pipeline.errors import DataError, UsageError
from pipeline.target.files import find_target, target_name, template_digest, tokenizer_digest
from pipeline.target.weights import target_digest
from stages.regenerate.options import Options
from stages.regenerate.output import Progress, ReplyCounts, failed_row, out_row, write_rows
from stages.regenerate.prompts import Failure, Job, PromptRow, pending_jobs, read_prompts
from stages.regenerate.replies import Journal, Reply


def run(options: Options) -> dict:
    """Write a corpus with the target's replies, and return the report.

    UsageError for wrong options or an unusable server, DataError for an unusable corpus or prompts that failed,
    RoomError for a full disk. Every reply so far is kept, and the same command resumes.
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
    counts, started = ReplyCounts(), time.monotonic()
    with Journal(_sibling(options.out, "journal"), head) as journal:
        _check_out(options.out, journal)
        counts.from_earlier_runs = len(journal)
        if journal.damaged:
            print(
                f"{journal.path}: {journal.damaged} damaged lines, whose replies are asked for again", file=sys.stderr
            )
        failures = _ask(options, engine, folder, journal, counts, prompts)
        journal.sync()
        seconds = time.monotonic() - started
        rows = write_rows(options.out, _out_rows(options, journal, record, counts))
    _write_failures(options, failures)
    counts.failed = [f"{failure.row.location}, turn {failure.turn}: {failure.cause}" for failure in failures]
    return counts.as_dict(tally, usable, rows, seconds)


def check_failed(report: dict, out: Path) -> None:
    """DataError for a report with prompts that were given up."""
    if count := report["failed"]["prompts"]:
        raise DataError(
            f"{count} prompts have no reply, {report['failed']['examples'][0]}; {_sibling(out, 'failed.jsonl')} lists "
            "them, and the same command asks them again"
        )


def _rows(options: Options, tally: Tally | None = None) -> Iterator[PromptRow]:
    return itertools.islice(read_prompts(options.corpus, tally, options.roles), options.max_samples)


def _corpus(options: Options) -> dict | list[dict]:
    """Return the journal's entry for the corpus: its one file, its files, or its name on the hub."""
    files = corpus_files(options.corpus)
    sources = file_sources(options.corpus, files, options.roles)
    if not files:
        return {"dataset": options.corpus, **source_roles(options.roles)}
    return sources[0] if len(sources) == 1 else sources


def _sibling(out: Path, name: str) -> Path:
    """Return OUT.journal or OUT.failed.jsonl, in which OUT has lost its own suffix."""
    return out.with_name(f"{out.stem}.{name}")


class _LazyLocalEngine:
    """A LocalEngine that loads the target only when there is something to generate."""

    engine = "transformers"

    def __init__(self, options: Options, folder: Path):
        self.options, self.folder, self.model = options, folder, target_name(options.model)

    def ask(self, *asked) -> None:
        from stages.regenerate.local_engine import LocalEngine

        LocalEngine(self.options, self.folder, self.model).ask(*asked)


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
    return _LazyLocalEngine(options, folder)


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
    """UsageError where the output exists and the journal is empty: it is not ours to overwrite."""
    if out.exists() and not len(journal):
        raise UsageError(
            f"{out} is there, and {journal.path.name} knows nothing of it; name another --out or remove it"
        )


def _ask(
    options: Options, engine, folder: Path | None, journal: Journal, counts: ReplyCounts, prompts: int
) -> list[Failure]:
    """Generate the missing replies; return the prompts that were given up."""
    failures: list[Failure] = []
    progress = Progress(prompts, len(journal))

    def on_reply(job: Job, reply: Reply) -> None:
        journal.add(job.row.key, job.turn, reply)
        job.replies.append(reply)
        counts.asked += 1
        counts.tokens += reply.tokens or 0
        progress.add(reply.tokens)

    jobs = pending_jobs(_rows(options), journal.replies)
    first = next(jobs, None)
    if first is not None:
        engine.ask(itertools.chain([first], jobs), _renderer(options, folder), on_reply, failures.append)
    return sorted(failures, key=lambda failure: _corpus_order(failure.row.location))


def _corpus_order(location: str) -> tuple[str, int]:
    file, _, line = location.rpartition(":")
    return file, int(line)


def _renderer(options: Options, folder: Path | None):
    if folder is None:
        return None
    from stages.regenerate.prompts import Renderer

    return Renderer(folder, options.template_kwargs, options.template_date)


def _out_rows(options: Options, journal: Journal, record: Regenerated, counts: ReplyCounts) -> Iterator[dict]:
    """Yield the rows of the output corpus: those whose replies are complete."""
    for row in _rows(options):
        job = Job(row, journal.replies(row.key))
        if job.done:
            for reply in job.replies:
                counts.count(reply)
            yield out_row(row, job.replies, record, options.token_ids)


def _write_failures(options: Options, failures: list[Failure]) -> None:
    path = _sibling(options.out, "failed.jsonl")
    if failures:
        write_rows(path, map(failed_row, failures))
    else:
        path.unlink(missing_ok=True)
