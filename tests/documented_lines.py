"""Commands as the documentation shows them: lines of code blocks, and spans of code in the text."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("pipeline/*/README.md")),
    *sorted(ROOT.glob("stages/*/README.md")),
    *sorted(ROOT.glob("data/*/README.md")),
]
ONE_FOLDER = ("docs/a-day.md",)  # whose sections build on one another
PROGRAMS = ("pipeline", "make", "torchrun", "pip", "python", "pytest", "source")
ASSIGNMENT = re.compile(r"[A-Z_]+=\S+")
COMMENT = re.compile(r"(?:^|\s)#\s.*")


@dataclass(frozen=True)
class Shown:
    """A command of a page, or in text a part of one, under its heading. words: without variables before it."""

    page: str
    section: str
    text: str
    in_text: bool

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.text)
        while words and ASSIGNMENT.fullmatch(words[0]):
            words = words[1:]
        return words


def shown_in(path: Path) -> list[Shown]:
    """Return what a page shows in its order: whole commands, options, and commands' names with options."""
    page, section, found = path.relative_to(ROOT).as_posix(), "", []
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text())
    for at, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag in ("h1", "h2") and page not in ONE_FOLDER:
            section = tokens[at + 1].content
        elif token.type in ("fence", "code_block"):
            kind, block = token.info.strip(), token.content
            if kind == "console":  # with what is printed
                block = "\n".join(line for line in block.splitlines() if line.startswith("$ "))
            found += [Shown(page, section, line, False) for line in command_lines(block, kind == "sh", page)]
        elif token.type == "inline":
            spans = [" ".join(child.content.split()) for child in token.children if child.type == "code_inline"]
            found += [Shown(page, section, span, True) for span in spans]
    return found


def command_lines(block: str, strict: bool, page: str) -> Iterator[str]:
    """Yield the commands of a code block, each on one line. strict: a line that is none is an error."""
    lines = block.replace("\\\n", " ").splitlines()
    for line in lines:
        line = COMMENT.sub("", line.removeprefix("$ ")).strip()
        first = next((word for word in line.split() if not ASSIGNMENT.fullmatch(word)), "")
        if first in PROGRAMS:
            yield " ".join(line.split()) if "'" not in line else line
        elif strict and line:
            raise AssertionError(f"{page}: a block of sh has a line that is no known command: {line}")
