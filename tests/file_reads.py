"""Counts which files Python opens, by an audit hook; such a hook is never removed, so there is one. Arrow's own are not
seen."""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_counted: list[tuple[str, Counter]] = []


def _opened(event: str, arguments: tuple) -> None:
    if event == "open" and _counted and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.fsdecode(arguments[0])
        for folder, counts in _counted:
            if path.startswith(folder):
                counts[path.removeprefix(folder)] += 1


sys.addaudithook(_opened)


@contextlib.contextmanager
def counted_opens(folder: Path) -> Iterator[Counter]:
    """Yield a Counter of how often each file below `folder` is opened in the block, by path from there."""
    counts = Counter()
    _counted.append((f"{folder}/", counts))
    try:
        yield counts
    finally:
        _counted.pop()
