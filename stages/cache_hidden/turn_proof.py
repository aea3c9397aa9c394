"""Proves an assistant turn: the prompt that an engine would send for it, and the reply that the target would write.

A turn is supervised only if its tokens are what the target would generate after an engine's prompt. Two renderings of
the chat template decide: the messages before the turn with the generation prompt (what an engine sends), and the
messages including the turn. If the second starts with the first, the rest is the reply. If not, the template renders
the prompt differently once the reply is there; then the reply is taken out of the second, or the turn is Unproven.
"""

import re
from dataclasses import dataclass

from stages.cache_hidden.rendered_chat import (
    OPEN_THOUGHT,
    PLACEHOLDER,
    THOUGHT,
    RenderedChat,
    TurnEnds,
    Unproven,
    common_prefix,
    with_name_replaced,
)

CLOSED_THOUGHT = re.compile(
    r"(?:<([\w:]+)>\s*</\1>|\[(\w+)\]\s*\[/\2\]|<\|(\w+)>[\w\s]*<\3\|>|<\|START_(\w+)\|>\s*<\|END_\4\|>)\s*$"
)
STATED_THOUGHT = re.compile(  # a thinking block at the start of a reply; its text is the group
    rf"\s*{THOUGHT}(.*?)(?:</(?:\w+:)?think(?:ing)?>|\[/THINK\]|<channel\|>)", re.DOTALL
)


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


def prove_turn(chat: RenderedChat, at: int, ends: TurnEnds) -> ProvenTurn:
    """Return message `at` as a ProvenTurn. Unproven: it cannot be supervised; Unusable: the template refuses it."""
    if at == 0:
        raise Unproven("no prompt", "it begins with a reply, which nobody asked for")
    prompt, through = chat.prompt(at), chat.through(at)
    _check_prompted(chat, at, prompt)
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


def _after_text(chat: RenderedChat, at: int, ends: TurnEnds) -> str:
    """Return what the target writes after the text of a turn: its tool calls, if any, and the end token."""
    message = chat.messages[at]
    if not message.get("tool_calls"):
        return ends.end(chat, at)
    after = chat.render([*chat.messages[:at], {**message, "content": PLACEHOLDER}]).rpartition(PLACEHOLDER)
    if not after[1]:
        raise Unproven("other prompt", "the template does not show its text beside its calls")
    return ends.through_end(chat, at, after[2])


def _reply_after_changed_prompt(chat: RenderedChat, at: int, prompt: str, through: str, ends: TurnEnds) -> str:
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


def _reply_after_header(chat: RenderedChat, at: int, prompt: str, through: str, header: str, ends: TurnEnds) -> str:
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
        replaced["tool_calls"] = [with_name_replaced(call) for call in message["tool_calls"]]
    return replaced


def _check_prompted(chat: RenderedChat, at: int, prompt: str) -> None:
    """Raise Unproven for a reply right after another one, where the template adds no generation prompt between them."""
    if chat.messages[at - 1]["role"] == "assistant" and prompt == chat.through(at - 1):
        raise Unproven("no prompt", "it follows another reply, and the template asks for none between them")


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


def _check_reasoning(chat: RenderedChat, at: int, prompt: str, reply: str, ends: TurnEnds) -> None:
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
