"""The finished corpus and the failed prompts, written atomically as JSON Lines; the run's report and progress line."""

import contextlib
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
from pipeline.corpus.rejections import Tally
from stages.regenerate.prompts import Failure, PromptRow
from stages.regenerate.replies import CUT, Reply


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


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator:
    """Yield a file that replaces `path` when the block ends. RoomError when the disk is full."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with write_errors(path, "the corpus"):
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            sync_folder(path.absolute().parent)
        finally:
            unfinished.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    """Write rows as JSON Lines, atomically; return how many."""
    count = 0
    with _replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


LENGTHS = (16, 64, 256, 1024, 4096)  # tokens; the bounds of the report's groups
EVERY_S = 5.0


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
            "rows": {"read": tally.rows, "usable": prompts, "written": rows, "left_out": tally.as_notes()["faults"]},
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
    """Return the report as a table."""
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
