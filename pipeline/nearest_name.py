"""The nearest of the names there are, for whoever mistyped one: of options, commands, keys and values alike."""

import difflib
from collections.abc import Iterable

LEAST = 0.6  # similarity; below it a guess helps nobody


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like `name`, or begins most like it; None where none is like it."""
    told = plain(name)

    def likeness(other: str) -> float:
        whole = plain(other)
        shorter = whole[: max(len(told), 1)]  # `--temp` means `--temperature`
        return max(difflib.SequenceMatcher(None, told, text).ratio() for text in (whole, shorter))

    best = max(known, key=lambda other: (likeness(other), -abs(len(other) - len(name))), default=None)
    return best if best is not None and likeness(best) >= LEAST else None


def did_you_mean(name: object, known: Iterable[str], shown: str = "{}") -> str:
    """Return "; did you mean X?" for an error's text, "" where nothing is like it. shown: how X is written."""
    found = nearest(str(name), known)
    return "" if found is None else f"; did you mean {shown.format(found)}?"


def plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-").lower()
