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

PROBE = "qZprobe7Xw"  # stands for a text whose place is sought; survives trimming and JSON


@dataclass(frozen=True)
class Turn:
    """A turn that proved, message `at`: the engine's prompt, and the target's reply with its end."""

    at: int
    prompt: str
    reply: str
    behind: str = ""  # what the template adds: a newline, an end of text: not the target's, and never supervised

    @property
    def text(self) -> str:
        return self.prompt + self.reply


class Chat:
    """One conversation and its renderings, each made once."""

    def __init__(self, template: ChatTemplate, messages: list[dict], tools: list[dict] | None, kwargs: dict | None):
        self.template, self.messages, self.tools, self.kwargs = template, messages, tools, kwargs
        self._prompts: dict[int, str] = {}
        self._through: dict[int, str] = {}
        self.stated = str(kwargs)
        self.checked: set[int] = set()  # messages whose texts were proven to come out by `dropped_text.py`

    @cached_property
    def kinds(self) -> list[tuple]:
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


def prove(chat: Chat, at: int, ends: "TurnEnds") -> Turn:
    """Return turn `at`. Raises Unproven, and Unusable where the template refuses the conversation."""
    if at == 0:
        raise Unproven("no prompt", "it begins with a reply, which nobody asked for")
    prompt, through = chat.prompt(at), chat.through(at)
    check_asked_for(chat, at, prompt)
    check_mode(chat, at, prompt)
    if through.startswith(prompt):
        reply, behind = ends.cut(chat, at, through[len(prompt) :]), ""
        if through.startswith(reply, len(prompt)):
            behind = through[len(prompt) + len(reply) :]
        _check_thought(chat, at, prompt, reply, ends)
    else:
        reply, behind = _behind_other_prompt(chat, at, prompt, through, ends), ""
    if not reply.strip():
        raise Unproven("empty reply", "the reply has no text")
    return Turn(at, prompt, reply, behind)


def _behind_text(chat: Chat, at: int, ends: "TurnEnds") -> str:
    """Return what the target writes behind the text of a turn: its calls, if it makes any, and its end."""
    message = chat.messages[at]
    if not message.get("tool_calls"):
        return ends.end(chat, at)
    behind = chat.render([*chat.messages[:at], {**message, "content": PROBE}]).rpartition(PROBE)
    if not behind[1]:
        raise Unproven("other prompt", "the template does not show its text beside its calls")
    return ends.cut(chat, at, behind[2])


def _behind_other_prompt(chat: Chat, at: int, prompt: str, through: str, ends: "TurnEnds") -> str:
    """Return the reply where the template writes another prompt once the reply stands there."""
    handover = _handover(chat, at)
    parted = len(common_start(prompt, through))
    parted = _outside_tags(prompt, parted, len(prompt) - len(handover))
    if parted < len(prompt) - len(handover):
        return _behind_handover(chat, at, prompt, through, handover, ends)
    rest, reply = prompt[parted:], through[parted:]
    said = chat.messages[at]["content"] or ""
    if said.startswith(rest) and not CLOSED_THOUGHT.search(rest):  # the corpus has all that the target said
        return said[len(rest) :].rstrip() + _behind_text(chat, at, ends)
    if not CLOSED_THOUGHT.search(rest):
        if prompt.rstrip().endswith((">", "]")) and "/" in prompt.rstrip()[-12:]:
            raise Unproven(
                "thought closed",
                "the prompt ends a thought before the reply, which states one; it was made "
                "in another mode: state its --template-kwargs",
            )
        if OPEN_THOUGHT.search(rest) or ends.closing(chat, at):
            raise Unproven("no reasoning", _lacks_reasoning(chat, rest))
        raise Unproven(
            "other prompt", f"an engine's prompt goes on with {rest[:40]!r}, which the reply does not follow"
        )
    # A template that closes a thought in the prompt may close it before the reply, too.
    twice = next((size for size in range(len(rest), 0, -1) if reply.startswith(rest[-size:])), 0)
    return ends.cut(chat, at, reply[twice:])


def _handover(chat: Chat, at: int) -> str:
    """Return what stands between the text of the message before a turn and the first token of the turn."""
    before = [*chat.messages[: at - 1], {**chat.messages[at - 1], "content": PROBE}]
    return chat.render(before, prompt=True).rpartition(PROBE)[2]


def _outside_tags(prompt: str, parted: int, at_least: int) -> int:
    """Return the place where two prompts part, before the tag that it may stand in."""
    for opening, closing in ("<>", "[]"):
        began = prompt.rfind(opening, max(at_least, 0), parted)
        if began >= 0 and closing not in prompt[began:parted]:
            return began
    return parted


def _behind_handover(chat: Chat, at: int, prompt: str, through: str, handover: str, ends: "TurnEnds") -> str:
    """Return the reply where what came before it is rendered otherwise, by what stands between question and reply.

    Mistral's templates show the system prompt and the tools before the last question only.
    """
    head = chat.render([*chat.messages[:at], probe_first(chat.messages[at])]).partition(PROBE)[0]
    found = head.rfind(handover) if handover.strip() and through.startswith(head) else -1
    asked = (chat.messages[at - 1]["content"] or "").strip()
    stop = found + len(handover)
    if found < 0 or not _ends_alike(prompt, head[:stop], len(handover) + len(asked)):
        raise Unproven("other prompt", "the template renders what comes before it otherwise once the reply is there")
    reply = ends.cut(chat, at, through[stop:])
    _check_thought(chat, at, prompt, reply, ends)
    return reply


def _ends_alike(one: str, other: str, count: int) -> bool:
    return len(one) >= count and one[len(one) - count :] == other[max(0, len(other) - count) :]


def probe_first(message: dict) -> dict:
    """Return a turn whose first text, whichever it is, is the probe."""
    probed = {
        **message,
        "content": PROBE if message["content"] or not message.get("tool_calls") else message["content"],
    }
    if message.get("reasoning_content"):
        probed["reasoning_content"] = PROBE
    if message.get("tool_calls"):
        probed["tool_calls"] = [renamed(call) for call in message["tool_calls"]]
    return probed


def renamed(call: dict) -> dict:
    """Return a call of a tool whose name is the probe."""
    function = call.get("function")
    return {**call, "function": {**function, "name": PROBE}} if isinstance(function, dict) else {**call, "name": PROBE}


def _check_thought(chat: Chat, at: int, prompt: str, reply: str, ends: "TurnEnds") -> None:
    """Refuse a reply without a thought where the prompt has opened one: the target would not have written it."""
    closing = ends.closing(chat, at)
    if closing is None:
        return
    before, closed, _ = reply.partition(closing)
    if not closed or not before.strip():
        opened = OPEN_THOUGHT.search(prompt)
        raise Unproven("no reasoning", _lacks_reasoning(chat, opened[1] if opened else prompt[-20:]))


def _lacks_reasoning(chat: Chat, opened: str) -> str:
    switch = chat.template.switch()
    without = f", or, if it was made without, pass --template-kwargs '{{\"{switch}\": false}}'" if switch else ""
    return (
        f"the prompt ends with {opened.strip()!r}, so the target would think first, and the reply has no thought; "
        f"state it as `reasoning_content`{without}"
    )


def common_start(one: str, other: str) -> str:
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
        self._found: dict[tuple, tuple[str, str]] = {}  # kind of turn -> (behind the last text: all, what is written)
        self._closing: dict[str, str | None] = {}  # arguments of the template -> what closes the thought of a prompt

    def cut(self, chat: Chat, at: int, reply: str) -> str:
        """Return a rendered turn through the token that ends it. Raises Unproven where none does."""
        tail, end = self._of(chat, at)
        if reply.endswith(tail):
            return reply[: len(reply) - len(tail)] + end
        tail, end = self._search(chat, at)
        if not reply.endswith(tail):  # a call's closing brackets differ with its arguments, its end does not
            token = [found[0] for found in self.template.turn_tokens.finditer(end)][-1:]
            never_written = len(tail) - len(end)
            shared = len(common_start(reply[::-1], tail[::-1]))
            if not token or not tail.startswith(end) or shared < never_written + len(token[0]):
                raise Unproven("no end", "the template does not end it as it ends other turns")
            return reply[: len(reply) - never_written]
        return reply[: len(reply) - len(tail)] + end

    def end(self, chat: Chat, at: int) -> str:
        """Return what the target writes behind its last text."""
        return self._of(chat, at)[1]

    def closing(self, chat: Chat, at: int) -> str | None:
        """Return what closes the thought that the prompt of a turn has opened, None where it has opened none.

        By a turn with a thought, if the template shows it right behind the prompt; else by the name of the last tag.
        """
        key = chat.stated
        if key not in self._closing:
            self._closing[key] = self._find_closing(chat)
        return self._closing[key]

    def _find_closing(self, chat: Chat) -> str | None:
        asked = [{"role": "user", "content": "first"}]
        turn = {"role": "assistant", "content": f"{PROBE}said", "reasoning_content": f"{PROBE}thought"}
        try:
            prompt = self.template.render(asked, chat.tools, prompt=True, kwargs=chat.kwargs)
            through = self.template.render([*asked, turn], chat.tools, kwargs=chat.kwargs)
        except Unusable:
            return None
        opened = OPEN_THOUGHT.search(prompt)
        before, thought, behind = through.partition(f"{PROBE}thought")
        if thought and before.rstrip() == prompt.rstrip():
            closing = behind.partition(f"{PROBE}said")[0].strip()
            tags = re.match(r"<[^<>]*>|\[[^\[\]]*\]", closing)
            return tags[0] if tags else closing or None
        return f"{opened[1][0]}/{opened[1][1:]}" if opened and opened[1][1] != "/" else None

    def _of(self, chat: Chat, at: int) -> tuple[str, str]:
        message = chat.messages[at]
        kind = (bool(message.get("tool_calls")), bool(chat.tools), bool(message.get("reasoning_content")))
        kind += (chat.stated,)
        if kind not in self._found:
            self._found[kind] = self._search(chat, at)
        return self._found[kind]

    def _search(self, chat: Chat, at: int) -> tuple[str, str]:
        turn = _probe_last(chat.messages[at])
        alone = chat.render([*chat.messages[:at], turn])
        if PROBE not in alone:
            what = "tool calls" if turn.get("tool_calls") else "text"
            raise Unusable("lost text", f"the chat template does not show the {what} of message {at}")
        tail = alone.rpartition(PROBE)[2]
        try:
            further = chat.render([*chat.messages[:at], turn, *_next_messages(turn)])
        except Unusable:  # nothing may follow it
            further = ""
        behind = further.rpartition(PROBE)[2] if PROBE in further else None
        end = self._written(tail, behind, bool(turn.get("tool_calls")))
        if end is None:
            raise Unproven("no end", "no token ends the turn, which the template or generation_config.json would name")
        return tail, end

    def _written(self, tail: str, further: str | None, calls: bool) -> str | None:
        """Return what the target writes of what stands behind a turn's last text, alone and with more to follow."""
        stops, tokens = self.template.ends, self.template.turn_tokens
        both = common_start(tail, further) if further is not None else tail
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
            known = not self.template.names_stops or marker[0] in stops
            return further[: marker.end()] if known else None
        return both if both.isspace() and not calls else None

    @cached_property
    def _reply_ends(self) -> frozenset[str]:
        """The token that the template itself writes behind a reply, empty where it writes none."""
        asked = [{"role": "user", "content": "first"}, {"role": "assistant", "content": PROBE}]
        try:
            alone = self.template.render(asked).rpartition(PROBE)[2]
            further = self.template.render([*asked, {"role": "user", "content": "next"}]).rpartition(PROBE)[2]
        except Unusable:
            return frozenset()
        found = self.template.turn_tokens.findall(common_start(alone, further))
        return frozenset(found[-1:] or self.template.turn_tokens.findall(alone)[:1])


def _probe_last(message: dict) -> dict:
    """Return a turn whose last text, whichever the template puts last, is the probe."""
    calls = message.get("tool_calls")
    if not calls:
        return {**message, "content": PROBE}
    last = calls[-1]
    if isinstance(function := last.get("function"), dict):
        last = {**last, "function": {**function, "arguments": _probe_arguments(function.get("arguments"))}}
    else:
        last = {**last, "arguments": _probe_arguments(last.get("arguments"))}
    return {**message, "tool_calls": [*calls[:-1], last]}


def _probe_arguments(arguments: object) -> object:
    return f'{{"value": "{PROBE}"}}' if isinstance(arguments, str) else {"value": PROBE}


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
