"""Proves an assistant turn: the prompt that an engine would send for it, and the reply that the target would write.

A turn is supervised only if its tokens are what the target would generate after an engine's prompt. Two renderings of
the chat template decide: the messages before the turn with the generation prompt (what an engine sends), and the
messages including the turn. If the second starts with the first, the rest is the reply. If not, the template renders
the prompt differently once the reply is there; then the reply is taken out of the second, or the turn is Unproven.

To find a text in a rendering, the turn is rendered once more with a unique placeholder instead of it; the text itself
is never searched for, since it may occur elsewhere.
"""

import re
from functools import cached_property

from pipeline.corpus.rejections import Unusable
from pipeline.target.chat_template import ChatTemplate
from stages.cache_hidden.rendered_chat import (
    OPEN_THOUGHT,
    PLACEHOLDER,
    THOUGHT,
    ProvenTurn,
    RenderedChat,
    call_with,
)

CLOSED_THOUGHT = re.compile(
    r"(?:<([\w:]+)>\s*</\1>|\[(\w+)\]\s*\[/\2\]|<\|(\w+)>[\w\s]*<\3\|>|<\|START_(\w+)\|>\s*<\|END_\4\|>)\s*$"
)
STATED_THOUGHT = re.compile(  # a thinking block at the start of a reply; its text is the group
    rf"\s*{THOUGHT}(.*?)(?:</(?:\w+:)?think(?:ing)?>|\[/THINK\]|<channel\|>)", re.DOTALL
)


class Unproven(Exception):
    """Raised for a turn that cannot be supervised. `reason`: the category it is counted under, `detail`: for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def prove_turn(chat: RenderedChat, at: int, ends: "TurnEnds") -> ProvenTurn:
    """Return message `at` as a ProvenTurn. Unproven: it cannot be supervised; Unusable: the template refuses it."""
    if at == 0:
        raise Unproven("no prompt", "it begins with a reply, which nobody asked for")
    prompt, through = chat.prompt(at), chat.through(at)
    if chat.messages[at - 1]["role"] == "assistant" and prompt == chat.through(at - 1):
        raise Unproven("no prompt", "it follows another reply, and the template asks for none between them")
    _check_thinking_mode(chat, at, prompt)
    if through.startswith(prompt):
        reply, suffix = ends.through_end(chat, at, through[len(prompt) :]), ""
        if through.startswith(reply, len(prompt)):
            suffix = through[len(prompt) + len(reply) :]
        _check_reasoning(chat, at, prompt, reply, ends)
    else:
        reply, suffix = _reply_after_changed_prompt(chat, at, prompt, through, ends), ""
    if not reply.strip():
        raise Unproven("empty reply", "the reply has no text")
    return ProvenTurn(at, prompt, reply, suffix)


def _after_text(chat: RenderedChat, at: int, ends: "TurnEnds") -> str:
    """Return what the target writes after the text of a turn: its tool calls, if any, and the end token."""
    message = chat.messages[at]
    if not message.get("tool_calls"):
        return ends.end(chat, at)
    after = chat.render([*chat.messages[:at], {**message, "content": PLACEHOLDER}]).rpartition(PLACEHOLDER)
    if not after[1]:
        raise Unproven("other prompt", "the template does not show its text beside its calls")
    return ends.through_end(chat, at, after[2])


def _reply_after_changed_prompt(chat: RenderedChat, at: int, prompt: str, through: str, ends: "TurnEnds") -> str:
    """Return the reply where the rendering that includes it does not start with the engine's prompt."""
    header = _turn_header(chat, at)
    diverged = len(common_prefix(prompt, through))
    diverged = _before_open_tag(prompt, diverged, len(prompt) - len(header))
    if diverged < len(prompt) - len(header):
        return _reply_after_header(chat, at, prompt, through, header, ends)
    rest, reply = prompt[diverged:], through[diverged:]
    content = chat.messages[at]["content"] or ""
    if content.startswith(rest) and not CLOSED_THOUGHT.search(rest):  # the text itself has the rest of the prompt
        return content[len(rest) :].rstrip() + _after_text(chat, at, ends)
    if not CLOSED_THOUGHT.search(rest):
        if prompt.rstrip().endswith((">", "]")) and "/" in prompt.rstrip()[-12:]:
            raise Unproven(
                "thought closed",
                "the prompt ends a thought before the reply, which states one; it was made "
                "in another mode: state its --template-kwargs",
            )
        if OPEN_THOUGHT.search(rest) or ends.thought_closing(chat, at):
            raise Unproven("no reasoning", _no_reasoning_message(chat, rest))
        raise Unproven(
            "other prompt", f"an engine's prompt goes on with {rest[:40]!r}, which the reply does not follow"
        )
    # A template that closes a thought in the prompt may close it before the reply, too.
    overlap = next((size for size in range(len(rest), 0, -1) if reply.startswith(rest[-size:])), 0)
    return ends.through_end(chat, at, reply[overlap:])


def _turn_header(chat: RenderedChat, at: int) -> str:
    """Return what the template renders between the previous message's text and the turn's first token."""
    before = [*chat.messages[: at - 1], {**chat.messages[at - 1], "content": PLACEHOLDER}]
    return chat.render(before, prompt=True).rpartition(PLACEHOLDER)[2]


def _before_open_tag(prompt: str, diverged: int, least: int) -> int:
    """Return `diverged`, an index into the prompt, or the start of the unclosed tag that it lies in."""
    for opening, closing in ("<>", "[]"):
        began = prompt.rfind(opening, max(least, 0), diverged)
        if began >= 0 and closing not in prompt[began:diverged]:
            return began
    return diverged


def _reply_after_header(chat: RenderedChat, at: int, prompt: str, through: str, header: str, ends: "TurnEnds") -> str:
    """Return the reply where earlier messages are rendered differently, by finding the turn's header before it.

    Mistral's templates render the system prompt and the tools before the last user message only.
    """
    head = chat.render([*chat.messages[:at], _with_first_text_replaced(chat.messages[at])]).partition(PLACEHOLDER)[0]
    found = head.rfind(header) if header.strip() and through.startswith(head) else -1
    question = (chat.messages[at - 1]["content"] or "").strip()
    stop = found + len(header)
    if found < 0 or not _same_ending(prompt, head[:stop], len(header) + len(question)):
        raise Unproven("other prompt", "the template renders what comes before it otherwise once the reply is there")
    reply = ends.through_end(chat, at, through[stop:])
    _check_reasoning(chat, at, prompt, reply, ends)
    return reply


def _same_ending(first: str, second: str, count: int) -> bool:
    """Return whether the last `count` characters of both texts are equal."""
    return len(first) >= count and first[len(first) - count :] == second[max(0, len(second) - count) :]


def _with_first_text_replaced(message: dict) -> dict:
    """Return a turn with the placeholder for every text that a template may render first."""
    replaced = {
        **message,
        "content": PLACEHOLDER if message["content"] or not message.get("tool_calls") else message["content"],
    }
    if message.get("reasoning_content"):
        replaced["reasoning_content"] = PLACEHOLDER
    if message.get("tool_calls"):
        replaced["tool_calls"] = [call_with(call, "name", PLACEHOLDER) for call in message["tool_calls"]]
    return replaced


def _check_thinking_mode(chat: RenderedChat, at: int, prompt: str) -> None:
    """Raise Unproven for a reply with reasoning after a prompt whose thinking block is closed already."""
    message = chat.messages[at]
    began = STATED_THOUGHT.match(message["content"] or "")
    if not message.get("reasoning_content") and not (began and began[1].strip()):
        return
    closed = CLOSED_THOUGHT.search(prompt[-200:])
    if closed and re.search("think|thought|reason", closed[0], re.IGNORECASE):
        switch = chat.template.thinking_switch()
        wanted = f" '{{\"{switch}\": true}}'" if switch else ""
        raise Unproven(
            "thought closed",
            f"the prompt ends with {closed[0]!r}, and the reply states a thought; it was made in another mode: "
            f"pass --template-kwargs{wanted}",
        )


def _check_reasoning(chat: RenderedChat, at: int, prompt: str, reply: str, ends: "TurnEnds") -> None:
    """Raise Unproven for a reply without reasoning after a prompt that opens a thinking block."""
    closing = ends.thought_closing(chat, at)
    if closing is None:
        return
    before, closed, _ = reply.partition(closing)
    if not closed or not before.strip():
        opened = OPEN_THOUGHT.search(prompt)
        raise Unproven("no reasoning", _no_reasoning_message(chat, opened[1] if opened else prompt[-20:]))


def _no_reasoning_message(chat: RenderedChat, opened: str) -> str:
    switch = chat.template.thinking_switch()
    without = f", or, if it was made without, pass --template-kwargs '{{\"{switch}\": false}}'" if switch else ""
    return (
        f"the prompt ends with {opened.strip()!r}, so the target would think first, and the reply has no thought; "
        f"state it as `reasoning_content`{without}"
    )


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
        if not reply.endswith(tail):
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
            known = not self.template.generation_stops or marker[0] in stops
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
    text = isinstance(calls[-1]["function"]["arguments"], str)
    arguments = f'{{"value": "{PLACEHOLDER}"}}' if text else {"value": PLACEHOLDER}
    return {**message, "tool_calls": [*calls[:-1], call_with(calls[-1], "arguments", arguments)]}


def _next_messages(turn: dict) -> list[dict]:
    """Return messages that may follow a turn: the results of its tool calls, or a user message."""
    calls = turn.get("tool_calls")
    if not calls:
        return [{"role": "user", "content": "next"}]
    return [
        {"role": "tool", "tool_call_id": call.get("id"), "name": call["function"]["name"], "content": "next"}
        for call in calls
    ]


def common_prefix(first: str, second: str) -> str:
    """Return the longest common prefix of two texts."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return first[:low]
