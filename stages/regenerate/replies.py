"""The target's replies: one of them, a server's response parsed into one, and the journal that keeps all.

The journal of a regeneration, `OUT.journal`, has every reply as it arrives, one line each; none is requested twice. A
line is JSON, a tab, and the digest of that JSON. The first line is the header: target, engine, sampling, corpus. A line
that a kill or a full disk left unfinished is cut off and its reply requested again, as is a damaged one. The file is
locked while a process writes, and append-only.

Token ids stand where each server puts them: vLLM's prompt ids beside `choices`, SGLang's inside the choice, the reply's
in the choice of both, as `token_ids` (`return_token_ids`).
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from pipeline.cache.atomic import defer_signals, sync_folder, try_lock, write_all, write_errors
from pipeline.errors import UsageError
from pipeline.json_files import parse_strict_json

SYNC_S = 2.0  # between syncs: the most that a power failure loses
SEPARATOR = b"\t"
CUT, EMPTY = "length", "empty"  # values of `stop` that end a conversation; engines have others


@dataclass(frozen=True)
class Reply:
    """One reply of the target.

    stop: the finish reason: "stop", "length", "tool_calls", or another of the server. token_ids: the generated ids, the
    stop token included; prompt_token_ids: the prompt's; None where a server returns none. tokens: how many were
    generated, None where a server does not count.
    """

    content: str
    stop: str
    reasoning_content: str | None = None
    tool_calls: list[dict] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    tokens: int | None = None

    @property
    def empty(self) -> bool:
        return not (self.content.strip() or self.reasoning_content or self.tool_calls)

    @property
    def ends_conversation(self) -> bool:
        """Whether no further turn can follow: the reply is cut or empty, or calls a tool whose result is unknown."""
        return self.stop != "stop" or self.empty or bool(self.tool_calls)

    def message(self) -> dict:
        """Return the reply as a message for the prompts of later turns."""
        more = {"reasoning_content": self.reasoning_content, "tool_calls": self.tool_calls}
        return {"role": "assistant", "content": self.content, **{key: value for key, value in more.items() if value}}


class Malformed(Exception):
    """A malformed response; the request is retried."""


def read_answer(body: bytes) -> Reply:
    """Return the reply in the body of a chat completion. Malformed for anything else."""
    try:
        answer = parse_strict_json(body)
        json.dumps(answer, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Malformed(f"an answer that is no JSON text: {body[:60]!r}") from error
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Malformed(f"an answer without one choice: {body[:120]!r}")
    choice = choices[0]
    message, stop = choice.get("message"), choice.get("finish_reason")
    if not isinstance(message, dict) or not (isinstance(stop, str) and stop.isprintable()):
        raise Malformed(f"a choice without a message or without its end: {body[:120]!r}")
    ids, prompt_ids = _ids(choice, "token_ids"), _ids(choice, "prompt_token_ids") or _ids(answer, "prompt_token_ids")
    return Reply(
        content=_text(message, "content") or "",
        stop=stop,
        reasoning_content=_text(message, "reasoning_content") or _text(message, "reasoning"),
        tool_calls=_calls(message.get("tool_calls")),
        token_ids=ids,
        prompt_token_ids=prompt_ids,
        tokens=len(ids) if ids is not None else _count(answer.get("usage")),
    )


def _text(message: dict, key: str) -> str | None:
    text = message.get(key)
    if not isinstance(text, str | None):
        raise Malformed(f"a message with `{key}` that is a {type(text).__name__}")
    return text or None


def _ids(holder: dict, key: str) -> list[int] | None:
    ids = holder.get(key)
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise Malformed(f"`{key}` that are no token ids")
    return ids


def _count(usage: object) -> int | None:
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int else None


def _calls(calls: object) -> list[dict] | None:
    """Return a reply's tool calls, their arguments parsed where they are a JSON object."""
    if not calls:
        return None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Malformed("`tool_calls` that are no list of objects")
    return [_call(call) for call in calls]


def _call(call: dict) -> dict:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


class Journal:
    """Replies by corpus row key and turn; memory holds only their offsets. Open it with `with`.

    header: what decides every reply, compared with the file's. damaged: lines whose replies are requested again.
    """

    def __init__(self, path: Path, header: dict):
        self.path, self.header, self.damaged = path, header, 0
        self._spans: dict[bytes, list[tuple[int, int]]] = {}
        self._fd, self._end, self._synced = -1, 0, time.monotonic()

    def __enter__(self) -> "Journal":
        with write_errors(self.path, "the journal"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = try_lock(self.path)
        if fd is None:
            raise UsageError(f"{self.path}: another process writes it; wait for it, or name another --out")
        self._fd = fd
        try:
            self._read()
        except BaseException:
            os.close(fd)
            raise
        return self

    def __exit__(self, *_) -> None:
        os.close(self._fd)

    def __len__(self) -> int:
        return sum(map(len, self._spans.values()))

    def replies(self, key: str) -> list[Reply]:
        """Return the replies to a row, turn by turn, as far as there are any."""
        spans = self._spans.get(bytes.fromhex(key), ())
        return [Reply(**_parse_line(os.pread(self._fd, size, start))["reply"]) for start, size in spans]

    def add(self, key: str, turn: int, reply: Reply) -> None:
        """Append a reply. RoomError when the disk is full."""
        fields = {name: value for name, value in vars(reply).items() if value is not None}
        line = _line({"key": key, "turn": turn, "reply": fields})
        with write_errors(self.path, "a reply", len(line)), defer_signals():
            self._append(line)
        self._index(key, turn, len(line))

    def sync(self) -> None:
        with write_errors(self.path, "the journal"):
            os.fsync(self._fd)
        self._synced = time.monotonic()

    def _append(self, line: bytes) -> None:
        os.lseek(self._fd, self._end, os.SEEK_SET)
        try:
            write_all(self._fd, line)
        except OSError:
            os.ftruncate(self._fd, self._end)  # half a line would damage the next one
            raise
        if time.monotonic() - self._synced > SYNC_S:
            self.sync()

    def _index(self, key: str, turn: int, size: int) -> None:
        """Index a reply's offset and size. One out of order follows a lost reply, and is requested again."""
        spans = self._spans.setdefault(bytes.fromhex(key), [])
        if turn == len(spans):
            spans.append((self._end, size))
        self._end += size

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            first_line = next(file, b"")
            if not first_line.endswith(b"\n"):  # new, or killed within its first line
                return self._begin()
            header = _parse_line(first_line)
            if header is None or "head" not in header:
                raise UsageError(f"{self.path} is no journal of `pipeline regenerate`; name another --out")
            for name, there, here in _differences(header["head"], self.header):
                raise UsageError(
                    f"{self.path} holds replies with {name} {there}, and here it is {here}; name another --out, "
                    "or remove that file to ask everything again"
                )
            self._end = len(first_line)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                entry = _parse_line(line)
                if entry is None:
                    self.damaged += 1
                    self._end += len(line)
                else:
                    self._index(entry["key"], entry["turn"], len(line))
        with write_errors(self.path, "the journal"):
            os.ftruncate(self._fd, self._end)

    def _begin(self) -> None:
        line = _line({"head": self.header})
        with write_errors(self.path, "the journal", len(line)):
            os.ftruncate(self._fd, 0)
            self._append(line)
            self.sync()
            sync_folder(self.path.parent)
        self._end = len(line)


def _differences(found: dict, wanted: dict) -> Iterator[tuple[str, str, str]]:
    """Yield each key in which two headers differ, with both values as JSON."""
    for name in dict.fromkeys([*wanted, *found]):
        there, here = found.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(here, dict) and name == "regenerated":
            yield from _differences(there, here)
        elif there != here:
            yield name, json.dumps(there, sort_keys=True), json.dumps(here, sort_keys=True)


def _line(entry: dict) -> bytes:
    data = json.dumps(entry, ensure_ascii=False).encode()
    return data + SEPARATOR + _digest(data) + b"\n"


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).hexdigest().encode()


def _parse_line(line: bytes) -> dict | None:
    """Return the entry of a line, None when it is damaged."""
    data, _, digest = line.rstrip(b"\n").rpartition(SEPARATOR)
    return json.loads(data) if data and _digest(data) == digest else None
