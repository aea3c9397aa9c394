"""One reply of the target, as the journal and the corpus store it, and a server's response parsed into one.

Token ids stand where each server puts them: vLLM's prompt ids beside `choices`, SGLang's inside the choice, the reply's
in the choice of both, as `token_ids` (`return_token_ids`).
"""

import json
from dataclasses import dataclass

from pipeline.untrusted import parse_strict_json

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

    def as_dict(self) -> dict:
        """Return the fields that are not None, for the journal."""
        return {key: value for key, value in vars(self).items() if value is not None}


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
