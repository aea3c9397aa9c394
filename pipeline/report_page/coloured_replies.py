"""Sample replies of a report page: each token coloured by the slot it was proposed in, target calls marked."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.evaluation.reports import Report, Sample
from pipeline.visible_text import visible, visible_lines

SHADES = 8  # --s1 to --s8 of page.css: later slots have the last one
OWN = "own"  # the target's own token
FIRST = "first"  # the first token of a reply, of the prefill


@dataclass(frozen=True)
class Token:
    """A token for the template. kind: OWN, FIRST, or "s" and the number of a shade. slot: its proposal, from 1."""

    text: str
    kind: str
    slot: int = 0


@dataclass(frozen=True)
class Call:
    """What one target call gained; `proposed` were verified."""

    tokens: list[Token]
    proposed: int


@dataclass(frozen=True)
class Reply:
    """A reply for the template. cut: it goes on."""

    domain: str
    prompt: str
    calls: list[Call]
    tokens: int
    cut: bool

    @property
    def gain(self) -> float:
        """Tokens a target call."""
        return self.tokens / max(1, len(self.calls))


def replies(report: Report, most_tokens: int) -> list[Reply]:
    """Return the replies that a report keeps as text, none of reports of earlier versions. Of a reply at most so many
    tokens, and the calls that gained them."""
    found = []
    for kept in report.replies:
        sample, shown = report.samples[kept.sample], kept.tokens[:most_tokens]
        calls = [*_calls([visible_lines(text) for text in shown], sample)]
        domain = visible(sample.domain) or "no domain"
        found.append(Reply(domain, visible_lines(kept.prompt), calls, len(shown), len(shown) < len(kept.tokens)))
    return found


def _calls(texts: list[str], sample: Sample) -> Iterator[Call]:
    """Yield the target calls of a reply, the prefill first, without one whose tokens the limit cut off."""
    if texts:
        yield Call([Token(texts[0], FIRST)], 0)
    at = 1
    for length, matched, proposed in zip(sample.lengths, sample.matched, sample.proposed, strict=True):
        gained = texts[at : at + length]
        if gained:
            yield Call([_token(text, slot, matched) for slot, text in enumerate(gained, 1)], proposed)
        at += length


def _token(text: str, slot: int, matched: int) -> Token:
    return Token(text, OWN) if slot > matched else Token(text, f"s{min(slot, SHADES)}", slot)
