"""Running commands of ours in this process, small."""

import re
import shlex
from pathlib import Path

import documented_table as table
import torch
from documented_lines import ROOT, Shown
from markdown_it import MarkdownIt

from pipeline.cache.codecs import CODECS
from pipeline.cli import main
from pipeline.drafts import DRAFTS
from pipeline.drafts.objectives import OBJECTIVES
from stages.cache_hidden.engine import ENGINES

# Pages with a part of their own: the dict that the page says to add it to, by which name, and what of the page's code.
PARTS = {
    "docs/extending-method.md": (DRAFTS, "bigram", lambda code: code["Bigram"]),
    "docs/extending-codec.md": (CODECS, "fixed16", lambda code: code["Fixed16"]()),
    "docs/extending-objective.md": (OBJECTIVES, "shared", lambda code: code["SHARED"]),
    # In the place of the built-in one, whose cache it has to write.
    "docs/extending-engine.md": (ENGINES, "transformers", lambda code: code["LayerByLayer"]),
}


def add_part(page: str, monkeypatch) -> None:
    """Run a page's one block of Python, and add what it defines where the page says so; nothing on other pages."""
    if page not in PARTS:
        return
    blocks = MarkdownIt("commonmark").parse((ROOT / page).read_text())
    (code,) = [token.content for token in blocks if token.type == "fence" and token.info == "python"]
    names = {"__name__": Path(page).stem}
    exec(compile(code, page, "exec"), names)
    parts, name, defined = PARTS[page]
    monkeypatch.setitem(parts, name, defined(names))


def with_sets(line: str) -> str:
    stated = set(re.findall(r"train\.\w+", line))
    few = {key: value for key, value in table.SMALL_SETS.items() if key not in stated}
    if "train.epochs" in stated:
        few.pop("train.steps")
    return line + "".join(f" --set {key}={value}" for key, value in few.items())


def newest(beginning: str) -> str:
    return str(max(Path().glob(f"{beginning}*"), key=lambda path: path.stat().st_mtime))


def ended(typed: str, codes: tuple[int, ...] = (0,), line: Shown | None = None) -> None:
    torch.manual_seed(0)
    code = 0
    try:
        main(shlex.split(typed))
    except SystemExit as stop:
        code = stop.code or 0
    shown = f"{line.page}, {line.section!r} shows: {line.text}\n" if line else ""
    assert code in codes, (
        f"{shown}run was: pipeline {typed}\nit ended with {code}; its message is in the captured stderr"
    )
