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
