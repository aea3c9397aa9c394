"""What is asked of the target: the options, and the prompts of a corpus: its conversations turn by turn without their
replies, as jobs and as token ids.

Rows are read as `pipeline/corpus/` reads them, or hold a question alone. Of a row with a tool's result only the turns
before it are prompts: what comes after answers a call that the target may not make. `id`, `domain` and `split` are
passed on. A job is such a row with its replies so far.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from pipeline.corpus.record_formats import Conversation, RejectedRecord
from pipeline.corpus.rejections import Tally, Unusable
from pipeline.corpus.sources import corpus_files, hub_dataset, parse_roles, read_records
from pipeline.errors import UsageError
from pipeline.target.files import TEMPLATE_DATE
from stages.regenerate.replies import Reply

CONTEXT_TOKENS = 4  # tokens shown before a difference, and after it
PASSED_ON_KEYS = ("id", "domain", "split")
CUT_AT_TOOL, CUT_AT_START = "cut before a tool's result", "opening assistant turn left out"
LOWEST = 1e-3  # the lowest temperature above 0


@dataclass(frozen=True)
class Options:
    """The corpus, the engine, sampling and request limits.

    model: the target's files; decodes here where there is no `endpoint`. max_new: tokens of a reply at most. rate:
    requests a minute. batch: prompts decoded here at once. backoff_s: the pause before the first retry.
    """

    corpus: str
    out: Path
    endpoint: str | None = None
    model: str | None = None
    served_model: str | None = None
    engine: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new: int = 2048
    template_kwargs: dict = field(default_factory=dict)
    template_date: str = TEMPLATE_DATE
    token_ids: bool = True
    concurrency: int = 32
    rate: float | None = None
    retries: int = 8
    timeout: float = 600.0
    backoff_s: float = 0.5
    batch: int = 64
    device: str | None = None
    max_samples: int | None = None
    roles: str | None = None

    def check(self) -> None:
        """UsageError for missing, conflicting or out-of-range options."""
        if not (self.endpoint or self.model):
            raise UsageError("nobody to ask: pass --endpoint with a server's address, or --model to decode here")
        if not (self.temperature == 0 or LOWEST <= self.temperature < float("inf")):
            raise UsageError(f"--temperature {self.temperature}: draws need {LOWEST} or more; 0 is for greedy replies")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: wanted more than 0, at most 1")
        if self.out.suffix != ".jsonl":
            raise UsageError(f"--out {self.out}: its name has to end with .jsonl, as a corpus' does")
        folder = Path(self.corpus).expanduser()
        if folder.is_dir() and self.out.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"--out {self.out} lies in the corpus {self.corpus} and would be read with it; name a place outside"
            )
        if self.out.exists() and any(self.out.samefile(file) for file in corpus_files(self.corpus)):
            raise UsageError(f"--out {self.out} is the corpus itself, or a file of it; name another file")


@dataclass(frozen=True)
class PromptRow:
    """The prompts of one row.

    key: 32 hex digits that hash the prompts and, of equal rows, their number. segments: the messages before each reply.
    location: file and line. passed_on: fields copied to the output.
    """

    key: str
    location: str
    segments: list[list[dict]]
    tools: list[dict] | None
    template_kwargs: dict | None
    passed_on: dict

    def messages(self, replies: list[dict]) -> list[dict]:
        """Return the prompt after these replies, which are messages too."""
        prompt = []
        for at, segment in enumerate(self.segments[: len(replies) + 1]):
            prompt += segment
            prompt += replies[at : at + 1]
        return prompt


def read_prompts(corpus: str, tally: Tally | None = None, roles: str | None = None) -> Iterator[PromptRow]:
    """Yield the prompts of every usable row in order; count the others, and what was cut, in `tally`.

    roles: as `--roles` gave them. Raises DataError and UsageError as `pipeline/corpus/sources.py` does.
    """
    seen: Counter[str] = Counter()
    tally = Tally() if tally is None else tally
    files, known = corpus_files(corpus), parse_roles(roles)
    rows = read_records(corpus, files, known, prompts=True) if files else hub_dataset(corpus, known, prompts=True)[0]
    for row in rows:
        tally.records += 1
        location = f"{row.file}:{row.line}"
        try:
            if isinstance(row, RejectedRecord):
                raise Unusable(row.reason, row.detail)
            for key in row.unknown:
                tally.add_unknown_key(key, location)
            yield _prompt_row(row, location, seen, tally)
        except Unusable as fault:
            tally.reject(fault.reason, f"{location}: {fault.detail}")


def _prompt_row(row: Conversation, location: str, seen: Counter, tally: Tally) -> PromptRow:
    segments, cuts = _segments(row.messages)
    decides = json.dumps([segments, row.tools, row.template_kwargs], sort_keys=True, ensure_ascii=False).encode()
    same = blake2b(decides, digest_size=16).hexdigest()
    key = blake2b(f"{same} {seen[same]}".encode(), digest_size=16).hexdigest()
    seen[same] += 1
    for cut in cuts:
        tally.add_example(cut, f"{location}: {cut}")
        tally.truncated += cut == CUT_AT_TOOL
    passed_on = {name: getattr(row, name) for name in PASSED_ON_KEYS if getattr(row, name) not in (None, "")}
    return PromptRow(key, location, segments, row.tools, row.template_kwargs, passed_on)


def _segments(messages: list[dict]) -> tuple[list[list[dict]], list[str]]:
    """Return the messages before each reply, and what was cut. Replies in a row are one; the last may be missing."""
    segments, segment, cuts = [], [], []
    for message in messages:
        if message["role"] == "tool":
            cuts.append(CUT_AT_TOOL)
            segment = []
            break
        if message["role"] != "assistant":
            segment.append(message)
        elif any(earlier["role"] == "user" for earlier in segment):
            segments.append(segment)
            segment = []
        elif not segments:
            cuts.append(CUT_AT_START)
    if any(message["role"] == "user" for message in segment):
        segments.append(segment)
    if not segments:
        raise Unusable("no prompt", "has no message of a user to answer")
    return segments, sorted(set(cuts))


@dataclass
class Job:
    """A row and its replies so far. The next turn's prompt holds the target's own earlier replies."""

    row: PromptRow
    replies: list[Reply] = field(default_factory=list)

    @property
    def turn(self) -> int:
        """The next turn to generate, from 0."""
        return len(self.replies)

    @property
    def done(self) -> bool:
        return self.turn == len(self.row.segments) or bool(self.replies and self.replies[-1].ends_conversation)

    def seed(self, seed: int) -> int:
        """Return a seed of 63 bits for the next reply, from a run's seed, the row's key and the turn."""
        digest = blake2b(f"{seed} {self.row.key} {self.turn}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def messages(self) -> list[dict]:
        """Return the messages of the next prompt."""
        return self.row.messages([reply.message() for reply in self.replies])


@dataclass(frozen=True)
class Failure:
    """A prompt that was given up."""

    row: PromptRow
    turn: int
    cause: str


def common_prefix(a_ids: Sequence[int], b_ids: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    pairs = zip(a_ids, b_ids, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(a_ids), len(b_ids)))


class Renderer:
    """The target's tokenizer and chat template, with the arguments and the date for every prompt."""

    def __init__(self, folder: Path, template_kwargs: dict, date: str):
        from pipeline.target.chat_template import ChatTemplate  # transformers takes seconds that not every run needs

        self.template = ChatTemplate(folder, template_kwargs, date)
        self.tokenizer = self.template.tokenizer

    def prompt_ids(self, messages: list[dict], tools: list[dict] | None, template_kwargs: dict | None) -> list[int]:
        """Return the ids that an engine would send to the target. Unusable when the template refuses the messages."""
        return self.template.prompt_ids(messages, tools, template_kwargs)

    def text(self, ids: Sequence[int]) -> str:
        """Return a reply's text: without special tokens, as a server sends it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def compare(self, theirs: Sequence[int], ours: Sequence[int], location: str) -> None:
        """UsageError, with the tokens around the first difference, when the server's prompt ids differ from ours."""
        if list(theirs) == list(ours):
            return
        at = common_prefix(theirs, ours)
        first = max(at - CONTEXT_TOKENS, 0)
        shown = "; ".join(
            f"{where}: {self._token(theirs, where)} {'is' if where < at else 'for'} {self._token(ours, where)}"
            for where in range(first, min(at + CONTEXT_TOKENS + 1, max(len(theirs), len(ours))))
        )
        raise UsageError(
            f"{location}: the server asked the target with {len(theirs)} tokens that differ from the {len(ours)} of "
            f"our chat template from token {at} on (position: the server's for ours): {shown}; a draft trained on this "
            "would be asked otherwise than it learned. Name the same target with --model and the server, the same "
            "--template-kwargs and chat template, and with --template-date the day where the template shows one"
        )

    def _token(self, ids: Sequence[int], at: int) -> str:
        return f"{ids[at]} {self.tokenizer.decode([ids[at]])!r}" if at < len(ids) else "nothing"
