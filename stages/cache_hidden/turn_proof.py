"""The proof of a turn: what an engine would send before it, and what the target would write then.

Three renderings decide: the messages before the turn followed by the generation prompt (what an engine sends), and
the turn included. Where the second goes on from the first, what follows is the reply. Where they part, the template
changes the prompt once the reply stands there, and the sample is the engine's prompt and the reply, if the corpus has
what the target said. What does not prove is not supervised.

Nothing is searched for by what it says. Where a text has to be found in a rendering, the turn is rendered once more
with a text in its place that nothing else has.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from pipeline.corpus.tally import Unusable
from pipeline.target.chat_template import ChatTemplate
from stages.cache_hidden.turn_refusals import (
    CLOSED_THOUGHT,
    OPEN_THOUGHT,
    Unproven,
    check_asked_for,
    check_mode,
)

PLACEHOLDER = "qZprobe7Xw"  # stands for a text whose place is sought; survives trimming and JSON


@dataclass(frozen=True)
class ProvenTurn:
    """A turn that proved, message `at`: the engine's prompt, and the target's reply with its end."""

    at: int
    prompt: str
    reply: str
    suffix: str = ""  # what the template adds: a newline, an end of text: not the target's, and never supervised

    @property
    def text(self) -> str:
        return self.prompt + self.reply


class RenderedChat:
    """One conversation and its renderings, each made once."""

    def __init__(self, template: ChatTemplate, messages: list[dict], tools: list[dict] | None, kwargs: dict | None):
        self.template, self.messages, self.tools, self.kwargs = template, messages, tools, kwargs
        self._prompts: dict[int, str] = {}
        self._through: dict[int, str] = {}
        self.kwargs_key = str(kwargs)
        self.rendered_messages: set[int] = set()  # messages whose texts were proven to come out by `dropped_text.py`

    @cached_property
    def message_shapes(self) -> list[tuple]:
        """What each message is, but for what it says: who speaks, and whether it has text, calls, a thought."""
        return [
            (one["role"], bool((one["content"] or "").strip()), "tool_calls" in one, "reasoning_content" in one)
            for one in self.messages
        ]

    def prompt(self, at: int) -> str:
        """What an engine sends to have message `at`."""
        if at not in self._prompts:
            self._prompts[at] = self.render(self.messages[:at], prompt=True)
        return self._prompts[at]

    def through(self, at: int) -> str:
        """The messages up to `at`, that one included."""
        if at not in self._through:
            self._through[at] = self.render(self.messages[: at + 1])
        return self._through[at]

    def render(self, messages: list[dict], *, prompt: bool = False) -> str:
        return self.template.render(messages, self.tools, prompt=prompt, kwargs=self.kwargs)


def prove_turn(chat: RenderedChat, at: int, ends: "TurnEnds") -> ProvenTurn:
    """Return turn `at`. Raises Unproven, and Unusable where the template refuses the conversation."""
    if at == 0:
        raise Unproven("no prompt", "it begins with a reply, which nobody asked for")
    prompt, through = chat.prompt(at), chat.through(at)
    check_asked_for(chat, at, prompt)
    check_mode(chat, at, prompt)
    if through.startswith(prompt):
        reply, suffix = ends.through_end(chat, at, through[len(prompt) :]), ""
        if through.startswith(reply, len(prompt)):
            suffix = through[len(prompt) + len(reply) :]
        _check_thought(chat, at, prompt, reply, ends)
    else:
        reply, suffix = _reply_after_changed_prompt(chat, at, prompt, through, ends), ""
    if not reply.strip():
        raise Unproven("empty reply", "the reply has no text")
    return ProvenTurn(at, prompt, reply, suffix)


def _after_text(chat: RenderedChat, at: int, ends: "TurnEnds") -> str:
    """Return what the target writes behind the text of a turn: its calls, if it makes any, and its end."""
    message = chat.messages[at]
    if not message.get("tool_calls"):
        return ends.end(chat, at)
    after = chat.render([*chat.messages[:at], {**message, "content": PLACEHOLDER}]).rpartition(PLACEHOLDER)
    if not after[1]:
        raise Unproven("other prompt", "the template does not show its text beside its calls")
    return ends.through_end(chat, at, after[2])


def _reply_after_changed_prompt(chat: RenderedChat, at: int, prompt: str, through: str, ends: "TurnEnds") -> str:
    """Return the reply where the template writes another prompt once the reply stands there."""
    header = _turn_header(chat, at)
    split = len(common_prefix(prompt, through))
    split = _before_open_tag(prompt, split, len(prompt) - len(header))
    if split < len(prompt) - len(header):
        return _reply_after_header(chat, at, prompt, through, header, ends)
    rest, reply = prompt[split:], through[split:]
    content = chat.messages[at]["content"] or ""
    if content.startswith(rest) and not CLOSED_THOUGHT.search(rest):  # the corpus has all that the target said
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
    """Return what stands between the text of the message before a turn and the first token of the turn."""
    before = [*chat.messages[: at - 1], {**chat.messages[at - 1], "content": PLACEHOLDER}]
    return chat.render(before, prompt=True).rpartition(PLACEHOLDER)[2]


def _before_open_tag(prompt: str, split: int, at_least: int) -> int:
    """Return the place where two prompts part, before the tag that it may stand in."""
    for opening, closing in ("<>", "[]"):
        began = prompt.rfind(opening, max(at_least, 0), split)
        if began >= 0 and closing not in prompt[began:split]:
            return began
    return split


def _reply_after_header(chat: RenderedChat, at: int, prompt: str, through: str, header: str, ends: "TurnEnds") -> str:
    """Return the reply where what came before it is rendered otherwise, by what stands between question and reply.

    Mistral's templates show the system prompt and the tools before the last question only.
    """
    head = chat.render([*chat.messages[:at], with_first_text_replaced(chat.messages[at])]).partition(PLACEHOLDER)[0]
    found = head.rfind(header) if header.strip() and through.startswith(head) else -1
    question = (chat.messages[at - 1]["content"] or "").strip()
    stop = found + len(header)
    if found < 0 or not _same_ending(prompt, head[:stop], len(header) + len(question)):
        raise Unproven("other prompt", "the template renders what comes before it otherwise once the reply is there")
    reply = ends.through_end(chat, at, through[stop:])
    _check_thought(chat, at, prompt, reply, ends)
    return reply


def _same_ending(one: str, other: str, count: int) -> bool:
    return len(one) >= count and one[len(one) - count :] == other[max(0, len(other) - count) :]


def with_first_text_replaced(message: dict) -> dict:
    """Return a turn whose first text, whichever it is, is the probe."""
    replaced = {
        **message,
        "content": PLACEHOLDER if message["content"] or not message.get("tool_calls") else message["content"],
    }
    if message.get("reasoning_content"):
        replaced["reasoning_content"] = PLACEHOLDER
    if message.get("tool_calls"):
        replaced["tool_calls"] = [with_name_replaced(call) for call in message["tool_calls"]]
    return replaced


def with_name_replaced(call: dict) -> dict:
    """Return a call of a tool whose name is the probe."""
    function = call.get("function")
    return (
        {**call, "function": {**function, "name": PLACEHOLDER}}
        if isinstance(function, dict)
        else {**call, "name": PLACEHOLDER}
    )


def _check_thought(chat: RenderedChat, at: int, prompt: str, reply: str, ends: "TurnEnds") -> None:
    """Refuse a reply without a thought where the prompt has opened one: the target would not have written it."""
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


def common_prefix(one: str, other: str) -> str:
    """Return the start that two texts share."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return one[:low]


class TurnEnds:
    """Where the target stops in a rendered turn, by the template's own end, found once for each kind of turn.

    A turn is rendered with the probe as its last text, alone and with a further message behind it. The end is the
    token that stands behind the probe in both; where a template ends no turn by itself, the marker of the next one.
    """

    def __init__(self, template: ChatTemplate):
        self.template = template
        self._ends: dict[tuple, tuple[str, str]] = {}  # kind of turn -> (behind the last text: all, what is written)
        self._thought_closings: dict[
            str, str | None
        ] = {}  # arguments of the template -> what closes the thought of a prompt

    def through_end(self, chat: RenderedChat, at: int, reply: str) -> str:
        """Return a rendered turn through the token that ends it. Raises Unproven where none does."""
        tail, end = self._lookup(chat, at)
        if reply.endswith(tail):
            return reply[: len(reply) - len(tail)] + end
        tail, end = self._find(chat, at)
        if not reply.endswith(tail):  # a call's closing brackets differ with its arguments, its end does not
            token = [found[0] for found in self.template.added_token_pattern.finditer(end)][-1:]
            never_written = len(tail) - len(end)
            shared = len(common_prefix(reply[::-1], tail[::-1]))
            if not token or not tail.startswith(end) or shared < never_written + len(token[0]):
                raise Unproven("no end", "the template does not end it as it ends other turns")
            return reply[: len(reply) - never_written]
        return reply[: len(reply) - len(tail)] + end

    def end(self, chat: RenderedChat, at: int) -> str:
        """Return what the target writes behind its last text."""
        return self._lookup(chat, at)[1]

    def thought_closing(self, chat: RenderedChat, at: int) -> str | None:
        """Return what closes the thought that the prompt of a turn has opened, None where it has opened none.

        By a turn with a thought, if the template shows it right behind the prompt; else by the name of the last tag.
        """
        key = chat.kwargs_key
        if key not in self._thought_closings:
            self._thought_closings[key] = self._find_thought_closing(chat)
        return self._thought_closings[key]

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
        """Return what the target writes of what stands behind a turn's last text, alone and with more to follow."""
        stops, tokens = self.template.stop_tokens, self.template.added_token_pattern
        both = common_prefix(tail, further) if further is not None else tail
        shared = list(tokens.finditer(both))
        if calls:  # brackets are tokens, too: only what ends a reply, or stops the target, ends a call
            stops |= self._reply_ends
            shared = [found for found in shared if found[0] in stops]
        stop = next((found for found in shared if found[0] in stops), None)
        if found := stop or (shared and shared[-1]) or (not calls and tokens.search(tail)):
            return tail[: found.end()]
        # The next role's marker, or an end that stands between turns only; GLM stops at the former.
        begun = len(both) if calls else 0
        marker = tokens.search(further or "", begun)
        if marker and not further[begun : marker.start()].strip() and (not calls or not self._reply_ends):
            known = not self.template.has_stop_tokens or marker[0] in stops
            return further[: marker.end()] if known else None
        return both if both.isspace() and not calls else None

    @cached_property
    def _reply_ends(self) -> frozenset[str]:
        """The token that the template itself writes behind a reply, empty where it writes none."""
        question = [{"role": "user", "content": "first"}, {"role": "assistant", "content": PLACEHOLDER}]
        try:
            alone = self.template.render(question).rpartition(PLACEHOLDER)[2]
            further = self.template.render([*question, {"role": "user", "content": "next"}]).rpartition(PLACEHOLDER)[2]
        except Unusable:
            return frozenset()
        found = self.template.added_token_pattern.findall(common_prefix(alone, further))
        return frozenset(found[-1:] or self.template.added_token_pattern.findall(alone)[:1])


def _with_last_text_replaced(message: dict) -> dict:
    """Return a turn whose last text, whichever the template puts last, is the probe."""
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
    """Return what would follow a turn: the results of its calls, or a question."""
    calls = turn.get("tool_calls")
    if not calls:
        return [{"role": "user", "content": "next"}]
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call.get("function"), dict) else call
        found.append({"role": "tool", "tool_call_id": call.get("id"), "name": function.get("name"), "content": "next"})
    return found
