"""What refuses a turn whatever its renderings prove: nobody asked for it, another mode wrote it."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.cache_hidden.turn_proof import RenderedChat

# The names of a thought's tags. Only for prompts that open one and templates that never show what is in it.
THOUGHT = r"[<\[][\w:|]*?(?:think|thinking|thought|reasoning)[\w:|]*[>\]]"
OPEN_THOUGHT = re.compile(rf"({THOUGHT})\s*$")
CLOSED_THOUGHT = re.compile(
    r"(?:<([\w:]+)>\s*</\1>|\[(\w+)\]\s*\[/\2\]|<\|(\w+)>[\w\s]*<\3\|>|<\|START_(\w+)\|>\s*<\|END_\4\|>)\s*$"
)

STATED_THOUGHT = re.compile(  # at the start of a reply; what was thought is the group
    rf"\s*{THOUGHT}(.*?)(?:</(?:\w+:)?think(?:ing)?>|\[/THINK\]|<channel\|>)", re.DOTALL
)


class Unproven(Exception):
    """Raised where a turn cannot be supervised: `reason` to count by, and the particulars."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def check_asked_for(chat: "RenderedChat", at: int, prompt: str) -> None:
    """Refuse a reply behind another reply where the template asks for none between them: no engine would send that."""
    if chat.messages[at - 1]["role"] == "assistant" and prompt == chat.through(at - 1):
        raise Unproven("no prompt", "it follows another reply, and the template asks for none between them")


def check_mode(chat: "RenderedChat", at: int, prompt: str) -> None:
    """Refuse a reply that states a thought behind a prompt that has closed it: the target would not think again."""
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
