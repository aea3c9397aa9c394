"""Tables and consoles that show any text safely, through rich: markup in it is shown, never interpreted.

Apart from `visible_text.py`, since rich takes a third of the time that a command's help does.
"""

import sys
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from pipeline.visible_text import visible, visible_lines

WIDTH = 110  # columns where there is no terminal


class VisibleConsole(Console):
    """A console that escapes control characters in all text, and interprets neither [markup] nor :emoji:."""

    def __init__(self, stderr: bool = False):
        width = None if (sys.stderr if stderr else sys.stdout).isatty() else WIDTH
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **chosen) -> Text:
        return super().render_str(visible_lines(text), **chosen)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(visible_lines(text), style)


def shows_styles() -> bool:
    """Return whether standard output is a terminal that shows colours or underlines."""
    return VisibleConsole().color_system is not None


class Grid(Table):
    """A table whose cells escape control characters and line ends. Long text is folded, never cut off."""

    def add_column(self, header: RenderableType = "", **chosen) -> None:
        super().add_column(_visible_cell(header), **{"overflow": "fold", **chosen})

    def add_row(self, *cells: RenderableType | None, **chosen) -> None:
        super().add_row(*map(_visible_cell, cells), **chosen)


def _visible_cell(cell: RenderableType | None) -> RenderableType | None:
    return visible(cell) if isinstance(cell, str) else cell


def grid(*headers: str, title: str | None = None) -> Grid:
    """Return an empty table with these headers; the column of one that begins with `>` is right-aligned."""
    table = Grid(title=title and visible(title), title_justify="left", box=None, header_style="bold", pad_edge=False)
    for header in headers:
        table.add_column(header.removeprefix(">"), justify="right" if header.startswith(">") else "left")
    return table
