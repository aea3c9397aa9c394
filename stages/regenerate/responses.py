"""Parse a server's response strictly: one reply, or `Malformed`, which is retried.

Token ids stand where each server puts them: vLLM's prompt ids beside `choices`, SGLang's inside the choice, the reply's
in the choice of both, as `token_ids` (`return_token_ids`).
"""

import json

from stages.regenerate.replies import Reply


class Malformed(Exception):
    """A malformed response; the request is retried."""


def read_answer(body: bytes) -> Reply:
    """Return the reply in the body of a chat completion. Malformed for anything else."""
    try:
        answer = json.loads(body, parse_constant=refuse_constant)
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


def refuse_constant(name: str):
    """Refuse NaN and the infinities, which Python would read and write, and JSON does not have. ValueError."""
    raise ValueError(f"{name} is no JSON")


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
