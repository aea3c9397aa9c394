"""Prompts out of a corpus: what the user said, turn by turn, without the replies that stood there.

A row is JSON with `messages` (role, content), ShareGPT's `conversations` (from, value), or `prompt`, a text. Of a row
with what a tool returned only the turns before it are asked: what comes after answers a call that the target may not
make. Optional: `system`, `tools`, `chat_template_kwargs`; `id`, `domain` and `split` are passed on.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.intake import Tally, Unusable
from stages.regenerate.answers import no_number

ROLES = {"system", "developer", "user", "assistant", "tool"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}
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


def read_prompts(corpus: Path, tally: Tally | None = None) -> Iterator[PromptRow]:
    """Yield the prompts of every usable row in order; count the others, and what was cut, in `tally`."""
    seen: Counter[str] = Counter()
    tally = Tally() if tally is None else tally
    try:
        with corpus.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                tally.rows += 1
                place = f"{corpus.name}:{number}"
                try:
                    yield _prompt_row(_parsed(line), place, seen, tally)
                except Unusable as fault:
                    tally.fault(fault.reason, f"{place}: {fault.detail}")
    except OSError as error:
        raise UsageError(f"{corpus}: cannot be read ({error.strerror}); pass --corpus with a JSONL file") from error


def _parsed(line: bytes) -> dict:
    try:
        row = json.loads(line, parse_constant=no_number)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, and no text
    except (ValueError, RecursionError) as error:
        raise Unusable("broken line", f"no JSON text ({str(error)[:80]})") from error
    if not isinstance(row, dict):
        raise Unusable("broken line", f"holds a {type(row).__name__}, wanted an object with `messages`")
    return row


def _prompt_row(row: dict, place: str, seen: Counter, tally: Tally) -> PromptRow:
    segments, cuts = _segments(_messages(row))
    tools = _loaded(row.get("tools"), list, "tools")
    kwargs = _loaded(row.get("chat_template_kwargs"), dict, "chat_template_kwargs")
    decides = json.dumps([segments, tools, kwargs], sort_keys=True, ensure_ascii=False).encode()
    same = blake2b(decides, digest_size=16).hexdigest()
    key = blake2b(f"{same} {seen[same]}".encode(), digest_size=16).hexdigest()
    seen[same] += 1
    for cut in cuts:
        tally.show(cut, f"{place}: {cut}")
        tally.truncated += cut == AT_A_TOOL
    kept = {name: row[name] for name in PASSED_ON if row.get(name) is not None}
    return PromptRow(key, place, segments, tools, kwargs, kept)


def _loaded(given: object, kind: type, name: str) -> list | dict | None:
    """Return a field that may be JSON itself, None where it is empty."""
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError) as error:
            raise Unusable(name, f"has `{name}` that is no JSON ({str(error)[:80]})") from error
    if not given:
        return None
    if not isinstance(given, kind) or (kind is list and not all(isinstance(entry, dict) for entry in given)):
        raise Unusable(name, f"has `{name}` of another kind ({type(given).__name__})")
    return given


def _messages(row: dict) -> list[dict]:
    """Return the row's messages, roles by their usual names, contents as text."""
    given = row.get("messages") or row.get("conversations")
    if given is None and isinstance(row.get("prompt"), str) and row["prompt"].strip():
        given = [{"role": "user", "content": row["prompt"]}]
    if not given or not isinstance(given, list):
        raise Unusable("no messages", "has none of `messages`, `conversations` and `prompt` with anything in them")
    messages = [_message(entry, at) for at, entry in enumerate(given)]
    system = row.get("system")
    if not isinstance(system, str | None):
        raise Unusable("no text", f"has `system` that is no text ({type(system).__name__})")
    if system and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _message(entry: object, at: int) -> dict:
    if not isinstance(entry, dict):
        raise Unusable("no messages", f"message {at} is a {type(entry).__name__}, wanted role and content")
    named = entry.get("role") is not None or entry.get("from") is None
    role, roles = (entry.get("role"), {role: role for role in ROLES}) if named else (entry["from"], SHAREGPT_ROLES)
    if not isinstance(role, str) or role not in roles:
        raise Unusable("unknown role", f"message {at} has role {role!r}; wanted {', '.join(sorted(roles))}")
    role, content = roles[role], entry.get("content" if named else "value")
    if role in ("assistant", "tool"):
        return {"role": role}  # asked again, or behind what is asked
    name = {"name": entry["name"]} if isinstance(entry.get("name"), str) else {}
    return {"role": role, "content": _text(content, at), **name}


def _text(content: object, at: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise Unusable("no text", f"message {at} has content that is no text ({type(content).__name__})")


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
