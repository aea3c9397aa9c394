"""What a shell completes: click's own completion of commands, options and paths, and values that click cannot know.

No name is written here a second time: codecs are imported, which takes a quarter of a second and no torch; the methods
would bring torch, so their names are read from the source of `DRAFTS`.
"""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
METHOD = "draft.method="


def script(commands, shell: str) -> str:
    """Return what a shell has to read once to complete our commands."""
    return get_completion_class(shell)(commands, {}, "pipeline", "_PIPELINE_COMPLETE").source()


def complete_paths(ctx, option, incomplete: str) -> list[CompletionItem]:
    """Complete a path, of an option that takes a name of the hub, too."""
    return [CompletionItem(incomplete, type="file")]


def complete_codecs(incomplete: str) -> list[CompletionItem]:
    """Complete one codec, or as in aux=int8,final=zstd."""
    from pipeline.cache.codecs import CODECS

    part = incomplete.rpartition(",")[2]
    columns = [] if "=" in part else ["aux=", "final="]
    return [CompletionItem(value) for value in _continued(incomplete, "[,=]", [*CODECS, *columns])]


def complete_methods(ctx, option, incomplete: str) -> list[str]:
    """Complete the methods of a list with commas."""
    return _continued(incomplete, ",", method_names())


def complete_setting(ctx, option, incomplete: str) -> list[str]:
    """Complete the method of a recipe, as --set takes it."""
    settings = [METHOD + name for name in method_names()]
    return [setting for setting in settings if setting.startswith(incomplete)]


def method_names() -> list[str]:
    """Return the keys of `DRAFTS` without importing it."""
    source = (Path(__file__).parent / "drafts/__init__.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == "DRAFTS":
            return [key.value for key in node.value.keys]
    return []


def _continued(incomplete: str, separator: str, names: Iterable[str]) -> list[str]:
    """Return what a list may become by completing its last word."""
    last = re.split(separator, incomplete)[-1]
    before = incomplete[: len(incomplete) - len(last)]
    return [before + name for name in names if name.startswith(last)]
