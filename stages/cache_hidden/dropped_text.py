"""Whether a rendering shows all that its row states: a template that drops a text drops it without a word.

Templates trim texts and write some of them as JSON; neither counts as a loss.
"""

import json
import re
from collections.abc import Iterator, Sequence

from pipeline.corpus.tally import Unusable
from stages.cache_hidden.turn_proof import PLACEHOLDER, ProvenTurn, RenderedChat, with_name_replaced
from stages.cache_hidden.turn_refusals import OPEN_THOUGHT

MAX_VERIFIED = 4096  # kept at a time
SPACE = re.compile(r"\s+")


def check_texts_rendered(chat: RenderedChat, turns: Sequence[ProvenTurn]) -> None:
    """Raise Unusable where a turn's prompt lacks a text of the messages before it, or its reply one of its own.

    turns: in their order; what stands in the text of one stands in every text that begins with it.
    """
    text, count = "", 0  # a text of a turn, and how many messages are shown in it
    for turn in turns:
        if not turn.prompt.startswith(text):
            count = 0
        _check_shown(chat, turn, count)
        text, count = turn.text, turn.at + 1


def _check_shown(chat: RenderedChat, proven: ProvenTurn, first: int) -> None:
    """Raise Unusable as `check_all_shown` does, for one turn, whose messages before `first` are known to be shown.

    Earlier thoughts may be absent: what a template drops of them, an engine does not send either.
    """
    prompt, reply, turn = proven.prompt, proven.reply, chat.messages[proven.at]
    for tool in chat.tools or [] if not first else []:
        for what, text in _tool_texts(tool):
            _check_rendered(text, prompt, what, "the prompt")
    for at, message in enumerate(chat.messages[first : proven.at], first):
        _check_rendered(
            message["content"], prompt, f"the text of message {at} ({message['role']})", "the prompt", thought=True
        )
        for what, text in _call_texts(message):
            _check_rendered(text, prompt, f"{what} of message {at}", "the prompt")
    _check_rendered(turn.get("reasoning_content"), reply, "the reasoning of the reply", "the reply")
    _check_rendered(_without_opening_tag(turn["content"], prompt), reply, "the text of the reply", "the reply")
    for what, text in _call_texts(turn):
        _check_rendered(text, reply, f"{what} of the reply", "the reply")


def check_each_text_rendered(chat: RenderedChat, at: int, verified: set[tuple]) -> None:
    """Raise Unusable where a text of the messages up to `at` is found only since another place says the same.

    A text is exchanged for the probe: where that changes nothing, it never came out. Once for each place in each kind
    of conversation; `proven` holds those, and is added to. Calls of one message have the same name mostly, so they are
    counted.
    """
    for number, message in enumerate(chat.messages[: at + 1]):
        if number in chat.rendered_messages:
            continue
        chat.rendered_messages.add(number)
        turn = number == at
        shown = chat.through(at) if turn else chat.prompt(at)
        for key in ("content", "reasoning_content") if turn else ("content",):
            text, context = (message.get(key) or "").strip(), (key, *_render_context(chat, at, number))
            if not text or context in verified:
                continue
            if _render_with(chat, at, number, {**message, key: PLACEHOLDER}) == shown:
                what = f"the {'reasoning' if key != 'content' else 'text'} of message {number} ({message['role']})"
                raise Unusable("lost text", f"{what} is not what the chat template shows; another place says the same")
            if len(verified) > MAX_VERIFIED:
                verified.clear()
            verified.add(context)
        calls = message.get("tool_calls") or []
        if len(calls) > 1:
            replaced = _render_with(
                chat, at, number, {**message, "tool_calls": [with_name_replaced(call) for call in calls]}
            )
            if replaced is not None and replaced.count(PLACEHOLDER) < len(calls):
                counts = f"of {len(calls)} tool calls of message {number}, the chat template shows "
                counts += f"{replaced.count(PLACEHOLDER)}"
                raise Unusable("lost text", f"{counts}; the target would not see the others")


def _render_context(chat: RenderedChat, at: int, number: int) -> tuple:
    """Return all by which templates choose what they show of a message, but for what it says."""
    around = chat.message_shapes[max(0, number - 1) : min(number + 2, at + 1)]
    return (min(number, 2), min(at - number, 2), bool(chat.tools), chat.kwargs_key, *around)


def _render_with(chat: RenderedChat, at: int, number: int, message: dict) -> str | None:
    """Return the rendering of message `at`, or of the prompt to it, with another message `number`; None for none."""
    before, after = chat.messages[:number], chat.messages[number + 1 : at]
    try:
        return chat.render([*before, message, *after], prompt=number != at)
    except Unusable:
        return None  # the template takes no such message, which says nothing of the row


def check_not_encoded_twice(messages: list[dict], text: str) -> None:
    """Raise Unusable where arguments that are JSON already were written as a JSON text once more."""
    if not any(message.get("tool_calls") for message in messages):
        return
    squeezed = SPACE.sub("", text)
    for message in messages:
        for call in message.get("tool_calls") or []:
            function = call.get("function") if isinstance(call.get("function"), dict) else call
            arguments = function.get("arguments")
            if isinstance(arguments, str) and SPACE.sub("", arguments) not in squeezed:
                raise Unusable("lost text", f"the arguments of tool call {function.get('name')} are encoded twice")


def _check_rendered(text: object, rendered: str, what: str, where: str, *, thought: bool = False) -> None:
    if not isinstance(text, str) or not text.strip() or is_rendered(rendered, text):
        return
    if thought and (content := _after_thought(text)) and is_rendered(rendered, content):
        return  # an earlier turn without the thought that its text began with
    raise Unusable("lost text", f"{what} is not in {where} that the chat template makes; the target would not see it")


def is_rendered(rendered: str, text: str) -> bool:
    """Return whether a text stands in a rendering: as it is, trimmed, as JSON, or with other white space."""
    text = text.strip()
    if text in rendered:
        return True
    forms = [text, *(json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))]
    squeezed = SPACE.sub("", rendered)
    return any(SPACE.sub("", form) in squeezed for form in forms)


def _without_opening_tag(content: str | None, prompt: str) -> str | None:
    """Return a reply's text without the tag of a thought that its prompt ends with already."""
    opened = OPEN_THOUGHT.search(prompt[-200:])
    return content.lstrip().removeprefix(opened[1]) if content and opened else content


def _after_thought(text: str) -> str:
    return re.split(r"</(?:\w+:)?think(?:ing)?>|\[/THINK\]|<channel\|>", text)[-1]


def _tool_texts(tool: dict) -> Iterator[tuple[str, str]]:
    """Yield what the target must be shown of a tool: its name."""
    function = tool.get("function") if isinstance(tool.get("function"), dict) else tool
    if isinstance(function.get("name"), str):
        yield f"tool {function['name']}", function["name"]


def _call_texts(message: dict) -> Iterator[tuple[str, str]]:
    """Yield every text of a message's tool calls: names, and the texts in their arguments."""
    for call in message.get("tool_calls") or []:
        function = call.get("function") if isinstance(call.get("function"), dict) else call
        if isinstance(function.get("name"), str):
            yield f"tool call {function['name']}", function["name"]
        arguments = function.get("arguments")
        for text in [arguments] if isinstance(arguments, str) else _texts_in(arguments):
            yield f"an argument of tool call {function.get('name')}", text


def _texts_in(value: object) -> Iterator[str]:
    """Yield the texts in a JSON value, names of fields among them; one that is JSON itself by what it holds."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name)
            yield from _texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_in(inner)
    elif isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict | list):
            yield from _texts_in(parsed)
        else:
            yield value
