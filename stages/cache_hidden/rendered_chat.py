"""What the chat template renders of a conversation, and the check that it renders every text of it.

A template may drop a text silently (the fault "lost text"). Templates trim texts and write some of them as JSON;
neither counts as dropped. Where a text may occur twice, the conversation is rendered once more with a unique
placeholder instead of it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.corpus.rejections import Unusable
from pipeline.target.chat_template import ChatTemplate

PLACEHOLDER = "qZprobe7Xw"  # rendered instead of a text to find its position; unchanged by trimming and JSON
MAX_VERIFIED = 4096  # entries of the set in `check_each_text_rendered`
SPACE = re.compile(r"\s+")

# Tags of a thinking block. Used only for prompts that open one and for templates that never render what is in it.
THOUGHT = r"[<\[][\w:|]*?(?:think|thinking|thought|reasoning)[\w:|]*[>\]]"
OPEN_THOUGHT = re.compile(rf"({THOUGHT})\s*$")


class RenderedChat:
    """A conversation with its renderings by the chat template, each cached. `at` is the number of a message."""

    def __init__(self, template: ChatTemplate, messages: list[dict], tools: list[dict] | None, kwargs: dict | None):
        self.template, self.messages, self.tools, self.kwargs = template, messages, tools, kwargs
        self._prompts: dict[int, str] = {}
        self._through: dict[int, str] = {}
        self.kwargs_key = str(kwargs)
        self.rendered_messages: set[int] = set()  # messages that have been found to be rendered in full

    @cached_property
    def message_shapes(self) -> list[tuple]:
        """For each message: its role, and whether it has text, tool calls, reasoning."""
        return [
            (m["role"], bool((m["content"] or "").strip()), "tool_calls" in m, "reasoning_content" in m)
            for m in self.messages
        ]

    def prompt(self, at: int) -> str:
        """Return the prompt that an engine sends to get message `at`."""
        if at not in self._prompts:
            self._prompts[at] = self.render(self.messages[:at], prompt=True)
        return self._prompts[at]

    def through(self, at: int) -> str:
        """Return the messages up to and including `at`, rendered."""
        if at not in self._through:
            self._through[at] = self.render(self.messages[: at + 1])
        return self._through[at]

    def render(self, messages: list[dict], *, prompt: bool = False) -> str:
        return self.template.render(messages, self.tools, prompt=prompt, kwargs=self.kwargs)


@dataclass(frozen=True)
class ProvenTurn:
    """A proven turn, message `at`: the engine's prompt, and the target's reply through the token that ends it."""

    at: int
    prompt: str
    reply: str
    suffix: str = ""  # what the template adds after the reply, such as a newline; not generated, so never supervised

    @property
    def text(self) -> str:
        return self.prompt + self.reply


def tool_call_forms(messages: list[dict]) -> list[list[dict]]:
    """Return the messages in the forms that templates expect tool calls in; the first that is rendered in full is used.

    With "" or None as the text beside them, and their arguments as an object or as its JSON.
    """
    if not any(message.get("tool_calls") for message in messages):
        return [messages]

    def form(message: dict, empty: str | None, text: bool) -> dict:
        if not message.get("tool_calls"):
            return message
        calls = message["tool_calls"]
        if text:
            calls = [_with_json_arguments(call) for call in calls]
        return {**message, "content": message["content"] or empty, "tool_calls": calls}

    return [[form(message, empty, text) for message in messages] for text in (False, True) for empty in ("", None)]


def _with_json_arguments(call: dict) -> dict:
    arguments = call["function"]["arguments"]
    if isinstance(arguments, dict | list):
        return call_with(call, "arguments", json.dumps(arguments, ensure_ascii=False))
    return call


def turn_kind(messages: list[dict], at: int) -> str:
    """Return what kind of turn a message is, in words, for the plan's report."""
    turn, words = messages[at], []
    if turn.get("tool_calls"):
        words = ["calls tools"]
    elif messages[at - 1]["role"] == "tool":
        words = ["answers a tool"]
    words += ["with reasoning"] * bool(turn.get("reasoning_content"))
    return " ".join(words or ["reply"])


def call_with(call: dict, key: str, value: object) -> dict:
    """Return a tool call, as `parse_message` gives it, with another name or other arguments."""
    return {**call, "function": {**call["function"], key: value}}


def check_texts_rendered(chat: RenderedChat, turns: Sequence[ProvenTurn]) -> None:
    """Raise Unusable where a turn's prompt lacks a text of the messages before it, or its reply one of its own.

    turns: in order, so that messages found in one turn's text need not be searched in a later one that starts with it.
    """
    text, count = "", 0  # a turn's text, and how many messages it has been found to render
    for turn in turns:
        if not turn.prompt.startswith(text):
            count = 0
        _check_turn_rendered(chat, turn, count)
        text, count = turn.text, turn.at + 1


def _check_turn_rendered(chat: RenderedChat, proven: ProvenTurn, first: int) -> None:
    """Check one turn, whose messages before `first` are known to be rendered. Raises Unusable.

    Earlier reasoning may be absent: where a template drops it, an engine does not send it either.
    """
    prompt, reply, turn = proven.prompt, proven.reply, chat.messages[proven.at]
    for tool in chat.tools or [] if not first else []:
        function = tool.get("function") if isinstance(tool.get("function"), dict) else tool
        _check_rendered(function.get("name"), prompt, f"tool {function.get('name')}", "the prompt")
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
    """Raise Unusable where a text of the messages up to `at` is found only because it also occurs elsewhere.

    A text is replaced by a placeholder: if the rendering stays the same, the text was not rendered. Checked once for
    each field in each context (see `_render_context`); `verified` holds these and is added to. The tool calls of one
    message often have the same name, so they are counted.
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
                chat, at, number, {**message, "tool_calls": [call_with(call, "name", PLACEHOLDER) for call in calls]}
            )
            if replaced is not None and replaced.count(PLACEHOLDER) < len(calls):
                counts = f"of {len(calls)} tool calls of message {number}, the chat template shows "
                counts += f"{replaced.count(PLACEHOLDER)}"
                raise Unusable("lost text", f"{counts}; the target would not see the others")


def _render_context(chat: RenderedChat, at: int, number: int) -> tuple:
    """Return all that decides which fields of message `number` a template renders: its position, neighbours, tools."""
    around = chat.message_shapes[max(0, number - 1) : min(number + 2, at + 1)]
    return (min(number, 2), min(at - number, 2), bool(chat.tools), chat.kwargs_key, *around)


def _render_with(chat: RenderedChat, at: int, number: int, message: dict) -> str | None:
    """Render the messages through `at`, or its prompt, with message `number` replaced; None where that is refused."""
    before, after = chat.messages[:number], chat.messages[number + 1 : at]
    try:
        return chat.render([*before, message, *after], prompt=number != at)
    except Unusable:
        return None  # the template refuses the replaced message, which is no fault of the record's


def check_not_encoded_twice(messages: list[dict], text: str) -> None:
    """Raise Unusable where a tool call's arguments, JSON already, are rendered as a JSON string."""
    if not any(message.get("tool_calls") for message in messages):
        return
    squeezed = SPACE.sub("", text)
    for message in messages:
        for call in message.get("tool_calls") or []:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if isinstance(arguments, str) and SPACE.sub("", arguments) not in squeezed:
                raise Unusable("lost text", f"the arguments of tool call {name} are encoded twice")


def _check_rendered(text: object, rendered: str, what: str, where: str, *, thought: bool = False) -> None:
    if not isinstance(text, str) or not text.strip() or is_rendered(rendered, text):
        return
    if thought and (content := _after_thought(text)) and is_rendered(rendered, content):
        return  # an earlier turn, rendered without the thinking block at its start
    raise Unusable("lost text", f"{what} is not in {where} that the chat template makes; the target would not see it")


def is_rendered(rendered: str, text: str) -> bool:
    """Return whether a rendering contains a text: as it is, trimmed, as JSON, or with other white space."""
    text = text.strip()
    if text in rendered:
        return True
    forms = [text, *(json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))]
    squeezed = SPACE.sub("", rendered)
    return any(SPACE.sub("", form) in squeezed for form in forms)


def _without_opening_tag(content: str | None, prompt: str) -> str | None:
    """Return a reply's text without the opening tag of a thinking block, where its prompt ends with that tag."""
    opened = OPEN_THOUGHT.search(prompt[-200:])
    return content.lstrip().removeprefix(opened[1]) if content and opened else content


def _after_thought(text: str) -> str:
    return re.split(r"</(?:\w+:)?think(?:ing)?>|\[/THINK\]|<channel\|>", text)[-1]


def _call_texts(message: dict) -> Iterator[tuple[str, str]]:
    """Yield (description, text) for each text of a message's tool calls: names, and the texts in their arguments."""
    for call in message.get("tool_calls") or []:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        yield f"tool call {name}", name
        for text in [arguments] if isinstance(arguments, str) else _texts_in(arguments):
            yield f"an argument of tool call {name}", text


def _texts_in(value: object) -> Iterator[str]:
    """Yield the texts in a JSON value, field names among them; instead of a text that is JSON itself, those in it."""
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
