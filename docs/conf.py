"""How Sphinx makes a site of the Markdown files of this repository: `make docs`.

Its source is the whole repository, so that pages link to each other, to the READMEs beside the code and to files as
they do on a forge, and nothing is copied. A link that leads nowhere ends the build.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

project = "draft-pipeline"
author = copyright = "the draft-pipeline authors"
version = release = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
extensions = ["myst_parser", "command_reference"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "docs/*.md",
    "pipeline/README.md",
    "stages/README.md",
    "pipeline/**/README.md",
    "stages/**/README.md",
    "data/*/README.md",
]
exclude_patterns = ["build", "**/.venv", "**/node_modules"]
html_theme = "furo"
html_title = f"draft-pipeline {version}"
html_copy_source = False
html_show_sourcelink = False
myst_heading_anchors = 3
myst_links_external_new_tab = False
# READMEs are pages in their own right: a map beside the code, in no list of contents but that of where it is linked.
suppress_warnings = ["toc.not_included", "misc.highlighting_failure"]

BESIDE_THE_CODE = [
    "README",
    "pipeline/README",
    "stages/README",
    "pipeline/corpus/README",
    "stages/cache_hidden/README",
    "stages/serve_check/README",
    "data/results/README",
    "data/tiny-qwen3/README",
    "CHANGELOG",
]


def add_contents(app, document: str, source: list[str]) -> None:
    """Add to the first page the contents that the site's menu shows: the pages it links, and those beside the code."""
    if document == root_doc:
        pages = dict.fromkeys(re.findall(r"\]\(([\w-]+)\.md\)", source[0]))
        lines = ["", "```{toctree}", ":hidden:", *pages, *(f"/{page}" for page in BESIDE_THE_CODE), "```", ""]
        source[0] += "\n".join(lines)


def setup(app) -> None:
    app.connect("source-read", add_contents)
