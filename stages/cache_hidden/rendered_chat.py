"""What the chat template renders of a conversation, and where in it an assistant turn ends.

To find a text in a rendering, the turn is rendered once more with a unique placeholder instead of it; the text itself
is never searched for, since it may occur elsewhere.
"""

import re
from functools import cached_property

from pipeline.corpus.rejections import Unusable
from pipeline.target.chat_template import ChatTemplate

PLACEHOLDER = "qZprobe7Xw"  # rendered instead of a text to find its position; unchanged by trimming and JSON

# Tags of a thinking block. Used only for prompts that open one and for templates that never render what is in it.
THOUGHT = r"[<\[][\w:|]*?(?:think|thinking|thought|reasoning)[\w:|]*[>\]]"
OPEN_THOUGHT = re.compile(rf"({THOUGHT})\s*$")


class Unproven(Exception):
    """Raised for a turn that cannot be supervised. `reason`: the category it is counted under, `detail`: for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class RenderedChat:
    """A conversation with its renderings by the chat template, each cached. `at` is the number of a message."""

    def __init__(self, template: ChatTemplate, messages: list[dict], tools: list[dict] | None, kwargs: dict | None):
        self.template, self.messages, self.tools, self.kwargs = template, messages, tools, kwargs
        self._prompts: dict[int, str] = {}
        self._through: dict[int, str] = {}
        self.kwargs_key = str(kwargs)
        self.rendered_messages: set[int] = set()  # messages that `dropped_text.py` has found to be rendered in full

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


class TurnEnds:
    """Finds the token that ends an assistant turn, by rendering; once for each kind of turn (calls, tools, reasoning).

    A turn is rendered with the placeholder as its last text, on its own and followed by another message. The end is the
    token after the placeholder that both renderings have; where a template ends no turn, the next turn's role marker.
    """

    def __init__(self, template: ChatTemplate):
        self.template = template
        # By kind of turn: all that the template renders after the last text, and the part that the target generates.
        self._ends: dict[tuple, tuple[str, str]] = {}
        self._closings: dict[str, str | None] = {}  # by template arguments: the tag that closes a thinking block

    def through_end(self, chat: RenderedChat, at: int, reply: str) -> str:
        """Return a rendered turn cut after the token that ends it. Raises Unproven where none does."""
        tail, end = self._lookup(chat, at)
        if reply.endswith(tail):
            return reply[: len(reply) - len(tail)] + end
        tail, end = self._find(chat, at)
        if not reply.endswith(tail):  # closing brackets of a tool call depend on its arguments, its end token does not
            token = [found[0] for found in self.template.added_token_pattern.finditer(end)][-1:]
            added = len(tail) - len(end)
            shared = len(common_prefix(reply[::-1], tail[::-1]))
            if not token or not tail.startswith(end) or shared < added + len(token[0]):
                raise Unproven("no end", "the template does not end it as it ends other turns")
            return reply[: len(reply) - added]
        return reply[: len(reply) - len(tail)] + end

    def end(self, chat: RenderedChat, at: int) -> str:
        """Return what the target generates after the last text of turn `at`, through the end token."""
        return self._lookup(chat, at)[1]

    def thought_closing(self, chat: RenderedChat, at: int) -> str | None:
        """Return the tag that closes the thinking block which the prompt of a turn opens; None where it opens none.

        Found by rendering a turn with reasoning, if that comes right after the prompt; else by the last tag's name.
        """
        key = chat.kwargs_key
        if key not in self._closings:
            self._closings[key] = self._find_thought_closing(chat)
        return self._closings[key]

    def _find_thought_closing(self, chat: RenderedChat) -> str | None:
        question = [{"role": "user", "content": "first"}]
        turn = {"role": "assistant", "content": f"{PLACEHOLDER}said", "reasoning_content": f"{PLACEHOLDER}thought"}
        try:
            prompt = self.template.render(question, chat.tools, prompt=True, kwargs=chat.kwargs)
            through = self.template.render([*question, turn], chat.tools, kwargs=chat.kwargs)
        except Unusable:
            return None
        opened = OPEN_THOUGHT.search(prompt)
        before, thought, suffix = through.partition(f"{PLACEHOLDER}thought")
        if thought and before.rstrip() == prompt.rstrip():
            closing = suffix.partition(f"{PLACEHOLDER}said")[0].strip()
            tags = re.match(r"<[^<>]*>|\[[^\[\]]*\]", closing)
            return tags[0] if tags else closing or None
        return f"{opened[1][0]}/{opened[1][1:]}" if opened and opened[1][1] != "/" else None

    def _lookup(self, chat: RenderedChat, at: int) -> tuple[str, str]:
        message = chat.messages[at]
        kind = (bool(message.get("tool_calls")), bool(chat.tools), bool(message.get("reasoning_content")))
        kind += (chat.kwargs_key,)
        if kind not in self._ends:
            self._ends[kind] = self._find(chat, at)
        return self._ends[kind]

    def _find(self, chat: RenderedChat, at: int) -> tuple[str, str]:
        turn = _with_last_text_replaced(chat.messages[at])
        alone = chat.render([*chat.messages[:at], turn])
        if PLACEHOLDER not in alone:
            what = "tool calls" if turn.get("tool_calls") else "text"
            raise Unusable("lost text", f"the chat template does not show the {what} of message {at}")
        tail = alone.rpartition(PLACEHOLDER)[2]
        try:
            further = chat.render([*chat.messages[:at], turn, *_next_messages(turn)])
        except Unusable:  # nothing may follow it
            further = ""
        suffix = further.rpartition(PLACEHOLDER)[2] if PLACEHOLDER in further else None
        end = self._written_by_target(tail, suffix, bool(turn.get("tool_calls")))
        if end is None:
            raise Unproven("no end", "no token ends the turn, which the template or generation_config.json would name")
        return tail, end

    def _written_by_target(self, tail: str, further: str | None, calls: bool) -> str | None:
        """Return the part of `tail` that the target generates, None where no token ends the turn.

        tail, further: what is rendered after the turn's last text, on its own and with another message following.
        """
        stops, tokens = self.template.stop_tokens, self.template.added_token_pattern
        both = common_prefix(tail, further) if further is not None else tail
        shared = list(tokens.finditer(both))
        if calls:  # brackets may be added tokens, too; only a reply's end or a stop token ends a call
            stops |= self._reply_ends
            shared = [found for found in shared if found[0] in stops]
        stop = next((found for found in shared if found[0] in stops), None)
        if found := stop or (shared and shared[-1]) or (not calls and tokens.search(tail)):
            return tail[: found.end()]
        # The next role's marker, or an end token that is rendered between turns only; GLM stops at the former.
        begun = len(both) if calls else 0
        marker = tokens.search(further or "", begun)
        if marker and not further[begun : marker.start()].strip() and (not calls or not self._reply_ends):
            known = not self.template.has_stop_tokens or marker[0] in stops
            return further[: marker.end()] if known else None
        return both if both.isspace() and not calls else None

    @cached_property
    def _reply_ends(self) -> frozenset[str]:
        """The token that the template renders after a reply; empty where it renders none."""
        question = [{"role": "user", "content": "first"}, {"role": "assistant", "content": PLACEHOLDER}]
        try:
            alone = self.template.render(question).rpartition(PLACEHOLDER)[2]
            further = self.template.render([*question, {"role": "user", "content": "next"}]).rpartition(PLACEHOLDER)[2]
        except Unusable:
            return frozenset()
        found = self.template.added_token_pattern.findall(common_prefix(alone, further))
        return frozenset(found[-1:] or self.template.added_token_pattern.findall(alone)[:1])


def _with_last_text_replaced(message: dict) -> dict:
    """Return a turn with the placeholder as its last text: the content, or the last call's arguments."""
    calls = message.get("tool_calls")
    if not calls:
        return {**message, "content": PLACEHOLDER}
    last = calls[-1]
    if isinstance(function := last.get("function"), dict):
        last = {**last, "function": {**function, "arguments": _placeholder_arguments(function.get("arguments"))}}
    else:
        last = {**last, "arguments": _placeholder_arguments(last.get("arguments"))}
    return {**message, "tool_calls": [*calls[:-1], last]}


def _placeholder_arguments(arguments: object) -> object:
    return f'{{"value": "{PLACEHOLDER}"}}' if isinstance(arguments, str) else {"value": PLACEHOLDER}


def _next_messages(turn: dict) -> list[dict]:
    """Return messages that may follow a turn: the results of its tool calls, or a user message."""
    calls = turn.get("tool_calls")
    if not calls:
        return [{"role": "user", "content": "next"}]
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call.get("function"), dict) else call
        found.append({"role": "tool", "tool_call_id": call.get("id"), "name": function.get("name"), "content": "next"})
    return found


def with_name_replaced(call: dict) -> dict:
    """Return a tool call with the placeholder as its function's name."""
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": {**function, "name": PLACEHOLDER}}
    return {**call, "name": PLACEHOLDER}


def common_prefix(first: str, second: str) -> str:
    """Return the longest common prefix of two texts."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return first[:low]
