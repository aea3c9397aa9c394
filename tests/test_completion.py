"""What bash, zsh and fish complete, and that completing imports no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.completion import SHELLS, method_names
from pipeline.drafts import DRAFTS

ROOT = Path(__file__).parent.parent


def completed(line: str, shell: str = "zsh") -> tuple[list[str], set[str]]:
    """Return the values offered for a line's last word, and the modules that were imported for it."""
    words = line.split(" ")
    told = {"_PIPELINE_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    told |= {"COMP_CWORD": words[-1], "COMP_WORDS": " ".join(words[:-1])} if shell == "fish" else {}
    code = "import sys\nfrom pipeline.cli import main\ntry: main([])\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **told}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    kinds_apart = [each.partition(",")[2].partition("\t")[0] for each in lines]
    offered = lines[1::3] if shell == "zsh" else kinds_apart
    return offered, {name.split(".")[0] for name in done.stderr.splitlines()[-1].split()}


OFFERED = {
    "pipeline tr": ["train-draft"],
    "pipeline recipe ": ["show", "schema"],
    "pipeline plan --code": ["--codec"],
    "pipeline plan --codec in": ["int8", "int6"],
    "pipeline recode cache --codec aux=int8,final=z": ["aux=int8,final=zstd"],
    "pipeline plan --final ": ["needed", "all", "none"],
    "pipeline plan --methods ": list(DRAFTS),
    "pipeline train-draft --set draft.m": [f"draft.method={name}" for name in DRAFTS],
}


@pytest.mark.parametrize("line", OFFERED)
def test_names_complete_without_torch(line):
    offered, imported = completed(line)
    assert offered == OFFERED[line] and "torch" not in imported


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_hears_the_same(shell):
    assert completed("pipeline ver", shell)[0] == ["verify"]


def test_paths_are_left_to_the_shell():
    done = {}
    for line in ("pipeline train-draft conf", "pipeline plan --model da", "pipeline plan --corpus da"):
        done[line], _ = completed(line)
    assert [*done.values()] == [["conf"], ["da"], ["da"]]


def test_the_methods_are_those_there_are():
    assert method_names() == list(DRAFTS)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_names_our_command(shell, capfd):
    from pipeline.cli import main

    main(["completion", shell])
    shown = capfd.readouterr().out
    assert f"_PIPELINE_COMPLETE={shell}_complete" in shown and "_pipeline_completion" in shown


def test_bash_completes_once_it_has_read_the_script(tmp_path):
    program = tmp_path / "pipeline"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipeline "$@"\n')
    program.chmod(0o755)
    asked = (
        "source <(pipeline completion bash); COMP_WORDS=(pipeline plan --codec z); COMP_CWORD=3; "
        '_pipeline_completion pipeline; echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, env=environment)
    assert done.stdout == "zstd\n", done
