"""From a command line to a plan: its report of a corpus, and which rows of the corpus decide the plan."""

import json

import pytest
from click.testing import CliRunner
from tiny import conversations, save_target, write_jsonl

from pipeline.cache.plan import load_plan
from pipeline.cli import commands
from pipeline.errors import UsageError

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("target"))


def plan(target, corpus, out, *more: str):
    command = ["plan", "--model", str(target), "--corpus", str(corpus), "--out", str(out), "--device", "cpu"]
    return CliRunner().invoke(commands, [*command, "--layers", "1", *more], catch_exceptions=False)


def test_one_deep_line_costs_itself(target, tmp_path):
    deep = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": '
    line = deep + "[" * 600 + "]" * 600 + "}]}"
    corpus = write_jsonl(tmp_path / "a.jsonl", [*conversations(), line])
    plan(target, corpus, tmp_path / "out")
    assert load_plan(tmp_path / "out").samples == 24
    assert load_plan(tmp_path / "out").notes["faults"] == {"tools": 1}


def test_skipped_files_and_unknown_keys_are_named_once(target, tmp_path):
    rows = [{"messages": [{**HELLO[0], "mood": "glad", "content": str(at)}, HELLO[1]]} for at in range(5)]
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", rows)
    for name in ("NOTES.TXT", "b.txt", "README"):
        (folder / name).write_text("x")
    said = plan(target, folder, tmp_path / "out").stderr
    assert f"not read in {folder}: 2 .txt (NOTES.TXT, b.txt); 1 without an ending (README)\n" in said
    assert said.count("`mood`: 5 rows, the first a.jsonl:1") == 1
    assert load_plan(tmp_path / "out").notes["unknown_keys"] == {"mood": 5}


def test_a_corpus_cannot_write_to_the_terminal(target, tmp_path):
    rows = [*conversations(), {"messages": HELLO, "domain": "\x1b]0;title\x07[/red]"}]
    rows.append({"messages": HELLO, "domain": "d", "split": "\x1b[2J"})
    done = plan(target, write_jsonl(tmp_path / "a\x1b[31m.jsonl", rows), tmp_path / "out")
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout.split("next:")[0] + done.stderr
    assert r"\x1b[2J" in done.stdout.replace("\n", "") and r"\x1b]0;title" in done.stdout


def test_roles_decide_the_plan(target, tmp_path):
    rows = [{"conversations": [{"from": "boy", "value": str(at)}, {"from": "bard", "value": "hi"}]} for at in range(5)]
    corpus, out = write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out"
    done = plan(target, corpus, out, "--roles", "boy=user", "--roles", "bard=assistant")
    assert "5 of 5 rows" in done.stdout and "--roles boy=user,bard=assistant" in done.stdout
    before = (out / "plan" / "000000.json").read_bytes()
    assert json.loads(before)["sources"][0]["roles"] == "bard=assistant,boy=user"
    plan(target, corpus, out, "--roles", "bard=assistant,boy=user")
    assert (out / "plan" / "000000.json").read_bytes() == before
    with pytest.raises(UsageError, match="roles bard=assistant,boy=user"):
        plan(target, corpus, out)


def test_a_line_of_20_mb_is_cut_before_it_is_tokenised(target, tmp_path):
    """Tokenising all of it takes longer than a row may."""
    question = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "long words " * 2_000_000}]
    corpus = write_jsonl(tmp_path / "a.jsonl", [*conversations(), {"messages": question}])
    plan(target, corpus, tmp_path / "out")
    planned = load_plan(tmp_path / "out")
    assert (planned.samples, planned.notes["faults"], planned.notes["truncated"]) == (25, {}, 1)
