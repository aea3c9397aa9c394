"""The import arrows: stages -> pipeline, never back, never stage -> stage; one door; a door without torch."""

import ast
import importlib
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/**/*.py")])
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "zarr", "numpy", "pydantic", "matplotlib"}


def imports_of(path: Path, of_types: bool = True) -> set[str]:
    """Every module that a file names in an import, at any depth, as a dotted path. of_types: those for types alone."""
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if of_types or not is_of_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides the arrow"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def is_of_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    where = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    door = where in {"pipeline.cli", "pipeline.draft_commands", "pipeline.__main__"}
    for name in imports_of(path):
        if under(where, "pipeline") and not door:
            assert not under(name, "stages"), f"{where} imports {name}: pipeline never imports a stage"
        if under(where, "stages") and under(name, "stages"):
            stage = ".".join(where.split(".")[:2])
            assert under(name, stage), f"{where} imports {name}: a stage never imports another"
        if where != "pipeline.__main__":
            assert not under(name, "pipeline.cli"), f"{where} imports the door"


def test_training_and_what_it_imports_never_name_the_target():
    todo, seen = [ROOT / "stages/train_draft/run.py"], set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports_of(path, of_types=False):
            assert name.split(".")[0] not in {"transformers", "datasets"}, f"{path} imports {name}"
            for live in ("model", "loading"):
                assert not under(name, f"pipeline.target.{live}"), f"{path} imports the live target"
            todo += [file for file in module_files(name) if file.exists()]
    assert len(seen) > 8, "the walk must reach the cache, the drafts and the stage"


def module_files(name: str) -> list[Path]:
    base = ROOT.joinpath(*name.split("."))
    return [base.with_suffix(".py"), base / "__init__.py"]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from pipeline.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not loaded & HEAVY


def test_help_is_quick():
    """Under 0.3 s of processor time; its wall time alone would measure what else the machine does."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "pipeline", "--help"], capture_output=True, cwd=ROOT, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(seconds() < 0.3 for _ in range(8))


@pytest.mark.parametrize("top", ["pipeline", "stages"])
def test_the_map_beside_the_code_names_every_module_and_no_other(top):
    """By its name under the heading of its folder, or by its path from the top."""
    named, folder = set(), ""
    for line in (ROOT / top / "README.md").read_text().splitlines():
        if line.startswith("## "):
            folder = line.split("`")[1] if line.count("`") == 2 or line.count("/`") == 1 else ""
        for cell in line.split("|")[1:]:
            for name in re.findall(r"`([\w/]+\.py)`", cell):
                known = [folder + name, f"{folder}codecs/{name}", name]
                named.add(next((each for each in known if (ROOT / top / each).is_file()), name))
    there = {path.relative_to(ROOT / top).as_posix() for path in (ROOT / top).rglob("*.py")}
    assert named - there == set()
    assert {path for path in there - named if not path.endswith(("__init__.py", "__main__.py"))} == set()


@pytest.mark.parametrize("path", sorted(ROOT.glob("data/**/*.py")), ids=lambda path: path.stem)
def test_the_scripts_that_made_the_data_import_what_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("pipeline", "stages"):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
