"""Conversations in, one at a time, from files or a hub's data set; what cannot be used is named by file and line.

A corpus is JSONL or Parquet with `messages` (role, content) or ShareGPT's `conversations` (from, value), a folder of
such files, or the name of a data set on the hub. Optional columns: `domain`, any text, `split`, train or heldout,
`system`, which becomes the first message unless that is one already, and `tools`, the list that the chat template shows
the target (or its JSON).
Nothing is ever held but the row at hand, so a corpus may be larger than memory.

The one rule: a row that is broken, or that says something we would have to guess at, is left out, counted and shown.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.manifest import FileFact
from pipeline.errors import DataError, UsageError
from pipeline.intake import Unusable

SUFFIXES = (".jsonl", ".parquet")
ROLES = {"system", "user", "assistant", "tool"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}
SPLITS = {"": "", "train": "train", "heldout": "heldout", "validation": "heldout", "test": "heldout"}
PASSED_ON = ("reasoning_content", "tool_calls", "tool_call_id", "name")  # what chat templates read besides
PARQUET_ROWS = 256


@dataclass(frozen=True)
class Conversation:
    """One usable row: messages with `role` and `content`, the last one a reply, and where it stood (line, from 1).

    tools: what the target may call, as the chat template takes it, or None.
    """

    messages: list[dict]
    domain: str
    split: str
    file: str
    line: int
    tools: list[dict] | None = None


@dataclass(frozen=True)
class Fault:
    """A row left out: a reason to count by, and the particulars."""

    reason: str
    detail: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.detail}"


def corpus_files(corpus: str) -> list[Path]:
    """Return the files of a corpus in order of name, none for a hub's data set.

    Raises UsageError when there is no such file, DataError when it is of another kind.
    """
    path = Path(corpus).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{corpus}: no {' or '.join(SUFFIXES)} file in that folder; name a folder of conversations")
        return files
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{corpus}: its name ends with none of {', '.join(SUFFIXES)}; rename or convert it")
        return [path]
    looks_like_a_path = path.is_absolute() or corpus.startswith((".", "~")) or path.suffix in SUFFIXES
    if looks_like_a_path or corpus.count("/") > 1:
        raise UsageError(f"{corpus}: no such corpus; name a file, a folder, or a data set of the hub like org/name")
    return []


def file_sources(corpus: str, files: list[Path]) -> list[dict]:
    """Return what the plan keeps of the files: name inside the corpus, size, digest. Reads every byte."""
    return [{"file": name_of(corpus, file), **FileFact.of_file(file).as_dict()} for file in files]


def name_of(corpus: str, file: Path) -> str:
    """Return a file's name as reports and the plan have it: relative to the corpus, since a cache holds no paths."""
    root = Path(corpus).expanduser()
    return file.relative_to(root).as_posix() if root.is_dir() else file.name


def read_files(corpus: str, files: list[Path]) -> Iterator[Conversation | Fault]:
    """Yield every row of the files, in order."""
    for file in files:
        rows = _jsonl_rows(file) if file.suffix == ".jsonl" else _parquet_rows(file)
        name = name_of(corpus, file)
        for line, row in rows:
            yield conversation(row, name, line)


def hub_dataset(corpus: str) -> tuple[Iterator[Conversation | Fault], dict]:
    """Return the rows of a hub data set's train split, streamed, and its source entry (name, revision).

    Raises UsageError when there is none; the rows raise DataError when they end early.
    """
    from datasets import load_dataset
    from huggingface_hub import HfApi

    try:
        revision = HfApi().dataset_info(corpus).sha
        rows = load_dataset(corpus, split="train", streaming=True, revision=revision, trust_remote_code=False)
    except _hub_errors() as error:
        raise UsageError(
            f"{corpus}: no such file or folder here, and the hub gave no such data set ({_line(error)}); "
            "check the name and the network, or pass --corpus with a file of conversations"
        ) from error
    return hub_rows(corpus, rows), {"dataset": corpus, "revision": revision}


def hub_rows(corpus: str, rows: Iterable[dict]) -> Iterator[Conversation | Fault]:
    """Yield the rows of a stream. DataError when the hub stops sending, or sends what is no row."""
    line = 0
    try:
        for line, row in enumerate(rows, 1):
            yield conversation(_without_absent(row), corpus, line)
    except _hub_errors() as error:
        raise DataError(
            f"{corpus}: the hub's rows end after {line:,} ({_line(error)}); run the same command again, or download "
            "the data set and pass --corpus with its files"
        ) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """Return what a data set of the hub can fail with: network, disk, its own files and its name."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError: of whichever client the hub uses

    return (OSError, HTTPError, DatasetsError, HFValidationError, ValueError)  # ValueError: pyarrow's, too


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160] or type(error).__name__


def _jsonl_rows(file: Path) -> Iterator[tuple[int, object]]:
    """Yield (line, object or Unusable) of every line that is not blank."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # broken JSON or UTF-8
                yield number, Unusable("broken line", f"no JSON ({str(error)[:80]})")


def _parquet_rows(file: Path) -> Iterator[tuple[int, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = ("messages", "conversations", "system", "domain", "split", "tools")
    try:
        with pq.ParquetFile(file) as table:
            columns = [name for name in wanted if name in table.schema_arrow.names]
            line = 0
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    line += 1
                    yield line, _without_absent(row)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: no readable Parquet ({str(error)[:160]}); write it again") from error


def _without_absent(value: object) -> object:
    """Return a row of a table without the keys that others have: Arrow gives every object all of them, as None."""
    if isinstance(value, dict):
        return {key: _without_absent(inner) for key, inner in value.items() if inner is not None}
    return [_without_absent(inner) for inner in value] if isinstance(value, list) else value


def conversation(row: object, file: str, line: int) -> Conversation | Fault:
    """Return a row of a corpus as a Conversation, or as the Fault it is."""
    try:
        if isinstance(row, Unusable):
            raise row
        if not isinstance(row, dict):
            raise Unusable("broken line", f"holds a {type(row).__name__}, wanted an object with `messages`")
        messages, tools = _messages(row), _tools(row.get("tools"))
        if not any(message["role"] == "assistant" and _has_text(message) for message in messages):
            raise Unusable("no reply", "has no assistant message with text; there is nothing to learn")
        domain, split = row.get("domain"), row.get("split")
        if not isinstance(split, str | None) or (split or "") not in SPLITS:
            raise Unusable("unknown split", f"split {split!r}; wanted one of {', '.join(filter(None, SPLITS))}")
        if not isinstance(domain, str | None):
            raise Unusable("unknown domain", f"domain {domain!r}; wanted a text")
        _check_encodes({"messages": messages, "domain": domain, "tools": tools})
        replies = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        return Conversation(messages[: replies[-1] + 1], domain or "", SPLITS[split or ""], file, line, tools)
    except Unusable as fault:
        return Fault(fault.reason, fault.detail, file, line)


def _check_encodes(kept: dict) -> None:
    """Refuse half a surrogate pair: JSON can say it, but no tokenizer or file takes it."""
    try:
        json.dumps(kept, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise Unusable("no text", f"holds half a surrogate pair ({error.object[error.start]!r}), no text") from error


def _tools(given: object) -> list[dict] | None:
    """Return the tools of a row, a list of objects or its JSON, as None where there are none."""
    tools = given
    if isinstance(given, str):
        try:
            tools = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError) as error:
            raise Unusable("tools", f"has `tools` that are no JSON ({str(error)[:80]})") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("tools", f"has `tools` that are no list of objects ({type(tools).__name__})")
    return tools


def _messages(row: dict) -> list[dict]:
    """Return the messages of a row, roles by their usual names, contents as text."""
    given = row.get("messages") or row.get("conversations")
    if not given or not isinstance(given, list):
        raise Unusable("no messages", "has neither `messages` nor `conversations` with anything in them")
    if row.get("messages") or _names_roles(given[0]):
        role_key, text_key, roles = "role", "content", {role: role for role in ROLES}
    else:
        role_key, text_key, roles = "from", "value", SHAREGPT_ROLES
    messages = [_message(entry, at, role_key, text_key, roles) for at, entry in enumerate(given)]
    system = row.get("system")
    if not isinstance(system, str | None):
        raise Unusable("no text", f"has `system` that is no text ({type(system).__name__})")
    if system and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _names_roles(entry: object) -> bool:
    """Return whether a message is in role and content, also under `conversations`."""
    return isinstance(entry, dict) and entry.get("from") is None and entry.get("role") is not None


def _message(entry: object, at: int, role_key: str, text_key: str, roles: dict[str, str]) -> dict:
    if not isinstance(entry, dict):
        raise Unusable("no messages", f"message {at} is a {type(entry).__name__}, wanted {role_key} and {text_key}")
    role = entry.get(role_key)
    if not isinstance(role, str) or role not in roles:
        raise Unusable("unknown role", f"message {at} has {role_key} {role!r}; wanted {', '.join(sorted(roles))}")
    kept = {key: entry[key] for key in PASSED_ON if entry.get(key) and text_key == "content"}
    return {"role": roles[role], "content": _text(entry.get(text_key), at, "tool_calls" in kept), **kept}


def _text(content: object, at: int, may_lack: bool) -> str:
    """Return a message's text; parts of type text are joined, anything else is not for a text model."""
    if isinstance(content, str):
        return content
    if content is None and may_lack:
        return ""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise Unusable("no text", f"message {at} has content that is no text ({type(content).__name__})")


def _has_text(message: dict) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))
