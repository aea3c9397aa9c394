"""From a rendered turn to ids and a mask, by the boundaries of tokens.

T tokens of a sample
"""

import numpy as np

from pipeline.chat_template import ChatTemplate

CHARACTERS_A_TOKEN = 16  # tried first of a text that is cut; more are taken where that is too little


class Encoded:
    """A text's ids, as far as wanted, and where in them a character stands."""

    def __init__(self, template: ChatTemplate, text: str, encoding, cut: bool):
        self.template, self.text, self.encoding, self.cut = template, text, encoding, cut
        self.ids = encoding.ids

    def boundary(self, place: int) -> int | None:
        """Return how many tokens end at or before a character, None where one goes across it.

        Beyond what was encoded of a text that is cut it is the number of all tokens.
        """
        if place >= len(self.text):
            return len(self.ids)
        token = self.encoding.char_to_token(place)
        while token is None and place < len(self.text) - 1:  # a space that a token leaves out of its range
            place += 1
            token = self.encoding.char_to_token(place)
        if token is None:
            return len(self.ids)
        while token and self.encoding.token_to_chars(token - 1) == self.encoding.token_to_chars(token):
            token -= 1  # the first of the tokens that share one character
        began, _ = self.encoding.token_to_chars(token)
        return token if began == place else None

    def prompt_boundary(self, place: int) -> int | None:
        """Return how many tokens the first `place` characters have, None if alone they have others.

        Text is split at added tokens before anything else, so only what follows the last of them can differ.
        """
        stop = self.boundary(place)
        if stop is None or (self.cut and place >= len(self.text)):
            return stop
        start = next((at for at in range(stop - 1, -1, -1) if self.ids[at] in self.template.added_ids), -1)
        began = self.encoding.token_to_chars(start)[0] if start >= 0 else 0
        alone = _alone(self.template, self.text[began:place])
        return stop if alone == self.ids[max(start, 0) : stop] else None


def encode_many(template: ChatTemplate, texts: list[str], max_length: int) -> list[Encoded]:
    """Encode the texts at once, each no further than `max_length` tokens need."""
    most = CHARACTERS_A_TOKEN * max_length + 1024
    encodings = template.backend.encode_batch([text[:most] for text in texts], add_special_tokens=False)
    return [
        Encoded(template, text, encoding, False)
        if len(text) <= most
        else _encode_long(template, text, most, encoding, max_length)
        for text, encoding in zip(texts, encodings, strict=True)
    ]


def _encode_long(template: ChatTemplate, text: str, most: int, encoding, max_length: int) -> Encoded:
    """Encode more of a text until there are enough tokens, of which the last ones, near the cut, do not count."""
    while len(encoding.ids) < max_length + 64 and most < len(text):
        most *= 4
        encoding = template.backend.encode(text[:most], add_special_tokens=False)
    return Encoded(template, text[:most], encoding, most < len(text))


def encode_apart(template: ChatTemplate, prompt: str, reply: str, max_length: int) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt and of the reply to it where the text of both is not cut between them.

    The reply is encoded behind an added token, as it is where it follows one; a tokenizer may put a space before the
    first word of a text.
    """
    prompt_ids = encode_many(template, [prompt], max_length)[0].ids
    last = next((found[0] for found in reversed(list(template.turn_tokens.finditer(prompt)))), None)
    if last is None:
        return prompt_ids, encode_many(template, [reply], max_length)[0].ids
    return prompt_ids, encode_many(template, [last + reply], max_length)[0].ids[1:]


def _alone(template: ChatTemplate, text: str) -> list[int]:
    """Return the ids of a text alone; the ends of prompts are few, so they are kept."""
    known = template.known_ids
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
