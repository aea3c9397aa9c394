"""A table of a report page."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows under heads; the first cell of a row names it."""

    heads: list[str]
    rows: list[list[str]]
