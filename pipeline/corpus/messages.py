"""Parses one message of a record, in any known form, into the form that chat templates take.

ROLES maps the names that corpora use to roles; `--roles A=B` adds to it. The keys of a message:

    role, from                         the role
    content, value, text               the text: a string, or parts of type text, input_text or output_text
    reasoning_content, reasoning ...   (REASONING_KEYS) the reasoning before the reply
    tool_calls, function_call          the tool calls, arguments as an object
    tool_call_id, name                 the call that a tool answers, the speaker's name
    weight, train, training, loss ...  (SUPERVISED_KEYS) whether the reply is to be learned
    token_ids, prompt_token_ids        the ids that an engine generated, and those of its prompt
    id, timestamp, model ...           (METADATA_KEYS) irrelevant to the target: ignored
    refusal, audio, images ...         (REFUSED_KEYS) the record is rejected

Any other key with a value is counted by name and ignored. None, "", [] and {} are no values.
"""

import json

from pipeline.corpus.rejections import Unusable
from pipeline.json_files import refuse_constant

STANDARD_ROLES = ("system", "developer", "user", "assistant", "tool")
CALL_ROLE = "function_call"  # the role of an assistant message whose text is a tool call
ROLES = {
    **{role: role for role in STANDARD_ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(
        ("function", "observation", "function_response", "tool_response", "tool_result", "ipython"), "tool"
    ),
    **dict.fromkeys((CALL_ROLE, "tool_call"), CALL_ROLE),
}
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "thinking_content")
SUPERVISED_KEYS = ("weight", "train", "training", "loss", "trainable", "supervise")
ID_KEYS = ("token_ids", "prompt_token_ids")
METADATA_KEYS = (
    *("id", "uuid", "message_id", "parent_id", "index", "turn", "timestamp", "created", "created_at", "type", "object"),
    *("model", "finish_reason", "stop_reason", "logprobs", "usage", "annotations", "metadata", "language", "lang"),
    *("hash", "ip", "country", "redacted", "toxic", "token_count", "status", "train_detail", "training_detail"),
)
REFUSED_KEYS = ("refusal", "audio", "image", "images", "image_url", "video", "videos", "file", "files")
TEXT_PARTS = (None, "text", "input_text", "output_text")
_PLAIN = {"role", "content"}
MAX_DEPTH = 64  # of nested objects and lists: templates and JSON recurse over them
_KNOWN = {*ROLE_KEYS, *TEXT_KEYS, *REASONING_KEYS, *SUPERVISED_KEYS, *ID_KEYS, *METADATA_KEYS}
_KNOWN |= {"tool_calls", "function_call", "tool_call_id", "name"}


def parse_json(text: str) -> object:
    """Return the value of a JSON text. ValueError for a duplicate key, NaN and infinities; RecursionError."""
    return _DECODER.decode(text)


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object; say it once")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=refuse_constant)


def parse_text(text: str, what: str) -> object:
    """Return the value of a JSON text inside a record; Unusable, naming it by `what`, where it is no JSON."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise Unusable("broken line", f"has {what} that is no JSON ({str(error)[:80]})") from error


def parse_message(entry: object, at: int, roles: dict[str, str], unknown: set[str], prompts: bool = False) -> dict:
    """Return message `at` of a record with standard role and keys; unknown keys are added to `unknown`.

    roles: maps names to roles, as ROLES. prompts: of messages of assistant and tools, only the role is returned.
    Raises Unusable.
    """
    if not isinstance(entry, dict):
        kind = type(entry).__name__
        raise Unusable("no messages", f"message {at} is a {kind}, wanted an object with role and content")
    if not prompts and entry.keys() == _PLAIN and (plain := _plain_message(entry, roles)):
        return plain
    role = _role(entry, at, roles)
    result = {"role": "assistant" if role == CALL_ROLE else role}
    if prompts and result["role"] in ("assistant", "tool"):
        return result
    text, thought = _content(entry, at)
    if not _KNOWN.issuperset(entry):
        _check_other_keys(entry, at, unknown)
    if thought := _thought(entry, thought, at):
        result["reasoning_content"] = thought
    if calls := _calls(entry, at):
        result["tool_calls"] = calls
    elif role == CALL_ROLE and text:
        calls = _calls_in_text(text)
        result, text = ({**result, "tool_calls": calls}, "") if calls else (result, text)
    if text is None:
        if not result.keys() & {"tool_calls", "reasoning_content"}:
            raise Unusable("no text", f"message {at} has content that is no text (NoneType)")
        text = ""
    result["content"] = text
    for key in ("tool_call_id", "name"):
        if entry.get(key) not in (None, ""):
            result[key] = _checked_text(entry[key], f"message {at} has {key}")
    for key in ID_KEYS:
        if entry.get(key):
            result[key] = token_list(entry[key], f"message {at} has {key}")
    if result["role"] == "assistant" and not _is_supervised(entry, at):
        result["supervise"] = False
    return result


def _plain_message(entry: dict, roles: dict[str, str]) -> dict | None:
    """Return a message that has only role and text, as nearly all do; None for any other. A fast path."""
    role, text = entry["role"], entry["content"]
    if type(text) is str and type(role) is str and (known := roles.get(role)) is not None and known != CALL_ROLE:
        return {"role": known, "content": check_text(text)}
    return None


def _role(entry: dict, at: int, roles: dict[str, str]) -> str:
    named = [(key, entry[key]) for key in ROLE_KEYS if entry.get(key) is not None]
    found = []
    for key, name in named or [("role", None)]:
        known = roles.get(name.strip().lower()) if isinstance(name, str) else None
        if known is None:
            wanted = ", ".join(sorted(roles))
            raise Unusable("unknown role", f"message {at} has {key} {name!r:.60}; wanted {wanted}, or pass --roles A=B")
        found.append(known)
    if len({*found}) > 1:
        raise Unusable("unknown role", f"message {at} has {' and '.join(f'{key} {name!r}' for key, name in named)}")
    return found[0]


def _content(entry: dict, at: int) -> tuple[str | None, str | None]:
    """Return a message's text, None where it has none, and the reasoning among its parts, None without any."""
    values = [entry[key] for key in TEXT_KEYS if entry.get(key) is not None]
    if not values:
        return None, None
    content = values[0]
    if any(other != content for other in values[1:]):
        raise Unusable("no text", f"message {at} states two texts, under {' and '.join(TEXT_KEYS)}; keep one")
    if isinstance(content, str):
        return check_text(content), None
    if not isinstance(content, list) or not content:
        raise Unusable("no text", f"message {at} has content that is no text ({type(content).__name__})")
    parts = [_part(part, at) for part in content]
    thought = "".join(text for kind, text in parts if kind == "thinking")
    return "".join(text for kind, text in parts if kind == "text"), thought or None


def _part(part: object, at: int) -> tuple[str, str]:
    """Return a part of a content as ("text" or "thinking", its text). Unusable for a part of another type."""
    if isinstance(part, str):
        return "text", check_text(part)
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if isinstance(part, dict) and kind in ("thinking", "reasoning"):
        return "thinking", _checked_text(part.get(kind, part.get("text")), f"message {at} has a part of type {kind}")
    if not isinstance(part, dict) or kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        wanted = ", ".join(filter(None, TEXT_PARTS))
        raise Unusable("no text", f"message {at} has a part of type {kind!r:.60} that is no text; wanted {wanted}")
    return "text", check_text(part["text"])


def _check_other_keys(entry: dict, at: int, unknown: set[str]) -> None:
    for key in entry.keys() - _KNOWN:
        if entry[key] in (None, "", [], {}):
            continue
        if key in REFUSED_KEYS:
            raise Unusable(
                "no text", f"message {at} has `{key}`, which a text model neither reads nor says; leave it out"
            )
        unknown.add(check_text(str(key)))


def _thought(entry: dict, in_parts: str | None, at: int) -> str | None:
    """Return the reasoning of a message, under any of its names; None without any. Unusable for two different ones."""
    values = [text for text in [in_parts, *(entry.get(key) for key in REASONING_KEYS)] if text not in (None, "")]
    if any(other != values[0] for other in values[1:]):
        raise Unusable(
            "no text", f"message {at} states two thoughts, under two of {', '.join(REASONING_KEYS)}; keep one"
        )
    return _checked_text(values[0], f"message {at} has reasoning") if values else None


def _is_supervised(entry: dict, at: int) -> bool:
    """Return whether a reply is to be learned; 0 and false mean no. Unusable for anything but 0, 1, true and false."""
    values = {key: entry[key] for key in SUPERVISED_KEYS if entry.get(key) is not None}
    for key, value in values.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise Unusable("unknown weight", f"message {at} has {key} {value!r:.60}; wanted 0, 1, true or false")
    if len({bool(value) for value in values.values()}) > 1:
        raise Unusable("unknown weight", f"message {at} is to be learned and is not: {values}")
    return all(values.values())


def _calls(entry: dict, at: int) -> list[dict]:
    """Return the tool calls of a message, each {type, function: {name, arguments}}, arguments an object."""
    calls = entry.get("tool_calls")
    if isinstance(calls, str):
        calls = parse_text(calls, "`tool_calls`") if calls.strip() else None
    if not calls and entry.get("function_call"):
        calls = [entry["function_call"]]
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Unusable("tools", f"message {at} has `tool_calls` that are no list of objects ({type(calls).__name__})")
    check_depth(calls, f"message {at} has `tool_calls`")
    return [_call(call, at) for call in calls]


def _call(call: dict, at: int) -> dict:
    function = call.get("function")
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    if function is None or isinstance(function, str):
        function = {"name": function or call.get("name"), "arguments": call.get("arguments")}
        rest = {key: value for key, value in rest.items() if key in ("id", "type", "index")}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable("tools", f"message {at} has a tool call without a function's name")
    return {"type": "function", **rest, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(value: object) -> object:
    """Return the arguments of a call as an object, parsed if they are its JSON; other text is returned unchanged."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if not isinstance(value, str):
        return value
    try:
        found = parse_json(value)
        check_depth(found, "")
    except (ValueError, RecursionError, Unusable):
        return value
    return found if isinstance(found, dict) else value


def _calls_in_text(text: str) -> list[dict]:
    """Return the tool calls in a text of role `function_call`, which is their JSON; none where it is other text."""
    try:
        parsed = parse_json(text)
        calls = parsed if isinstance(parsed, list) else [parsed]
        return _calls({"tool_calls": calls}, 0) if all("name" in call or "function" in call for call in calls) else []
    except (ValueError, RecursionError, TypeError, Unusable):
        return []


def token_list(value: object, what: str) -> list[int]:
    """Return a list of token ids unchanged. Unusable for anything else; `what` names it."""
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        raise Unusable("no tokens", f"{what} that is no list of token ids")
    return value


def _checked_text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise Unusable("no text", f"{what} that is no text ({type(value).__name__})")
    return check_text(value)


def check_text(text: str) -> str:
    """Return a valid text unchanged. Unusable for a lone surrogate: JSON can have it, tokenizers and files cannot."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Unusable("no text", f"holds half a surrogate pair ({text[error.start]!r}), no text") from error
    return text


def check_depth(value: object, what: str, depth: int = MAX_DEPTH) -> None:
    """Raise Unusable for a value nested deeper than `depth`, since others recurse over it, and for invalid texts."""
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, dict | list):
        if not depth:
            raise Unusable("too deep", f"{what} nested more than {MAX_DEPTH} deep")
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            check_depth(inner, what, depth - 1)
