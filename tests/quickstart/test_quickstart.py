"""`pipeline quickstart`: commands that a user could type, run as processes that end when it does."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cli import commands
from pipeline.completion import method_names
from pipeline.errors import UsageError
from stages.quickstart.command_processes import Command, run_command, run_side_by_side
from stages.quickstart.run import (
    Places,
    capture_commands,
    chosen_methods,
    draft_commands,
    is_evaluated,
    next_commands,
    report_command,
)

PATIENCE_S = 120


def test_every_command_is_one_that_parses_as_it_is_typed(tmp_path):
    places = Places(tmp_path / "a b")
    methods = method_names()
    every = [*capture_commands(places), *next_commands(places, methods[0])]
    for method in methods:
        every += draft_commands(places, method)
        places.report(method).parent.mkdir(parents=True, exist_ok=True)
        places.report(method).touch()
    for command in [*every, report_command(places, methods)]:
        for path in (Path(word) for word in command.words if word.startswith(str(tmp_path))):
            (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
            (path if path.suffix else path / "cache.json").touch()  # what a command before it wrote
        commands.commands[command.words[0]].make_context(command.words[0], command.words[1:])
        assert command.typed.startswith(f"pipeline {command.words[0]}")


def test_each_takes_what_those_before_it_wrote():
    places, written = Places(Path("out")), set()
    works = [*capture_commands(places), *draft_commands(places, "dflash"), report_command(places, ["dflash"])]
    for command in works:
        named = dict(zip(command.words, command.words[1:], strict=False))
        reads = {named.get("--draft"), command.words[1] if command.words[0] in ("verify", "report") else None}
        assert {*filter(None, reads)} <= written, command.typed
        written.add(named.get("--out"))


def test_methods_are_all_or_those_named_in_their_own_order():
    assert chosen_methods(None) == method_names()
    assert chosen_methods("dspark, dflash") == ["dflash", "dspark"]
    with pytest.raises(UsageError, match=r"no method 'domini'.*domino"):
        chosen_methods("dflash,domini")


def test_a_draft_is_evaluated_once_its_report_is_younger_than_its_run(tmp_path):
    places = Places(tmp_path)
    places.run("dflash").mkdir(parents=True)
    assert not is_evaluated(places, "dflash")
    places.report("dflash").touch()
    assert not is_evaluated(places, "dflash")
    (places.run("dflash") / "done.json").touch()
    os.utime(places.report("dflash"), ns=(1, 1))
    assert not is_evaluated(places, "dflash")
    places.report("dflash").touch()
    assert is_evaluated(places, "dflash")


def test_accept_lengths_are_shown_and_all_else_is_in_the_log(tiny_cache, tmp_path, capfd):
    sets = [f"--set={entry}" for entry in ("train.batch=4", "train.anchors=6", "train.steps=2", "draft.block_size=4")]
    words = ("train-draft", "--cache", tiny_cache, *sets, "--device", "cpu", "--out", tmp_path / "run")
    works = {"a": [Command(*words)], "b": [Command("inspect", tiny_cache), Command("recipe", "schema")]}
    run_side_by_side(works, {name: tmp_path / f"{name}.log" for name in works})
    shown = capfd.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("b: ")] == [f"b: $ {each.typed}" for each in works["b"]]
    assert any(re.search("^a: .*accept length", line) for line in shown), shown
    assert "[train]" in (tmp_path / "a.log").read_text() and not any("[train]" in line for line in shown)
    assert "properties" in (tmp_path / "b.log").read_text()


def test_the_code_of_a_command_that_fails_is_ours_and_the_others_end_first(tiny_cache, tmp_path, capfd):
    works = {
        "bad": [Command("inspect", tmp_path / "none"), Command("recipe")],
        "good": [Command("inspect", tiny_cache)],
    }
    with pytest.raises(SystemExit) as stop:
        run_side_by_side(works, {name: tmp_path / f"{name}.log" for name in works})
    assert stop.value.code == 2
    assert "bad failed; the end of" in (said := capfd.readouterr().err) and "error: " in said
    assert "tiny-random" in (tmp_path / "good.log").read_text()
    with pytest.raises(SystemExit) as stop:
        run_command(Command("inspect", tmp_path / "none"))
    assert stop.value.code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_command_once_and_each_saves(number, tiny_cache, tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipeline.command_line import run_and_exit; import click\n"
        "from stages.quickstart.command_processes import Command, run_side_by_side\n"
        "@click.command()\n"
        "def go():\n"
        "    words = sys.argv[1:]\n"
        "    works = {name: [Command(*words, '--out', name)] for name in ('a', 'b')}\n"
        "    run_side_by_side(works, {name: Path(f'{name}.log') for name in works})\n"
        "run_and_exit(go, [])\n"
    )
    sets = [
        f"--set={entry}" for entry in ("train.batch=4", "train.anchors=6", "train.steps=9999", "draft.block_size=4")
    ]
    words = ["train-draft", "--cache", str(tiny_cache), *sets, "--device=cpu"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + PATIENCE_S
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    while not all(log.exists() and "starting at step" in log.read_text() for log in logs):
        assert time.monotonic() < until and process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 128 + number and "the same command goes on from there" in said
    for log in logs:
        assert re.search(r"stopped at step \d+, saved in", log.read_text()), log.read_text()
    assert [*(tmp_path / "a/checkpoints").iterdir()]
