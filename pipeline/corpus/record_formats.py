"""Parses one record of a corpus, in any known form, into a Conversation or a RejectedRecord.

The first of these that a record has decides its form (a column that is None or empty counts as absent):

    input_ids + loss_mask           tokens, as speculators writes them after regenerating: taken as they are. The mask
                                    may also be `assistant_masks`, or `labels` with -100 where nothing is learned
    messages, conversations ...     (CHAT_COLUMNS) a list of messages (see `messages.py`), its JSON, an object of lists
    data                            texts, user and assistant alternating, as in UltraChat
    prompt + completion ...         (PAIR_COLUMNS) a question and its reply, each a text or messages; an input or
                                    context column is appended to the question. `history` comes before it
    a list                          the messages themselves

Other columns: `system` (or `system_prompt`) becomes the first message unless that is one already; `tools` (or
`functions`), a list or its JSON; `chat_template_kwargs`, an object or its JSON; `domain`, a text or a number; `split`
(see `split_of`); `regenerated`, as `pipeline regenerate` writes it; `id`, which that passes on; `status`: SpecForge and
DeepSpec write `success`, a record with `error` or `skipped` is rejected. All others are ignored.

For prompts only, replies are not read and may be absent: a question alone will do, or one message.

A record that is broken, or whose meaning would have to be guessed, is rejected, counted and shown.
"""

import re
from dataclasses import dataclass

from pipeline.corpus.messages import ROLES, check_depth, check_text, parse_message, parse_text, token_list
from pipeline.corpus.rejections import Unusable

CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
PAIR_COLUMNS = (  # question, context that is appended to it, reply
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "context", "response"),  # Dolly
    ("question", None, "response"),  # OpenOrca
    ("question", None, "answer"),
    ("query", None, "response"),
    ("input", None, "output"),
)
MASK_COLUMNS = ("loss_mask", "assistant_masks", "assistant_mask")
IGNORE_INDEX = -100  # in `labels`
SYSTEM_COLUMNS, TOOL_COLUMNS = ("system", "system_prompt"), ("tools", "functions")
OTHER_COLUMNS = (
    "input_ids",
    "labels",
    "data",
    "history",
    "chat_template_kwargs",
    "domain",
    "split",
    "regenerated",
    "status",
    "id",
)
KNOWN_COLUMNS = {*CHAT_COLUMNS, *MASK_COLUMNS, *SYSTEM_COLUMNS, *TOOL_COLUMNS, *OTHER_COLUMNS}
KNOWN_COLUMNS |= {name for pair in PAIR_COLUMNS for name in pair if name}
_FAILED = ("error", "skipped", "failed")
_HELDOUT = ("heldout", "holdout", "validation", "valid", "val", "dev", "eval", "test")
SPLITS = {**dict.fromkeys(("train", "training"), "train"), **dict.fromkeys(_HELDOUT, "heldout")}


@dataclass(frozen=True)
class Conversation:
    """One usable record: its messages as of `parse_message`, the last one a reply, with its file and line (from 1).

    tools: tool definitions for the chat template. template_kwargs: the record's own arguments for it. tokens: ids and
    mask of a record that came as tokens, whose messages are []. regenerated: what `pipeline regenerate` says of it.
    unknown: unknown keys of its messages. id: the record's own, for prompts only. None where the record has none.
    """

    messages: list[dict]
    domain: str
    split: str
    file: str
    line: int
    tools: list[dict] | None = None
    template_kwargs: dict | None = None
    tokens: tuple[list[int], list[bool]] | None = None
    regenerated: dict | None = None
    unknown: tuple[str, ...] = ()
    id: object = None


@dataclass(frozen=True)
class RejectedRecord:
    """A record that is left out. `reason`: the category it is counted under, `detail`: for people."""

    reason: str
    detail: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.detail}"


def parse_record(
    record: object, file: str, line: int, *, split: str = "", roles: dict[str, str] | None = None, prompts: bool = False
) -> Conversation | RejectedRecord:
    """Return a record of a corpus as a Conversation, or as a RejectedRecord with the reason.

    split: the file's, for a record without one. roles: names of roles, as `parse_roles` returns them (None: ROLES).
    prompts: read prompts only; the messages of assistant and tools are left without content.
    """
    try:
        return _parse(record, file, line, split, roles or ROLES, prompts)
    except Unusable as fault:
        return RejectedRecord(fault.reason, fault.detail, file, line)


def split_of(name: str) -> str | None:
    """Return the split that a name means by its first word: "train", "heldout" (as does `test_sft`), or "" for "".

    None for a name that means neither.
    """
    whole = name.strip().lower()
    return SPLITS.get(re.sub(r"[^a-z]", "", whole)) or SPLITS.get(re.split(r"[^a-z]", whole)[0]) if whole else ""


def _parse(record: object, file: str, line: int, split: str, roles: dict[str, str], prompts: bool) -> Conversation:
    if isinstance(record, Unusable):
        raise record
    record = {"messages": record} if _is_list_of_messages(record) else record
    if not isinstance(record, dict):
        raise Unusable("broken line", f"holds a {type(record).__name__}, wanted an object with `messages`")
    if record.get("status") in _FAILED and not prompts:
        raise Unusable(
            "failed reply", f"has status {record['status']!r}: it was not regenerated; leave it out, or ask again"
        )
    unknown: set[str] = set()
    tokens, messages = None if prompts else _tokens(record), []
    if tokens is None:
        messages = _messages(record, roles, unknown, prompts)
    if tokens is None and not prompts:
        _check_replies(messages)
        last = max(at for at, entry in enumerate(messages) if entry["role"] == "assistant")
        messages = messages[: last + 1]
    fields = {
        "tools": _tools(record),
        "template_kwargs": _object(record, "chat_template_kwargs"),
        "regenerated": _object(record, "regenerated"),
        "id": record.get("id") if prompts else None,
    }
    domain, split = _domain(record.get("domain")), _split(record.get("split"), split)
    return Conversation(messages, domain, split, file, line, tokens=tokens, unknown=tuple(sorted(unknown)), **fields)


def _is_list_of_messages(record: object) -> bool:
    return isinstance(record, list) and bool(record) and all(isinstance(entry, dict) for entry in record)


def _check_replies(messages: list[dict]) -> None:
    replies = [entry for entry in messages if entry["role"] == "assistant"]
    if not any(entry["content"].strip() or entry.keys() & {"tool_calls", "reasoning_content"} for entry in replies):
        raise Unusable("no reply", "has no assistant message with text; there is nothing to learn")
    if not any(entry.get("supervise", True) for entry in replies):
        raise Unusable("nothing supervised", "every assistant message is marked as not to be learned")


def _split(value: object, of_file: str) -> str:
    found = split_of(value) if isinstance(value, str) else None
    if value is not None and found is None:
        wanted = ", ".join(SPLITS)
        raise Unusable("unknown split", f"split {value!r:.60}; wanted one of {wanted}, or a name that begins so")
    return found or of_file


def _domain(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise Unusable("unknown domain", f"domain {value!r:.60}; wanted a text")
    return "" if value is None else check_text(str(value))


def _object(record: dict, column: str) -> dict | None:
    """Return a column that is an object or its JSON as a dict; None where it is absent. Raises Unusable."""
    value = record.get(column)
    if isinstance(value, str):
        value = parse_text(value, f"`{column}`") if value.strip() else None
    if value is not None and not isinstance(value, dict):
        raise Unusable("broken line", f"has `{column}` that is no object ({type(value).__name__})")
    check_depth(value, f"has `{column}`")
    return value or None


def _tools(record: dict) -> list[dict] | None:
    """Return the tools of a record, a list of objects or its JSON; None where it has none. Raises Unusable."""
    value = next((record[name] for name in TOOL_COLUMNS if record.get(name)), None)
    tools = value
    if isinstance(value, str):
        try:
            tools = parse_text(value, "`tools`") if value.strip() else None
        except Unusable as error:
            raise Unusable("tools", f"has `tools` that are no JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("tools", f"has `tools` that are no list of objects ({type(tools).__name__})")
    check_depth(tools, "has `tools`")
    return tools


def _tokens(record: dict) -> tuple[list[int], list[bool]] | None:
    """Return ids and loss mask of a record that came as tokens; None for any other. Raises Unusable."""
    mask_name = next((name for name in (*MASK_COLUMNS, "labels") if record.get(name) is not None), None)
    if not record.get("input_ids") or mask_name is None:
        return None
    ids, mask = token_list(record["input_ids"], "has `input_ids`"), record[mask_name]
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise Unusable("no tokens", f"has {len(ids)} `input_ids` and another number of `{mask_name}`")
    if mask_name == "labels":
        if any(label not in (IGNORE_INDEX, token) for label, token in zip(mask, ids, strict=True)):
            raise Unusable("no tokens", f"has `labels` that are neither {IGNORE_INDEX} nor the token at that place")
        return ids, [label != IGNORE_INDEX for label in mask]
    if any(type(entry) not in (int, bool) or entry not in (0, 1) for entry in mask):
        raise Unusable("no tokens", f"has `{mask_name}` with something else than 0 and 1 in it")
    return ids, [bool(entry) for entry in mask]


def _messages(record: dict, roles: dict[str, str], unknown: set[str], prompts: bool) -> list[dict]:
    """Return the messages of a record, parsed, the system prompt first. Raises Unusable for one of no known form."""
    value = _chat(record, prompts)
    if value is None:
        names = [str(name) for name, value in record.items() if value not in (None, "", [], {})]
        raise Unusable("no messages", _no_conversation(names))
    messages = [parse_message(entry, at, roles, unknown, prompts) for at, entry in enumerate(value)]
    system = next((record[name] for name in SYSTEM_COLUMNS if record.get(name) is not None), None)
    if not isinstance(system, str | None):
        raise Unusable("no text", f"has `system` that is no text ({type(system).__name__})")
    if system and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check_text(system)})
    return messages


def _chat(record: dict, prompts: bool) -> list | None:
    """Return the messages of a record, not parsed; None for a record of no known form."""
    for name in CHAT_COLUMNS:
        if record.get(name):
            return _as_list(record[name], name)
    texts = record.get("data")
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    pairs = [pair for pair in PAIR_COLUMNS if record.get(pair[0]) and (prompts or record.get(pair[2]))]
    if not pairs:
        return None
    question_column, context_column, reply_column = max(
        pairs, key=lambda pair: 2 if record.get(pair[2]) else bool(pair[1] and record.get(pair[1]))
    )
    question = _as_messages(record[question_column], "user", question_column)
    if context_column and record.get(context_column):
        if not isinstance(record[question_column], str) or not isinstance(record[context_column], str):
            raise Unusable("no text", f"has `{question_column}` and `{context_column}` that are not both text")
        question = _as_messages(f"{record[question_column]}\n{record[context_column]}", "user", question_column)
    reply = _as_messages(record[reply_column], "assistant", reply_column) if record.get(reply_column) else []
    return [*_history(record), *question, *reply]


def _as_list(value: object, name: str) -> list:
    """Return a column of messages as a list, from a list, its JSON, or an object of lists (as Arrow may store it)."""
    if isinstance(value, str):
        if not value.lstrip().startswith(("[", "{")):
            raise Unusable("no messages", f"has `{name}` that is one text ({value!r:.60}); wanted a list of messages")
        value = parse_text(value, f"`{name}`")
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise Unusable("no messages", f"has `{name}` whose {', '.join(map(str, value))} are not equally many")
        value = [dict(zip(value, values, strict=True)) for values in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise Unusable("no messages", f"has `{name}` that is no list of messages ({type(value).__name__})")
    return value


def _as_messages(value: object, role: str, name: str) -> list:
    """Return a question or a reply, given as a text or as messages, as a list of messages."""
    if isinstance(value, str) and not value.lstrip().startswith('[{"'):
        return [{"role": role, "content": value}]
    if isinstance(value, str):
        try:
            return _as_list(value, name)
        except Unusable:
            return [{"role": role, "content": value}]  # a text that only begins so
    return _as_list([value] if isinstance(value, dict) and "content" in value else value, name)


def _history(record: dict) -> list:
    """Return the `history` of an Alpaca record, pairs of question and reply, as messages."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Unusable("no messages", "has `history` that is no list of pairs, a question and its reply")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def columns_refusal(columns: list[str], prompts: bool = False) -> str:
    """Return why a table with these columns can have no conversations, or no prompts; empty where it can."""
    names = {*columns}
    pairs = any(
        question_column in names and (prompts or reply_column in names)
        for question_column, _, reply_column in PAIR_COLUMNS
    )
    if names & {*CHAT_COLUMNS, "data"} or pairs or ("input_ids" in names and names & {*MASK_COLUMNS, "labels"}):
        return ""
    return _no_conversation(columns)


def _no_conversation(names: list[str]) -> str:
    """Return the error message for a record of no known form: what columns it has, and what to do."""
    found = f"columns {', '.join(names)[:160]}" if names else "nothing in any column"
    if {"chosen", "rejected"} <= {*names}:
        what = "two replies to choose from; write the one that the target would give as `messages`"
    elif "text" in names:
        what = "`text` was rendered already and says nowhere where a prompt ends; write its `messages`"
    elif "input_ids" in names:
        what = "tokens without a `loss_mask`; write what is learned beside them"
    else:
        what = f"wanted one of {', '.join(CHAT_COLUMNS)}, or two such as prompt and completion, instruction and output"
    return f"holds no conversation, {found}: {what}"
