"""One row of a corpus, in any form that is about, as a Conversation or as the Fault it is.

The first of these that a row holds is what it is (a column that is None or empty is not held):

    input_ids + loss_mask           tokens, as speculators writes them after regenerating: taken as they are. The mask
                                    may also be `assistant_masks`, or `labels` with -100 where nothing is learned
    messages, conversations ...     (CHATS) a list of messages (see `messages.py`), its JSON, or an object of lists
    data                            texts in turn, the user's first, as UltraChat has them
    prompt + completion ...         (PAIRS) a question and its reply, each a text or messages; what stands in the second
                                    column, an input or a context, goes below the question. `history` comes before it
    a list                          the messages themselves

Columns beside it: `system` (or `system_prompt`) becomes the first message unless that is one already; `tools` (or
`functions`), a list or its JSON; `chat_template_kwargs`, an object or its JSON; `domain`, a text or a number; `split`
(see `split_of`); `regenerated`, as `pipeline regenerate` writes it; `id`, which that passes on; `status`: SpecForge and
DeepSpec write `success`, a row with `error` or `skipped` is left out. All others are passed over.

Where only prompts are wanted, replies are not read and need not be there: a question alone will do, or one message.

The one rule: a row that is broken, or that says something we would have to guess at, is left out, counted and shown.
"""

import re
from dataclasses import dataclass

from pipeline.corpus.messages import ROLES, check_nested, check_text, message, parse_text, token_list
from pipeline.corpus.tally import Unusable

CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
PAIRS = (  # question, what goes below it, reply
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "context", "response"),  # Dolly
    ("question", None, "response"),  # OpenOrca
    ("question", None, "answer"),
    ("query", None, "response"),
    ("input", None, "output"),
)
MASKS = ("loss_mask", "assistant_masks", "assistant_mask")
UNLEARNED = -100  # in `labels`
SYSTEMS, TOOLS = ("system", "system_prompt"), ("tools", "functions")
OTHERS = (
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
COLUMNS = {*CHATS, *MASKS, *SYSTEMS, *TOOLS, *OTHERS, *(name for pair in PAIRS for name in pair if name)}
_FAILED = ("error", "skipped", "failed")
_HELDOUT = ("heldout", "holdout", "validation", "valid", "val", "dev", "eval", "test")
SPLITS = {**dict.fromkeys(("train", "training"), "train"), **dict.fromkeys(_HELDOUT, "heldout")}


@dataclass(frozen=True)
class Conversation:
    """One usable row: messages as `messages.py` makes them, the last one a reply, and where it stood (line, from 1).

    tools: what the target may call, as the chat template takes it. template_kwargs: the row's own arguments of the
    template. tokens: ids and mask of a row that came as tokens, whose messages are []. regenerated: what `pipeline
    regenerate` noted of it. unknown: keys of its messages that nobody knows. id: the row's own, where prompts
    are wanted. None where the row states none.
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
class Fault:
    """A row left out: a reason to count by, and the particulars."""

    reason: str
    detail: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.detail}"


def conversation(
    row: object, file: str, line: int, *, split: str = "", roles: dict[str, str] | None = None, prompts: bool = False
) -> Conversation | Fault:
    """Return a row of a corpus as a Conversation, or as the Fault it is.

    split: of the file, where the row states none. roles: names beyond ROLES, as `with_roles` returns them. prompts:
    only what is asked is wanted; what the assistant and tools say is left out of their messages.
    """
    try:
        return _conversation(row, file, line, split, roles or ROLES, prompts)
    except Unusable as fault:
        return Fault(fault.reason, fault.detail, file, line)


def split_of(name: str) -> str | None:
    """Return "train", "heldout" or (for "") "" for a split's name, by its first word: `test_sft` is heldout.

    None for a name that says neither.
    """
    whole = name.strip().lower()
    return SPLITS.get(re.sub(r"[^a-z]", "", whole)) or SPLITS.get(re.split(r"[^a-z]", whole)[0]) if whole else ""


def _conversation(row: object, file: str, line: int, split: str, roles: dict[str, str], prompts: bool) -> Conversation:
    if isinstance(row, Unusable):
        raise row
    row = {"messages": row} if _is_list_of_messages(row) else row
    if not isinstance(row, dict):
        raise Unusable("broken line", f"holds a {type(row).__name__}, wanted an object with `messages`")
    if row.get("status") in _FAILED and not prompts:
        raise Unusable(
            "failed reply", f"has status {row['status']!r}: it was not regenerated; leave it out, or ask again"
        )
    unknown: set[str] = set()
    tokens, messages = None if prompts else _tokens(row), []
    if tokens is None:
        messages = _messages(row, roles, unknown, prompts)
    if tokens is None and not prompts:
        _check_replies(messages)
        last = max(at for at, one in enumerate(messages) if one["role"] == "assistant")
        messages = messages[: last + 1]
    said = {
        "tools": _tools(row),
        "template_kwargs": _object(row, "chat_template_kwargs"),
        "regenerated": _object(row, "regenerated"),
        "id": row.get("id") if prompts else None,
    }
    domain, split = _domain(row.get("domain")), _split(row.get("split"), split)
    return Conversation(messages, domain, split, file, line, tokens=tokens, unknown=tuple(sorted(unknown)), **said)


def _is_list_of_messages(row: object) -> bool:
    return isinstance(row, list) and bool(row) and all(isinstance(one, dict) for one in row)


def _check_replies(messages: list[dict]) -> None:
    replies = [one for one in messages if one["role"] == "assistant"]
    if not any(one["content"].strip() or one.keys() & {"tool_calls", "reasoning_content"} for one in replies):
        raise Unusable("no reply", "has no assistant message with text; there is nothing to learn")
    if not any(one.get("supervise", True) for one in replies):
        raise Unusable("nothing supervised", "every assistant message is marked as not to be learned")


def _split(given: object, of_file: str) -> str:
    found = split_of(given) if isinstance(given, str) else None
    if given is not None and found is None:
        wanted = ", ".join(SPLITS)
        raise Unusable("unknown split", f"split {given!r:.60}; wanted one of {wanted}, or a name that begins so")
    return found or of_file


def _domain(given: object) -> str:
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        raise Unusable("unknown domain", f"domain {given!r:.60}; wanted a text")
    return "" if given is None else check_text(str(given))


def _object(row: dict, column: str) -> dict | None:
    """Return a column that is an object or its JSON; None where there is none."""
    given = row.get(column)
    if isinstance(given, str):
        given = parse_text(given, f"`{column}`") if given.strip() else None
    if given is not None and not isinstance(given, dict):
        raise Unusable("broken line", f"has `{column}` that is no object ({type(given).__name__})")
    check_nested(given, f"has `{column}`")
    return given or None


def _tools(row: dict) -> list[dict] | None:
    """Return the tools of a row, a list of objects or its JSON, as None where there are none."""
    given = next((row[name] for name in TOOLS if row.get(name)), None)
    tools = given
    if isinstance(given, str):
        try:
            tools = parse_text(given, "`tools`") if given.strip() else None
        except Unusable as error:
            raise Unusable("tools", f"has `tools` that are no JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("tools", f"has `tools` that are no list of objects ({type(tools).__name__})")
    check_nested(tools, "has `tools`")
    return tools


def _tokens(row: dict) -> tuple[list[int], list[bool]] | None:
    """Return ids and mask of a row that was tokenised before; None for a row that was not."""
    mask_name = next((name for name in (*MASKS, "labels") if row.get(name) is not None), None)
    if not row.get("input_ids") or mask_name is None:
        return None
    ids, mask = token_list(row["input_ids"], "has `input_ids`"), row[mask_name]
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise Unusable("no tokens", f"has {len(ids)} `input_ids` and another number of `{mask_name}`")
    if mask_name == "labels":
        if any(label not in (UNLEARNED, token) for label, token in zip(mask, ids, strict=True)):
            raise Unusable("no tokens", f"has `labels` that are neither {UNLEARNED} nor the token at that place")
        return ids, [label != UNLEARNED for label in mask]
    if any(type(one) not in (int, bool) or one not in (0, 1) for one in mask):
        raise Unusable("no tokens", f"has `{mask_name}` with something else than 0 and 1 in it")
    return ids, [bool(one) for one in mask]


def _messages(row: dict, roles: dict[str, str], unknown: set[str], prompts: bool) -> list[dict]:
    """Return the messages of a row, roles and keys by one name each. Unusable for a row of no known form."""
    given = _chat(row, prompts)
    if given is None:
        held = [str(name) for name, value in row.items() if value not in (None, "", [], {})]
        raise Unusable("no messages", _no_conversation(held))
    messages = [message(entry, at, roles, unknown, prompts) for at, entry in enumerate(given)]
    system = next((row[name] for name in SYSTEMS if row.get(name) is not None), None)
    if not isinstance(system, str | None):
        raise Unusable("no text", f"has `system` that is no text ({type(system).__name__})")
    if system and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check_text(system)})
    return messages


def _chat(row: dict, prompts: bool) -> list | None:
    """Return the messages of a row as it has them, None where it is of no known form."""
    for name in CHATS:
        if row.get(name):
            return _listed(row[name], name)
    if isinstance(row.get("data"), list) and row["data"] and all(isinstance(text, str) for text in row["data"]):
        return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(row["data"])]
    pairs = [pair for pair in PAIRS if row.get(pair[0]) and (prompts or row.get(pair[2]))]
    if not pairs:
        return None
    asked, below, replied = max(pairs, key=lambda pair: 2 if row.get(pair[2]) else bool(pair[1] and row.get(pair[1])))
    question = _said(row[asked], "user", asked)
    if below and row.get(below):
        if not isinstance(row[asked], str) or not isinstance(row[below], str):
            raise Unusable("no text", f"has `{asked}` and `{below}` that are not both text")
        question = _said(f"{row[asked]}\n{row[below]}", "user", asked)
    reply = _said(row[replied], "assistant", replied) if row.get(replied) else []
    return [*_history(row), *question, *reply]


def _listed(given: object, name: str) -> list:
    """Return a column of messages as a list: it may be JSON text, or an object of lists, as Arrow may have it."""
    if isinstance(given, str):
        if not given.lstrip().startswith(("[", "{")):
            raise Unusable("no messages", f"has `{name}` that is one text ({given!r:.60}); wanted a list of messages")
        given = parse_text(given, f"`{name}`")
    if isinstance(given, dict) and given and all(isinstance(column, list) for column in given.values()):
        if len({len(column) for column in given.values()}) > 1:
            raise Unusable("no messages", f"has `{name}` whose {', '.join(map(str, given))} are not equally many")
        given = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    if not isinstance(given, list) or not given:
        raise Unusable("no messages", f"has `{name}` that is no list of messages ({type(given).__name__})")
    return given


def _said(given: object, role: str, name: str) -> list:
    """Return a question or a reply, a text or messages, as messages."""
    if isinstance(given, str) and not given.lstrip().startswith('[{"'):
        return [{"role": role, "content": given}]
    if isinstance(given, str):
        try:
            return _listed(given, name)
        except Unusable:
            return [{"role": role, "content": given}]  # a text that only begins so
    return _listed([given] if isinstance(given, dict) and "content" in given else given, name)


def _history(row: dict) -> list:
    """Return what came before an Alpaca row's question: pairs of question and reply."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Unusable("no messages", "has `history` that is no list of pairs, a question and its reply")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def refused_columns(columns: list[str], prompts: bool = False) -> str:
    """Return why a table with these columns can hold no conversation, or no prompts; empty where it can."""
    held = {*columns}
    pairs = any(asked in held and (prompts or replied in held) for asked, _, replied in PAIRS)
    if held & {*CHATS, "data"} or pairs or ("input_ids" in held and held & {*MASKS, "labels"}):
        return ""
    return _no_conversation(columns)


def _no_conversation(held: list[str]) -> str:
    """Return the refusal of a row of no known form: what columns it holds, and what to do."""
    found = f"columns {', '.join(held)[:160]}" if held else "nothing in any column"
    if {"chosen", "rejected"} <= {*held}:
        what = "two replies to choose from; write the one that the target would give as `messages`"
    elif "text" in held:
        what = "`text` was rendered already and says nowhere where a prompt ends; write its `messages`"
    elif "input_ids" in held:
        what = "tokens without a `loss_mask`; write what is learned beside them"
    else:
        what = f"wanted one of {', '.join(CHATS)}, or two such as prompt and completion, instruction and output"
    return f"holds no conversation, {found}: {what}"
