"""Conversations, and the equal phrasings a reply is drawn from.

A reply is written as a `Text`: a string, a list of parts that follow one another, or a tuple of phrasings that say
the same. `render` draws one phrasing of each tuple; `matches` accepts any of them and nothing else, so the same
expression writes the training data and scores the answers, strictly.

Which phrasing was begun decides the tokens after it. A causal draft head can see that; a parallel one cannot.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from zlib import crc32

Text = str | list["Text"] | tuple["Text", ...]
Check = Callable[[str], bool]

HELDOUT_SHARE = 8  # one parameter tuple in 8 is never trained on


@dataclass
class Turn:
    """What the user says, one right reply to it, and who accepts a reply."""

    user: str
    reply: str
    check: Check


@dataclass
class Conversation:
    """Turns of one domain, drawn from one split; `template` names the user's phrasings."""

    domain: str
    split: str
    template: str
    turns: list[Turn]


@dataclass
class Draw:
    """A random source that keeps train and held-out apart, by template and by parameters.

    The target trains on the phrasings of "any" split; its draft only on those of "train".
    """

    rng: Random
    params_split: str
    template_split: str
    asked: list[int] = field(default_factory=list)

    def params(self, make: Callable[[Random], tuple]) -> tuple:
        """Draw parameters until they fall into this split."""
        while split_of(drawn := make(self.rng)) != self.params_split:
            pass
        return drawn

    def ask(self, *templates: str) -> str:
        """Draw one of the user's phrasings; the last third of them is held out."""
        cut = len(templates) - len(templates) // 3
        low, high = {"train": (0, cut), "heldout": (cut, len(templates)), "any": (0, len(templates))}[
            self.template_split
        ]
        self.asked.append(self.rng.randrange(low, high))
        return templates[self.asked[-1]]

    def turn(self, user: str, text: Text) -> Turn:
        """Return a turn answered by one phrasing of TEXT."""
        return Turn(user, render(text, self.rng), partial(matches, text))


def split_of(params: tuple) -> str:
    """Return the split that owns these parameters, by their hash: the same in every process."""
    return "heldout" if crc32(repr(params).encode()) % HELDOUT_SHARE == 0 else "train"


def render(text: Text, rng: Random) -> str:
    """Draw one phrasing."""
    if isinstance(text, tuple):
        return render(rng.choice(text), rng)
    return text if isinstance(text, str) else "".join(render(part, rng) for part in text)


def matches(text: Text, reply: str) -> bool:
    """Return whether REPLY is one of the phrasings, to the letter."""
    return re.fullmatch(pattern(text), reply) is not None


def pattern(text: Text) -> str:
    """Return the regular expression of all phrasings."""
    if isinstance(text, tuple):
        return "(?:" + "|".join(map(pattern, text)) + ")"
    return re.escape(text) if isinstance(text, str) else "".join(map(pattern, text))


def joined(parts: list[Text], separator: Text) -> list[Text]:
    """Return PARTS with the separator, itself a Text, between them."""
    return [piece for part in parts for piece in (separator, part)][1:]
