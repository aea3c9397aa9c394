"""Every line that docs/troubleshooting.md quotes is one that the program can print: its fixed parts are in the source.

On the page ‹…› stands for a value. What is left of a line has to stand in the texts of the source tree, as it is, or in
pieces that a comma, colon or semicolon joins: what is wrong and what to do are often two texts.
"""

import ast
import re
from functools import cache
from itertools import pairwise

import pytest
from documented_lines import ROOT
from markdown_it import MarkdownIt

PAGE = ROOT / "docs/troubleshooting.md"
VALUE = "\0"
LEAST = 8  # letters of a line that are fixed


@cache
def texts() -> str:
    """Return every text in the source, values in it as VALUE, one a line."""
    found = []
    for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quoted() -> list[str]:
    """Return the lines of the page's blocks of text, and the first cells of its tables."""
    tokens = MarkdownIt("commonmark").enable("table").parse(PAGE.read_text())
    blocks = [token.content for token in tokens if token.type == "fence" and token.info == "text"]
    lines = [line for block in blocks for line in block.splitlines()]
    for before, token in pairwise(tokens):
        if before.type == "td_open" and token.content.startswith("`"):
            lines.append(token.content.strip("`"))
    return lines


def fixed_parts(line: str) -> list[str]:
    """Return what of a line is no value: without "error: ", blanks and punctuation at the ends of parts."""
    parts = re.split("‹[^›]*›", line.removeprefix("error: ").removeprefix("bug: "))
    return [part for part in (part.strip(" ;:,.()[]`'\"-") for part in parts) if part]


def absent(line: str) -> list[str]:
    """Return the fixed parts of a line that no text of the source has."""
    pieces = []
    for part in fixed_parts(line):
        pieces += [part] if part in texts() else [piece.strip() for piece in re.split("[,:;] ", part)]
    return [piece for piece in pieces if piece not in texts()]


def test_the_page_quotes_many_lines():
    assert len(quoted()) > 80


@pytest.mark.parametrize("line", quoted())
def test_a_quoted_line_is_in_the_source(line):
    assert not absent(line), f"nothing in pipeline/ or stages/ prints {absent(line)}"
    assert sum(map(len, fixed_parts(line))) >= LEAST, f"too little of it is fixed: {line}"


def test_what_nothing_prints_is_found():
    assert absent("error: ‹path›: damaged, its own hash does not match; have a cup of tea") == ["have a cup of tea"]
