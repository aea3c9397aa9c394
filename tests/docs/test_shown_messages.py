"""A message that the documentation quotes is one that the program can print."""

import ast
from functools import cache

import pytest
from documented_lines import ROOT
from markdown_it import MarkdownIt

PAGE = ROOT / "docs/troubleshooting.md"
LEAST = 18  # letters of its own that a message needs to be told from others


@cache
def printable() -> list[list[str]]:
    """The texts of the program: the parts of each that are its own, in order, between what it fills in."""
    found = []
    for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            values = node.values if isinstance(node, ast.JoinedStr) else [node]
            parts = [each.value for each in values if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            if sum(map(len, parts)) >= LEAST:
                found.append([part.strip() for part in parts if part.strip()])
    return found


def has_in_order(line: str, parts: list[str]) -> bool:
    at = 0
    for part in parts:
        at = line.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def quoted() -> list[str]:
    """The lines of the page's blocks of text, and the spans of its table and text that are sentences."""
    lines = []
    for token in MarkdownIt("commonmark").enable("table").parse(PAGE.read_text()):
        if token.type == "fence" and token.info == "text":
            lines += token.content.splitlines()
        elif token.type == "inline":
            spans = [" ".join(child.content.split()) for child in token.children if child.type == "code_inline"]
            commands = ("pipeline", "--", "train-draft")
            lines += [span for span in spans if span.count(" ") > 2 and not span.startswith(commands)]
    return lines


@pytest.mark.parametrize("line", quoted())
def test_a_quoted_line_is_one_that_is_printed(line):
    assert any(has_in_order(line, parts) for parts in printable()), line
