"""Replies as text, token by token, so that a reader can see which tokens each target call gained."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import FailFast, Field
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from pipeline.json_files import Record

MOST_REPLIES = 12  # of a report: one of each domain, then a second of each, and so on
PROMPT_CHARACTERS = 600  # kept of a prompt's end


class ReplyText(Record):
    """One greedy reply. The first token is the prefill's; then `lengths` of the report's sample say how many each
    target call gained, of which `matched` are proposals and the next, if any, is the target's own."""

    sample: int = Field(ge=0, description="index in the report's samples")
    prompt: str = Field(description="its end, special tokens included")
    tokens: Annotated[list[str], FailFast()] = Field(
        description="text of each token; that of a character of several tokens is with the last of them"
    )


def spread_over_domains(domains: Sequence[str], most: int = MOST_REPLIES) -> list[int]:
    """Return indices of at most `most` entries in order: the first of every domain, then the second of each."""
    seen: dict[str, int] = {}
    rounds = []
    for index, domain in enumerate(domains):
        seen[domain] = seen.get(domain, 0) + 1
        rounds.append((seen[domain], index))
    return sorted(index for _, index in sorted(rounds)[:most])


def reply_text(
    sample: int, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], ids: Sequence[int]
) -> ReplyText:
    """Return a reply as text. prompt_ids, ids: token ids of the prompt and of the reply."""
    prompt = tokenizer.decode(list(prompt_ids[-PROMPT_CHARACTERS:]), skip_special_tokens=False)
    return ReplyText(sample=sample, prompt=prompt[-PROMPT_CHARACTERS:], tokens=token_texts(tokenizer, ids))


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to what those before it decode to, as many texts as there are ids."""
    texts = TokenTexts(tokenizer)
    return [texts.next(token) for token in ids]


class TokenTexts:
    """The tokens of one reply as text, one after the other, special tokens included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.stream = tokenizer, DecodeStream(skip_special_tokens=False)
        self.ids: list[int] = []  # so far, and their text: of a tokenizer in Python, which has no stream
        self.text = ""

    def next(self, token: int) -> str:
        """Return the text that the next token adds; "" within a character of several tokens."""
        if not self.tokenizer.is_fast:
            return self._next_of_whole(token)
        backend = self.tokenizer.backend_tokenizer
        try:
            return self.stream.step(backend, token) or ""
        except Exception:  # its only kind: bytes that are no UTF-8, of a tokenizer that falls back to bytes
            self.stream = DecodeStream(skip_special_tokens=False)
            return backend.decode([token], skip_special_tokens=False)

    def _next_of_whole(self, token: int) -> str:
        self.ids.append(token)
        whole = self.tokenizer.decode(self.ids, skip_special_tokens=False)
        if whole.endswith("\N{REPLACEMENT CHARACTER}") or not whole.startswith(self.text):
            return ""
        added, self.text = whole[len(self.text) :], whole
        return added
