"""Each command's help begins with one sentence and ends with an example that works as it is pasted."""

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
from foreign_maker import compute, write_specforge

from pipeline.cli import commands, main
from pipeline.examples import EXAMPLES

ROOT = Path(__file__).parent.parent
ONLY_PARSED = {"serve-check", "quickstart"}  # the one asks for an engine, the other takes minutes


def all_commands(group: click.Group = commands, typed: str = "") -> dict[str, click.Command]:
    found = {typed: group}
    for name, command in group.commands.items():
        path = f"{typed} {name}".strip()
        found |= all_commands(command, path) if isinstance(command, click.Group) else {path: command}
    return found


@pytest.mark.parametrize("typed", all_commands())
def test_help_begins_with_one_sentence_and_ends_with_the_example(typed, capsys):
    main([*typed.split(), "--help"])
    shown = capsys.readouterr().out.rstrip().splitlines()
    assert shown[-2:] == ["Example:", f"  pipeline {EXAMPLES[typed]}"]
    first = " ".join(all_commands()[typed].help.partition("\n\n")[0].split())
    assert len(re.findall(r"[.!?:](?= |$)", first)) == 1 and first.endswith("."), first
    assert shlex.split(EXAMPLES[typed])[0] == typed.split(" ")[0] or not typed


def test_every_example_works_as_pasted_in_this_order(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_specforge(tmp_path / "build/example/states", compute(ROOT / "data/tiny-qwen3", 6), [1, 3])
    for typed, line in EXAMPLES.items():
        words = shlex.split(line)
        if typed in ONLY_PARSED:
            commands.commands[words[0]].make_context(words[0], words[1:])
            continue
        try:
            main(words)
        except SystemExit as stop:
            pytest.fail(f"pipeline {line}: {stop.code}: {capfd.readouterr().err}")
    shutil.rmtree(tmp_path / "build")  # 400 MB
