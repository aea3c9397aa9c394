"""Prompts out of a corpus: what the user said, turn by turn, without the replies that stood there.

Rows are read as `pipeline/corpus/` reads them, or hold a question alone. Of a row with what a tool returned only the
turns before it are asked: what comes after answers a call that the target may not make. `id`, `domain` and `split` are
passed on.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from pipeline.corpus.conversation import Conversation, RejectedRow
from pipeline.corpus.sources import corpus_files, hub_dataset, parse_roles, read_rows
from pipeline.corpus.tally import Tally, Unusable

PASSED_ON = ("id", "domain", "split")
AT_A_TOOL, AT_THE_START = "cut before a tool's result", "opening assistant turn left out"


@dataclass(frozen=True)
class PromptRow:
    """The prompts of one row.

    key: 32 hex digits of all that decides the prompts, and of which of equal rows it is. segments: the messages to put
    before each reply. kept: what is passed on as it stands.
    """

    key: str
    place: str
    segments: list[list[dict]]
    tools: list[dict] | None
    template_kwargs: dict | None
    kept: dict

    def messages(self, replies: list[dict]) -> list[dict]:
        """Return what is asked after these replies, which are messages themselves."""
        found = []
        for at, segment in enumerate(self.segments[: len(replies) + 1]):
            found += segment
            found += replies[at : at + 1]
        return found


def read_prompts(corpus: str, tally: Tally | None = None, roles: str | None = None) -> Iterator[PromptRow]:
    """Yield the prompts of every usable row in order; count the others, and what was cut, in `tally`.

    roles: as `--roles` gave them. Raises DataError and UsageError as `pipeline/corpus/sources.py` does.
    """
    seen: Counter[str] = Counter()
    tally = Tally() if tally is None else tally
    files, known = corpus_files(corpus), parse_roles(roles)
    rows = read_rows(corpus, files, known, prompts=True) if files else hub_dataset(corpus, known, prompts=True)[0]
    for row in rows:
        tally.rows += 1
        place = f"{row.file}:{row.line}"
        try:
            if isinstance(row, RejectedRow):
                raise Unusable(row.reason, row.detail)
            for key in row.unknown:
                tally.add_unknown_key(key, place)
            yield _prompt_row(row, place, seen, tally)
        except Unusable as fault:
            tally.reject(fault.reason, f"{place}: {fault.detail}")


def _prompt_row(row: Conversation, place: str, seen: Counter, tally: Tally) -> PromptRow:
    segments, cuts = _segments(row.messages)
    decides = json.dumps([segments, row.tools, row.template_kwargs], sort_keys=True, ensure_ascii=False).encode()
    same = blake2b(decides, digest_size=16).hexdigest()
    key = blake2b(f"{same} {seen[same]}".encode(), digest_size=16).hexdigest()
    seen[same] += 1
    for cut in cuts:
        tally.add_example(cut, f"{place}: {cut}")
        tally.truncated += cut == AT_A_TOOL
    kept = {name: getattr(row, name) for name in PASSED_ON if getattr(row, name) not in (None, "")}
    return PromptRow(key, place, segments, row.tools, row.template_kwargs, kept)


def _segments(messages: list[dict]) -> tuple[list[list[dict]], list[str]]:
    """Return the messages before each reply, and what was cut. Replies in a row are one; the last may be missing."""
    segments, segment, cuts = [], [], []
    for message in messages:
        if message["role"] == "tool":
            cuts.append(AT_A_TOOL)
            segment = []
            break
        if message["role"] != "assistant":
            segment.append(message)
        elif any(one["role"] == "user" for one in segment):
            segments.append(segment)
            segment = []
        elif not segments:
            cuts.append(AT_THE_START)
    if any(message["role"] == "user" for message in segment):
        segments.append(segment)
    if not segments:
        raise Unusable("no prompt", "has no message of a user to answer")
    return segments, sorted(set(cuts))
