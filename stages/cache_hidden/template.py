"""From a conversation to token ids and a loss mask, by the target's own chat template.

What is supervised: the assistant's turns, all of them, from the first token that the target itself would write to the
one that ends its turn. Where the template marks them (`{% generation %}`) its marks are taken, otherwise each turn is
found by rendering what comes before it.

Some templates render a turn otherwise once more turns follow: they drop its reasoning, say. Such a turn, as it stands
in the whole conversation, is not what the target would have written, so it stays as context and is not supervised.

    T tokens of a conversation
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from pipeline.errors import UsageError
from pipeline.intake import Unusable
from pipeline.target_files import chat_template
from pipeline.tokenizer import load_tokenizer
from stages.cache_hidden.settings import mask_rule

TODAY = datetime(2024, 7, 26)  # in every rendering; the day Llama's templates take when they are told none
RENDERING_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, the spans of characters to supervise, and how many turns the template rewrote."""

    text: str
    spans: list[tuple[int, int]]
    rewritten: int


class ChatTemplate:
    """The target's tokenizer with its chat template."""

    def __init__(self, folder: Path):
        self.tokenizer = load_tokenizer(folder)
        if not self.tokenizer.is_fast:
            raise UsageError(f"{folder}: its tokenizer cannot map tokens to characters; add a tokenizer.json")
        self.template = chat_template(folder)
        self.marked = mask_rule(self.template) == "marks"
        self.shows_tools = "tools" in _reads(folder, self.template)
        self.ends = {end for end in (self.tokenizer.eos_token, *_turn_ends(self.tokenizer)) if end}

    def render(self, messages: list[dict], tools: list[dict] | None = None) -> Rendered:
        """Return the conversation as text with the spans to supervise; Unusable, with the reason, when it has none."""
        if tools and not self.shows_tools:
            raise Unusable("tools", "has `tools`, which the chat template does not show; the prompt would lack them")
        try:
            rendered = self._by_marks(messages, tools) if self.marked else self._by_prefixes(messages, tools)
        except RENDERING_ERRORS as error:
            cause = str(error).strip().split("\n")[0][:120]
            raise Unusable("template error", f"the chat template refuses it ({cause})") from error
        if not rendered.spans and rendered.rewritten:
            raise Unusable("rewritten turns", "the template rewrites every assistant turn that is not the last")
        return rendered

    def encode(self, rendered: list[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return ids int32 [T] and mask bool [T] of each. A token is supervised when a span covers any of it."""
        encoded = self.tokenizer(
            [one.text for one in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            padding=False,
        )
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True)
        return [(np.array(ids, np.int32), _covered(offsets, one.spans)) for ids, offsets, one in pairs]

    def _render(self, messages: list[dict], tools: list[dict] | None, *, prompt: bool = False, marks: bool = False):
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks,
            date_string=TODAY.strftime("%d %b %Y"),
            **self.tokenizer.special_tokens_map,
        )
        return (texts[0], [tuple(span) for span in spans[0]]) if marks else texts[0]

    def _by_marks(self, messages: list[dict], tools: list[dict] | None) -> Rendered:
        whole, spans = self._render(messages, tools, marks=True)
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(turns):  # marks that are not one a turn: no way to look at a turn alone
            return Rendered(whole, [span for span in spans if span[0] < span[1]], 0)
        kept, rewritten = [], 0
        for at, span in zip(turns, spans, strict=True):
            if at < len(messages) - 1:
                through, alone = self._render(messages[: at + 1], tools, marks=True)
                if alone[-1:] != [span] or through[: span[1]] != whole[: span[1]]:
                    rewritten += 1
                    continue
            if span[0] < span[1]:
                kept.append(span)
        return Rendered(whole, kept, rewritten)

    def _by_prefixes(self, messages: list[dict], tools: list[dict] | None) -> Rendered:
        whole = self._render(messages, tools)
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        kept, rewritten = [], 0
        for at in turns:
            through = self._render(messages[: at + 1], tools) if at < len(messages) - 1 else whole
            before = self._render(messages[:at], tools, prompt=True)
            # A template may put more into its prompt than into the turn (an opening thought): they part there.
            start = _common(before, through)
            stop = start + self._length(through[start:], messages[at]["content"])
            if through[:stop] != whole[:stop]:
                rewritten += 1
            elif start < stop:
                kept.append((start, stop))
        return Rendered(whole, kept, rewritten)

    def _length(self, reply: str, content: str) -> int:
        """Return how many characters of a rendered turn the target writes: through what ends the turn.

        What a template puts behind that (a newline, an end of text) the target never writes.
        """
        content = content.strip()
        found = reply.find(content)
        after = found + len(content) if found >= 0 else 0
        ends = [place + len(end) for end in self.ends if (place := reply.find(end, after)) >= 0]
        return min(ends, default=len(reply.rstrip()))


def _reads(folder: Path, template: str) -> set[str]:
    """Return the names a template reads, having stopped its clock. UsageError when it cannot be compiled.

    Nothing in a cache may depend on the clock, or the same command gives other samples tomorrow. The renderer lets no
    function through its arguments, so the compiled template, of which it keeps one, is given ours.
    """
    try:
        compiled = _compile_jinja_template(template)
        compiled.globals["strftime_now"] = TODAY.strftime
        return find_undeclared_variables(compiled.environment.parse(template))
    except TemplateError as error:
        raise UsageError(
            f"{folder}: its chat template is no Jinja ({error}); fetch the target's files again"
        ) from error


def _common(one: str, other: str) -> int:
    """Return how many characters two texts share from their start."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that usually end a turn, as far as this tokenizer knows them."""
    known = tokenizer.get_added_vocab()
    return [end for end in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>") if end in known]


def _covered(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    """Return which tokens overlap a span, bool [T]; offsets are the tokens' first and last + 1 character."""
    bounds_T2 = np.array(offsets, np.int64).reshape(-1, 2)
    covered_T = np.zeros(len(bounds_T2), bool)
    for start, stop in spans:
        covered_T |= (bounds_T2[:, 0] < stop) & (bounds_T2[:, 1] > start)
    return covered_T
