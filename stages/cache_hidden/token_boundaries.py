"""Tokenises rendered turns, and finds at which token a character position falls.

T tokens of a sample
"""

import numpy as np

from pipeline.target.chat_template import ChatTemplate

CHARACTERS_A_TOKEN = 16  # of a long text so many are encoded first, and more where these give too few tokens


class EncodedText:
    """A text's ids, int32 [T], perhaps of its beginning only (`cut`), with a map from characters to tokens.

    Tokenizers split text at added tokens first, so these mostly show where turns begin and end. Only where they do not
    are the tokenizer's own offsets computed, which adds a quarter to the time of encoding.
    """

    def __init__(self, template: ChatTemplate, text: str, encoding, *, cut: bool, offsets: bool):
        self.template, self.text, self.cut = template, text, cut
        self.ids = np.array(encoding.ids, np.int32)
        self._with_offsets = encoding if offsets else None
        self._added = None if offsets else added_token_spans(template, text, self.ids)

    def boundary(self, character: int) -> int | None:
        """Return how many tokens end at or before a character position, None where a token crosses it.

        Beyond the encoded part of a cut text, the number of all tokens.
        """
        if character >= len(self.text):
            return len(self.ids)
        for start, stop, token in self._added or ():
            if character in (start, stop):
                return token + (character == stop)
        token = self._offsets.char_to_token(character)
        while token is None and character < len(self.text) - 1:  # a space that belongs to no token's range
            character += 1
            token = self._offsets.char_to_token(character)
        if token is None:
            return len(self.ids)
        while token and self._offsets.token_to_chars(token - 1) == self._offsets.token_to_chars(token):
            token -= 1  # the first of the tokens that share one character
        began, _ = self._offsets.token_to_chars(token)
        return token if began == character else None

    def prompt_boundary(self, character: int) -> int | None:
        """Return how many tokens the first `character` characters have, None if encoded on their own they differ.

        Only what follows the last added token among them can differ.
        """
        if self.cut and character >= len(self.text):
            return self.boundary(character)
        if self._added is not None:
            before = [(start, token) for start, stop, token in self._added if stop <= character]
            began, start = before[-1] if before else (0, 0)
            alone = _encode_alone(self.template, self.text[began:character])
            stop = start + len(alone)
            if self.ids[start:stop].tolist() == alone and self.template.unknown_id not in alone:
                return stop  # equal tokens mean equal text, except for the unknown token
        stop = self.boundary(character)
        if stop is None:
            return None
        start = max(np.flatnonzero(self.template.is_added[self.ids[:stop]]), default=-1)
        began = self._offsets.token_to_chars(start)[0] if start >= 0 else 0
        alone = _encode_alone(self.template, self.text[began:character])
        return stop if alone == self.ids[max(start, 0) : stop].tolist() else None

    @property
    def _offsets(self):
        """The encoding with character offsets, computed on first use."""
        if self._with_offsets is None:
            self._with_offsets = self.template.backend.encode(self.text, add_special_tokens=False)
            self.template.needs_offsets = True
        return self._with_offsets


def added_token_spans(template: ChatTemplate, text: str, ids: np.ndarray) -> list[tuple[int, int, int]] | None:
    """Return the added tokens of a text as (first character, the one after the last, index into ids).

    None where that cannot be told: some take the white space around them, or match text that only looks alike.
    """
    if not template.added_tokens_are_plain:
        return None
    at = np.flatnonzero(template.is_added[ids]).tolist()
    present = [template.added[i] for i in ids[at].tolist()]
    found = [*template.matcher(frozenset(present)).finditer(text)] if present else []
    if [match[0] for match in found] != present:
        return None
    return [(*match.span(), token) for match, token in zip(found, at, strict=True)]


def encode_texts(template: ChatTemplate, texts: list[str], max_length: int) -> list[EncodedText]:
    """Encode the texts in one batch, each only as far as needed for `max_length` tokens."""
    limit = CHARACTERS_A_TOKEN * max_length + 1024
    offsets, template.needs_offsets = template.needs_offsets, False  # if the previous batch needed them
    encode = template.backend.encode_batch if offsets else template.backend.encode_batch_fast
    encodings = encode([text[:limit] for text in texts], add_special_tokens=False)
    return [
        EncodedText(template, text, encoding, cut=False, offsets=offsets)
        if len(text) <= limit
        else _encode_long(template, text, limit, len(encoding.ids), max_length)
        for text, encoding in zip(texts, encodings, strict=True)
    ]


def _encode_long(template: ChatTemplate, text: str, limit: int, count: int, max_length: int) -> EncodedText:
    """Encode more of a text until there are enough tokens, not counting those near the cut, which may be wrong.

    count: how many tokens its first `limit` characters have.
    """
    while count < max_length + 64 and limit < len(text):
        limit *= 4
        count = len(template.backend.encode_batch_fast([text[:limit]], add_special_tokens=False)[0].ids)
    encoding = template.backend.encode(text[:limit], add_special_tokens=False)
    return EncodedText(template, text[:limit], encoding, cut=limit < len(text), offsets=True)


def encode_separately(
    template: ChatTemplate, prompt: str, reply: str, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a prompt and of its reply, for texts that together have a token across their boundary.

    The reply is encoded after an added token, since a tokenizer may put a space before the first word of a text.
    """
    prompt_ids = encode_texts(template, [prompt], max_length)[0].ids
    last = next((found[0] for found in reversed(list(template.added_token_pattern.finditer(prompt)))), None)
    if last is None:
        return prompt_ids, encode_texts(template, [reply], max_length)[0].ids
    return prompt_ids, encode_texts(template, [last + reply], max_length)[0].ids[1:]


def _encode_alone(template: ChatTemplate, text: str) -> list[int]:
    """Return the ids of a text on its own; cached, since prompts have few different endings."""
    known = template.cached_ids
    if text not in known:
        if len(known) > 4096:
            known.clear()
        known[text] = template.backend.encode(text, add_special_tokens=False).ids
    return known[text]


def mask_of(spans: list[tuple[int, int]], count: int) -> np.ndarray:
    """Return which of `count` tokens are in a span [start, stop), bool [T]."""
    mask_T = np.zeros(count, bool)
    for start, stop in spans:
        mask_T[start:stop] = True
    return mask_T
