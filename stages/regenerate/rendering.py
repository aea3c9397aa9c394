"""Render prompts to token ids by the target's chat template, to decode from or to compare with a server's."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.target.chat_template import ChatTemplate

CONTEXT_TOKENS = 4  # tokens shown before a difference, and after it


class Renderer:
    """The target's tokenizer and chat template, with the arguments and the date for every prompt."""

    def __init__(self, folder: Path, template_kwargs: dict, date: str):
        self.template = ChatTemplate(folder, template_kwargs, date)
        self.tokenizer = self.template.tokenizer

    def prompt_ids(self, messages: list[dict], tools: list[dict] | None, template_kwargs: dict | None) -> list[int]:
        """Return the ids that an engine would send to the target. Unusable when the template refuses the messages."""
        return self.template.prompt_ids(messages, tools, template_kwargs)

    def text(self, ids: Sequence[int]) -> str:
        """Return a reply's text: without special tokens, as a server sends it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def compare(self, theirs: Sequence[int], ours: Sequence[int], location: str) -> None:
        """UsageError, with the tokens around the first difference, when the server's prompt ids differ from ours."""
        if list(theirs) == list(ours):
            return
        pairs = zip(theirs, ours, strict=False)
        at = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(theirs), len(ours)))
        first = max(at - CONTEXT_TOKENS, 0)
        shown = "; ".join(
            f"{where}: {self._token(theirs, where)} {'is' if where < at else 'for'} {self._token(ours, where)}"
            for where in range(first, min(at + CONTEXT_TOKENS + 1, max(len(theirs), len(ours))))
        )
        raise UsageError(
            f"{location}: the server asked the target with {len(theirs)} tokens that differ from the {len(ours)} of "
            f"our chat template from token {at} on (position: the server's for ours): {shown}; a draft trained on this "
            "would be asked otherwise than it learned. Name the same target with --model and the server, the same "
            "--template-kwargs and chat template, and with --template-date the day where the template shows one"
        )

    def _token(self, ids: Sequence[int], at: int) -> str:
        return f"{ids[at]} {self.tokenizer.decode([ids[at]])!r}" if at < len(ids) else "nothing"
