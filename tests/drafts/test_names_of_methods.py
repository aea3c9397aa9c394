"""Nothing but a method's own file names it: what else there is asks the method."""

import ast
import re
from pathlib import Path

from pipeline.drafts import DRAFTS

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/**/*.py")])
# What the forms of others are called, defaults, and examples in help and messages.
ENGINE_S_OWN = "stages/serve_check/vllm_script.py"  # runs in the engine's process, by the names of its classes
ALLOWED = {
    "pipeline/drafts/__init__.py": {"pipeline.drafts.dflash", "pipeline.drafts.domino", "pipeline.drafts.dspark"}
    | {"dflash", "domino", "dspark", "DFlash", "Domino", "DSpark"},  # imports, and the lines of DRAFTS
    "pipeline/drafts/block_draft.py": {"DFlashDraftModel"},
    "pipeline/drafts/draft.py": {"dflash_config"},
    "pipeline/drafts/objectives.py": {"dspark"},  # an objective, which any method may have
    "pipeline/published/reading.py": {"dflash_config", "dflash_module", "Qwen3DSparkModel"},
    "pipeline/published/export.py": {"dflash_config"},
    "pipeline/runs/recipe.py": {"domino"},  # the default method
    "pipeline/draft_commands.py": {"dflash,domino"},
    "pipeline/options.py": {"dflash,domino"},
    "pipeline/report_page/contents.py": {"runs/domino"},
}


def names_of(path: Path) -> set[str]:
    """Every identifier, module and string of a file that names a method, docstrings aside; of a text the word alone."""
    tree = ast.parse(path.read_text())
    documented = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {id(node.body[0].value) for node in documented if ast.get_docstring(node, clean=False) is not None}
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            texts.append(node.value)
        for name in ("id", "attr", "arg", "name", "module", "asname"):
            text = getattr(node, name, None)
            texts += [text] if isinstance(text, str) else []
    method = re.compile(rf"(?i)[\w./,]*({'|'.join(DRAFTS)})[\w./,]*")
    return {found[0].rstrip(",.") for text in texts for found in method.finditer(text)}


def test_only_a_methods_own_file_names_it():
    own = {ROOT / "pipeline" / "drafts" / f"{name}.py" for name in DRAFTS}
    named = {path.relative_to(ROOT).as_posix(): names_of(path) for path in FILES if path not in own}
    assert named.pop(ENGINE_S_OWN), "has the names of its classes no more: take it out here"
    assert {where: names for where, names in named.items() if names} == ALLOWED
