"""Reasons in a turn's prompt to leave the turn unsupervised: no generation prompt, or another thinking mode."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.cache_hidden.turn_proof import RenderedChat

# Tags of a thinking block. Used only for prompts that open one and for templates that never render what is in it.
THOUGHT = r"[<\[][\w:|]*?(?:think|thinking|thought|reasoning)[\w:|]*[>\]]"
OPEN_THOUGHT = re.compile(rf"({THOUGHT})\s*$")
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


def check_prompted(chat: "RenderedChat", at: int, prompt: str) -> None:
    """Raise Unproven for a reply right after another one, where the template adds no generation prompt between them."""
    if chat.messages[at - 1]["role"] == "assistant" and prompt == chat.through(at - 1):
        raise Unproven("no prompt", "it follows another reply, and the template asks for none between them")


def check_thinking_mode(chat: "RenderedChat", at: int, prompt: str) -> None:
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
