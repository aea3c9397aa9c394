"""Plans of conversations of several turns: which samples are planned, their sizes, and what the report shows."""

import json
import os
import subprocess
import sys

import pytest
from templates import LAST_THOUGHT, OPENS_THOUGHT, PLAIN, turns
from tiny import save_target, write_jsonl

from pipeline.cache.plan import load_plan
from pipeline.errors import DataError, UsageError
from pipeline.target.files import TEMPLATE_DATE, template_digest, tokenizer_digest
from pipeline.target.weights import target_digest
from pipeline.visible_tables import VisibleConsole
from stages.cache_hidden.run import plan, plan_samples, plan_table
from stages.cache_hidden.settings import CaptureOptions

CHATS = [{"messages": turns("a?", f"A{at}.", "b?", f"B{at}.", "c?", f"C{at}.")} for at in range(6)]


@pytest.fixture
def made(tmp_path):
    """Return a function that plans rows for a target with that chat template."""

    def planned(template: str, rows: list[dict], out: str = "cache", **options) -> dict:
        if not (tmp_path / "target").is_dir():
            save_target(tmp_path / "target", template=template)
        corpus = write_jsonl(tmp_path / f"{out}.jsonl", rows)
        return plan(str(tmp_path / "target"), str(corpus), tmp_path / out, options=CaptureOptions(**options))

    planned.folder = tmp_path
    return planned


def test_each_turn_has_a_sample_where_the_template_rewrites_and_both_sizes_are_shown(made):
    report = made(LAST_THOUGHT, CHATS)
    assert (report["samples"], report["turns"]["chosen"]) == (18, "each")
    assert report["turns"]["last"]["samples"] == 6 and report["turns"]["each"]["samples"] == 18
    assert report["turns"]["each"]["supervised"] == report["supervised"] == 3 * report["turns"]["last"]["supervised"]
    assert "33.3% of the tokens" in report["turns"]["why"]


def test_last_keeps_one_sample_a_conversation(made):
    report = made(LAST_THOUGHT, CHATS, turns="last")
    assert (report["samples"], report["turns"]["chosen"], report["rewritten_turns"]) == (6, "last", 12)
    with pytest.raises(UsageError, match=r"samples\.turns = 'last', this command asks for 'each'"):
        made(LAST_THOUGHT, CHATS, turns="each")


def test_a_template_that_rewrites_nothing_costs_the_same_either_way(made):
    report = made(PLAIN, CHATS)
    assert (report["samples"], report["turns"]["chosen"], report["rewritten_turns"]) == (6, "last", 0)
    assert report["turns"]["last"] == report["turns"]["each"]


def test_a_limit_of_samples_counts_conversations_and_a_budget_takes_of_the_chosen(made):
    assert made(LAST_THOUGHT, CHATS, max_samples=2)["samples"] == 6
    few = made(LAST_THOUGHT, CHATS, out="few", max_samples=2, turns="last")
    assert few["samples"] == 2


def test_a_corpus_without_the_thoughts_that_prompts_open_is_refused_with_the_argument_to_pass(made):
    rows = [{"messages": turns("a?", f"A{at}.")} for at in range(4)]
    with pytest.raises(DataError, match=r"no thought.*'{\"thinking\": false}'"):
        made(OPENS_THOUGHT, rows)
    report = made(OPENS_THOUGHT, rows, template_kwargs='{"thinking": false}')
    assert report["samples"] == 4 and report["template"]["template_kwargs"] == {"thinking": False}
    with pytest.raises(UsageError, match="template_kwargs"):
        made(OPENS_THOUGHT, rows, template_kwargs='{"thinking": true}')


def test_turns_that_do_not_prove_refuse_a_corpus_above_the_share(made):
    good = [{"messages": turns("a?", f"<think>\nWell {at}.</think>A.")} for at in range(30)]
    bad = [{"messages": turns("a?", "A.", "b?", f"<think>\nWell {at}.</think>B.")} for at in range(3)]
    report = made(OPENS_THOUGHT, good + bad)
    assert report["unproven_turns"] == {"no reasoning": 3} and report["samples"] == 33
    with pytest.raises(DataError, match=r"4 of 8 turns do not prove"):
        made(
            OPENS_THOUGHT,
            [{"messages": turns("a?", "A.", "b?", f"<think>\nHm {at}.</think>B.")} for at in range(4)],
            "b",
        )


def record(folder, **changes) -> dict:
    made = {
        "version": 1,
        "model": "target",
        "target": target_digest(folder),
        "tokenizer": tokenizer_digest(folder),
        "chat_template": template_digest(folder),
        "engine": "transformers",
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "template_kwargs": {},
        "template_date": TEMPLATE_DATE,
        "max_tokens": 64,
        "stops": ["stop"],
    }
    return made | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target": "0" * 32}, "target 0000"),
        ({"template_kwargs": {"enable_thinking": True}}, "enable_thinking"),
        ({"template_date": "2026-01-02"}, "--template-date 2026-01-02"),
    ],
)
def test_a_corpus_of_another_target_or_mode_is_refused_before_anything_is_written(made, changes, says):
    folder = save_target(made.folder / "target", template=PLAIN)
    rows = [{**row, "regenerated": record(folder)} for row in CHATS]
    assert made(PLAIN, rows)["samples"] == 6
    with pytest.raises(UsageError, match=says):
        made(PLAIN, [*rows[:3], {**rows[3], "regenerated": record(folder, **changes)}], "other")
    assert not (made.folder / "other").exists()


def test_a_person_can_look_at_samples_after_the_plan_alone(made):
    made(LAST_THOUGHT, CHATS)
    command = [sys.executable, "-m", "pipeline"]
    folder, corpus, out = (str(made.folder / name) for name in ("target", "cache.jsonl", "cache"))
    stated = ["plan", "--model", folder, "--corpus", corpus, "--out", out]
    planned = subprocess.run([*command, *stated], capture_output=True, text=True)
    assert planned.returncode == 0 and "reply: 18 turns, such as cache.jsonl:1" in planned.stdout
    seen = subprocess.run([*command, "inspect", out, "--sample", "0"], capture_output=True, text=True)
    assert seen.returncode == 0 and "<|im_start|>assistant" in seen.stdout and seen.stderr == ""
    for shown in (planned.stdout, seen.stdout):  # a pipe has no colour
        assert "supervised" in shown and "in [[ ]]" in shown and "[[" in shown.partition("assistant\n")[2]
        assert shown.count("[[") == shown.count("]]") == 2
    styled = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    seen = subprocess.run([*command, "inspect", out, "--sample", "0"], capture_output=True, text=True, env=styled)
    assert "(green, underlined)" in seen.stdout and "[[" not in seen.stdout and "\x1b[4;32m" in seen.stdout


def test_a_plan_loads_no_torch(made, tiny_target, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", CHATS)
    command = ["plan", "--model", str(tiny_target), "--corpus", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "o")]
    command += ["--device", "cpu"]
    code = f"import sys; from pipeline.cli import main; main({command}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_plan_of_an_earlier_version_is_finished_by_its_own_rules(made, capsys):
    made(PLAIN, CHATS)
    path = made.folder / "cache" / "cache.json"
    from pipeline.cache.manifest import read_canonical, write_canonical

    identity = read_canonical(path)
    identity["samples"] = {"max_length": identity["samples"]["max_length"], "mask": "marks", "trimmed": True}
    write_canonical(path, {key: value for key, value in identity.items() if key != "hash"})
    report = made(PLAIN, CHATS)
    assert report["samples"] == 6
    assert "an earlier version planned this cache" in capsys.readouterr().err
    VisibleConsole().print(plan_table(report), plan_samples(report))
    assert "supervised (unproven, by marks)" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"planned by an earlier version.*nothing can be added to it; pass another"):
        made(PLAIN, CHATS, append=True)


def test_a_sample_of_a_plan_holds_what_stands_in_the_corpus(made):
    made(LAST_THOUGHT, CHATS)
    shards = load_plan(made.folder / "cache").shards
    lines = {sample.line for shard in shards for sample in shard.samples()}
    assert (
        lines == set(range(1, 7)) and json.loads((made.folder / "cache.jsonl").read_text().splitlines()[0]) == CHATS[0]
    )
