"""`pipeline regenerate`: read a corpus' prompts, generate the replies that are missing, write the corpus.

Three passes over the prompts, none of which keeps more than a few bytes of each: count, generate, write. The corpus and
the failed prompts are written atomically as JSON Lines.
"""

import itertools
import json
import os
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.table import Table

from pipeline.cache.atomic import sync_folder, write_errors
from pipeline.corpus.regenerated import Regenerated
from pipeline.corpus.rejections import Tally, report_unknown_keys
from pipeline.corpus.sources import corpus_files, file_sources, report_skipped_files, source_roles
from pipeline.errors import DataError, UsageError
from pipeline.target.files import find_target, target_name, template_digest, tokenizer_digest
from pipeline.target.weights import target_digest
from stages.regenerate.prompts import Failure, Job, Options, PromptRow, Renderer, read_prompts
from stages.regenerate.replies import CUT, Journal, Reply

LENGTHS = (16, 64, 256, 1024, 4096)  # tokens; the bounds of the report's groups
EVERY_S = 5.0


def run(options: Options) -> dict:
    """Write a corpus with the target's replies, and return the report.

    UsageError for wrong options or an unusable server, DataError for an unusable corpus or prompts that failed,
    RoomError for a full disk. Every reply so far is kept, and the same command resumes.
    """
    options.check()
    tally = Tally()
    prompts = sum(len(row.segments) for row in _rows(options, tally))
    usable = tally.records - sum(tally.rejected.values())
    tally.check_usable(options.corpus, usable)
    report_unknown_keys(tally)
    report_skipped_files(options.corpus)
    folder = find_target(options.model) if options.model else None
    endpoint = _endpoint(options) if options.endpoint else None
    record = _record(options, endpoint, folder)
    head = {"regenerated": record.model_dump(exclude={"stops"}), "corpus": _corpus(options)}
    counts, started = ReplyCounts(), time.monotonic()
    with Journal(_sibling(options.out, "journal"), head) as journal:
        if options.out.exists() and not len(journal):
            raise UsageError(
                f"{options.out} is there, and {journal.path.name} knows nothing of it; name another --out or remove it"
            )
        counts.from_earlier_runs = len(journal)
        if journal.damaged:
            print(
                f"{journal.path}: {journal.damaged} damaged lines, whose replies are asked for again", file=sys.stderr
            )
        failures = _ask(options, endpoint, folder, journal, counts, prompts)
        journal.sync()
        seconds = time.monotonic() - started
        rows = write_rows(options.out, _out_rows(options, journal, record, counts))
    failed = _sibling(options.out, "failed.jsonl")
    if failures:
        write_rows(failed, map(failed_row, failures))
    else:
        failed.unlink(missing_ok=True)
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


def _endpoint(options: Options):
    from stages.regenerate.endpoint import Endpoint  # brings torch

    endpoint = Endpoint(options)
    if not options.model:
        print(
            "without --model nobody compares the server's prompts with the target's chat template: "
            "what it was really asked stays unknown",
            file=sys.stderr,
        )
    return endpoint


def _record(options: Options, endpoint, folder: Path | None) -> Regenerated:
    return Regenerated(
        model=endpoint.model if endpoint else target_name(options.model),
        target=folder and target_digest(folder),
        tokenizer=folder and tokenizer_digest(folder),
        chat_template=folder and template_digest(folder),
        engine=endpoint.engine if endpoint else "transformers",
        temperature=float(options.temperature),
        top_p=float(options.top_p),
        seed=options.seed,
        template_kwargs=options.template_kwargs,
        template_date=options.template_date,
        max_tokens=options.max_new,
    )


def _ask(
    options: Options, endpoint, folder: Path | None, journal: Journal, counts: "ReplyCounts", prompts: int
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

    jobs = (job for job in _jobs(options, journal) if not job.done)
    first = next(jobs, None)
    if first is not None:  # else no target is loaded
        renderer = folder and Renderer(folder, options.template_kwargs, options.template_date)
        engine = endpoint or _local_engine(options, folder)
        engine.ask(itertools.chain([first], jobs), renderer, on_reply, failures.append)
    return sorted(failures, key=lambda failure: _corpus_order(failure.row.location))


def _corpus_order(location: str) -> tuple[str, int]:
    file, _, line = location.rpartition(":")
    return file, int(line)


def _local_engine(options: Options, folder: Path):
    from stages.regenerate.local_engine import LocalEngine  # brings torch and transformers

    return LocalEngine(options, folder)


def _jobs(options: Options, journal: Journal) -> Iterator[Job]:
    """Yield a job for each row, with the replies so far."""
    return (Job(row, journal.replies(row.key)) for row in _rows(options))


def _out_rows(options: Options, journal: Journal, record: Regenerated, counts: "ReplyCounts") -> Iterator[dict]:
    """Yield the rows of the output corpus: those whose replies are complete."""
    for job in _jobs(options, journal):
        if job.done:
            for reply in job.replies:
                counts.count(reply)
            yield out_row(job.row, job.replies, record, options.token_ids)


def out_row(row: PromptRow, replies: list[Reply], record: Regenerated, token_ids: bool) -> dict:
    """Return a row of the output corpus: messages with the target's replies, fields passed on, generation record."""
    turns = []
    for reply in replies:
        message = reply.message()
        if token_ids and reply.token_ids is not None:
            message["token_ids"] = reply.token_ids
            if reply.prompt_token_ids is not None:
                message["prompt_token_ids"] = reply.prompt_token_ids
        turns.append(message)
    messages = row.messages(turns)
    last = max(at for at, message in enumerate(messages) if message["role"] == "assistant")
    more = {"tools": row.tools, "chat_template_kwargs": row.template_kwargs}
    stops = {"stops": [reply.stop for reply in replies]}
    return {
        **row.passed_on,
        "messages": messages[: last + 1],
        **{key: value for key, value in more.items() if value},
        "regenerated": record.model_dump() | stops,
    }


def failed_row(failure: Failure) -> dict:
    """Return the row of a prompt that was given up; it can be read as a corpus row, with empty replies."""
    row = failure.row
    messages = row.messages([{"role": "assistant", "content": ""}] * failure.turn)
    return {**row.passed_on, "messages": messages, "place": row.location, "turn": failure.turn, "failed": failure.cause}


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    """Write rows as JSON Lines, atomically; return how many. RoomError when the disk is full."""
    unfinished, count = path.with_name(f"{path.name}.unfinished"), 0
    with write_errors(path, "the corpus"):
        try:
            with unfinished.open("wb") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    count += 1
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            sync_folder(path.absolute().parent)
        finally:
            unfinished.unlink(missing_ok=True)
    return count


class ReplyCounts:
    """Counts of replies, from earlier runs and of this one."""

    def __init__(self):
        self.from_earlier_runs = self.asked = self.tokens = self.uncounted = self.empty = 0
        self.stops: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.failed: list[str] = []

    def count(self, reply: Reply) -> None:
        """Count a reply of the finished corpus."""
        self.stops[reply.stop] += 1
        self.empty += reply.empty
        if reply.tokens is None:
            self.uncounted += 1
        else:
            self.lengths[bisect_right(LENGTHS, reply.tokens)] += 1

    def as_dict(self, tally: Tally, prompts: int, rows: int, seconds: float) -> dict:
        replies = self.stops.total()
        share = {"cut": self.stops[CUT] / replies, "empty": self.empty / replies} if replies else {}
        return {
            "rows": {"read": tally.records, "usable": prompts, "written": rows, "left_out": tally.as_notes()["faults"]},
            "examples": tally.as_notes()["examples"],
            "cut_at_a_tool": tally.truncated,
            "replies": {"all": replies, "asked_now": self.asked, "kept": self.from_earlier_runs},
            "tokens": self.tokens,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds if self.asked and seconds else None,
            "stops": dict(self.stops.most_common()),
            "lengths": {_range(group): self.lengths[group] for group in sorted(self.lengths)},
            "lengths_unknown": self.uncounted,
            "share": share,
            "failed": {"prompts": len(self.failed), "examples": self.failed[:3]},
        }


def _range(group: int) -> str:
    low, high = (0, *LENGTHS)[group], (*LENGTHS, None)[group]
    return f"{low or 1} - {high - 1}" if high else f"{low} or more"


def table(report: dict) -> Table:
    grid = Table.grid(padding=(0, 2))
    rows, replies, rate = report["rows"], report["replies"], report["tokens_per_second"]
    grid.add_row("rows", f"{rows['read']:,} read, {rows['written']:,} written")
    for reason, count in rows["left_out"].items():
        grid.add_row("  left out", f"{count:,} {reason}: {report['examples'][reason][0]}")
    if report["cut_at_a_tool"]:
        grid.add_row("  cut", f"{report['cut_at_a_tool']:,} before what a tool returned")
    grid.add_row(
        "replies", f"{replies['all']:,}: {replies['asked_now']:,} asked, {replies['kept']:,} from earlier runs"
    )
    if rate:
        grid.add_row("speed", f"{rate:,.0f} tokens/s, {report['tokens']:,} tokens in {report['seconds']:,.0f} s")
    grid.add_row("ended by", ", ".join(f"{stop} {count:,}" for stop, count in report["stops"].items()))
    grid.add_row("tokens", ", ".join(f"{group}: {count:,}" for group, count in report["lengths"].items()))
    if report["share"]:
        grid.add_row("share", f"{report['share']['cut']:.1%} cut at the limit, {report['share']['empty']:.1%} empty")
    if report["failed"]["prompts"]:
        grid.add_row("failed", f"{report['failed']['prompts']:,}: {report['failed']['examples'][0]}")
    return grid


class Progress:
    """Prints a progress line on standard error every few seconds: prompts, tokens a second, ETA."""

    def __init__(self, prompts: int, done: int):
        self.prompts, self.done, self.done_before, self.tokens = prompts, done, done, 0
        self.start = self.shown_at = time.monotonic()

    def add(self, tokens: int | None) -> None:
        self.done += 1
        self.tokens += tokens or 0
        now = time.monotonic()
        if now - self.shown_at >= EVERY_S:
            self.shown_at = now
            print(self.line(now - self.start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        left = int((self.prompts - self.done) * seconds / max(self.done - self.done_before, 1))
        return (
            f"{self.done:,} of {self.prompts:,} prompts · {self.tokens / seconds:,.0f} tokens/s · "
            f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        )
