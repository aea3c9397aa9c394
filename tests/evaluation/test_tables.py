"""The table of evaluations side by side."""

import json

import pytest
from reports import evaluation

from pipeline.errors import UsageError
from pipeline.evaluation.tables import comparison
from pipeline.visible_tables import VisibleConsole, grid


def rows(*paths, **options):
    table = comparison(paths, markdown=True, **options).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {line[0]: line[1:] for line in cells}


def test_seeds_share_a_column_and_methods_do_not(tmp_path):
    samples = [("sql", [8, 8]), ("sql", [2, 2]), ("copy", [4])]
    paths = [evaluation(tmp_path / f"{seed}.json", seed=seed, samples=samples) for seed in (0, 1)]
    other = evaluation(tmp_path / "other.json", method="dflash", samples=[("sql", [1])])
    table = rows(*paths, other)

    assert table["accept length"] == ["domino, 700 steps", "dflash, 700 steps"]
    assert table["seeds"] == ["2", "1"]
    assert table["sql"][0].startswith("5.00 [") and table["sql"][1] == "1.00 [1.00, 1.00]"
    assert table["copy"][1] == "-", "the second draft decoded none"
    assert table["all"][0].startswith("4.80 ["), "24 tokens of 5 calls"
    assert table["mean of domains"] == ["4.50", "1.00"], "however many calls each took"


def test_drafts_of_other_recipes_are_not_pooled_as_if_they_were_seeds(tmp_path):
    samples = [("sql", [4])]
    same = {"method": "dspark", "samples": samples}
    paths = [
        evaluation(tmp_path / "0.json", recipe="vanilla", path="runs/vanilla-0", **same),
        evaluation(tmp_path / "1.json", recipe="vanilla", path="runs/vanilla-1", seed=1, **same),
        evaluation(tmp_path / "2.json", recipe="rnn", path="runs/rnn-0", **same),
        evaluation(tmp_path / "3.json", recipe="rnn", path="runs/rnn-0", parameters=2000, **same),
    ]
    table = rows(*paths)

    name = "dspark, 700 steps"
    assert table["accept length"] == [f"{name} (vanilla-0)", f"{name} (rnn-0)", f"{name} (rnn-0) 3"]
    assert table["seeds"] == ["2", "1", "1"]


def test_a_prompt_decoded_by_three_seeds_is_one_prompt(tmp_path):
    samples = [("sql", [8]), ("sql", [1])]
    one = rows(evaluation(tmp_path / "0.json", samples=samples))["sql"]
    three = rows(*(evaluation(tmp_path / f"{n}.json", seed=n, samples=samples) for n in range(3)))["sql"]

    assert one == three, "seeds make the interval of two prompts no narrower"


def test_two_runs_of_one_recipe_and_seed_are_two_columns_named_after_their_folders(tmp_path):
    paths = [
        evaluation(tmp_path / f"{name}.json", recipe="same", path=f"runs/{name}", samples=[("sql", lengths)])
        for name, lengths in (("raw", [4]), ("int8", [2]))
    ]

    table = rows(*paths)

    assert table["accept length"] == ["domino, 700 steps (raw)", "domino, 700 steps (int8)"]
    assert table["all"][0].startswith("4.00") and table["all"][1].startswith("2.00")


def test_seeds_that_decoded_other_prompts_are_not_pooled(tmp_path):
    paths = [evaluation(tmp_path / f"{n}.json", seed=n, samples=[("sql", [4])] * (n + 1)) for n in range(2)]
    with pytest.raises(UsageError, match=r"evaluated on other prompts \(1, 2 of them\).*with the same --count"):
        comparison(paths)


def test_drawn_replies_have_rows_of_their_own_for_each_pair_of_temperatures(tmp_path):
    samples = [("sql", [4])]
    paths = [
        evaluation(tmp_path / "0.json", samples=samples, sampled=([("sql", [2, 2])], 1.0, 1.0)),
        evaluation(tmp_path / "1.json", samples=samples, seed=1, sampled=([("sql", [4, 4])], 1.0, 1.0)),
        evaluation(tmp_path / "2.json", method="dflash", samples=samples, sampled=([("sql", [1])], 1.0, 0.0)),
        evaluation(tmp_path / "3.json", method="dspark", samples=samples),
    ]
    table = rows(*paths)

    assert table["all"] == ["4.00 [4.00, 4.00]"] * 3
    assert table["all, T = 1"] == ["3.00 [3.00, 3.00]", "-", "-"]
    assert table["all, T = 1, greedy drafts"] == ["-", "1.00 [1.00, 1.00]", "-"]
    assert table["mean of domains, T = 1"] == ["3.00", "-", "-"]


def test_objectives_and_conventions_are_told_apart(tmp_path):
    samples = [("sql", [4])]
    paths = [
        evaluation(tmp_path / "0.json", samples=samples, objective="ce", weighting="decay"),
        evaluation(tmp_path / "1.json", samples=samples, objective="tv", weighting="dpace"),
        evaluation(tmp_path / "2.json", method="dspark", samples=samples, objective="dspark"),
        evaluation(tmp_path / "3.json", method="dspark", samples=samples, objective="ce", proposals=7, block_size=7),
    ]
    table = rows(*paths)

    heads = ["domino, 700 steps", "domino, tv, dpace, 700 steps", "dspark, 700 steps", "dspark, ce, 700 steps"]
    assert table["accept length"] == heads
    assert table["block, proposals"] == ["8, 8"] * 3 + ["7, 7"]


def test_teacher_forced_figures_are_shown_when_asked_for(tmp_path):
    paths = [
        evaluation(tmp_path / f"{value}.json", samples=[("noise", [1])], forced={"noise": value}) for value in (1, 2)
    ]

    assert rows(*paths, forced=True)["noise, forced"] == ["1.50"]
    assert "noise, forced" not in rows(*paths)


def test_a_speed_up_is_shown_only_where_every_report_of_the_column_measured_one(tmp_path):
    samples, stored = [("sql", [4])], {"speculative_tokens_s": 100.0}
    paths = [
        evaluation(tmp_path / "0.json", samples=samples),
        evaluation(tmp_path / "1.json", method="dflash", samples=samples, speed=stored),
        evaluation(tmp_path / "2.json", method="dspark", samples=samples),
        evaluation(tmp_path / "3.json", method="dspark", samples=samples, seed=1, speed=stored),
    ]

    assert rows(*paths)["speed-up on this machine"] == ["2.00x", "-", "-"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target": "other"}, r"of several targets, \['other', 'tiny'\]; compare those of one"),
        ({"settings": {"max_new": 256}}, r"of several limits of a reply's tokens, \[64, 256\]; compare those of one"),
    ],
)
def test_what_one_table_cannot_state_is_refused(tmp_path, change, says):
    first, other = evaluation(tmp_path / "0.json", samples=[("sql", [4])]), tmp_path / "1.json"
    other.write_text(json.dumps(json.loads(first.read_text()) | change))
    with pytest.raises(UsageError, match=says):
        comparison((first, other))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "[" * 100_000, "\xff"])
def test_what_is_no_report_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"x\.json is no report of `pipeline evaluate --out FILE`"):
        comparison((path,))


@pytest.mark.parametrize("key", ["target", "draft", "settings", "overall", "domains", "speed", "lossless", "samples"])
def test_a_report_that_lacks_a_part_or_has_another_in_its_place_is_refused_in_one_line(tmp_path, key):
    path = evaluation(tmp_path / "x.json", samples=[("sql", [4])])
    whole = json.loads(path.read_text())
    for changed in ({name: whole[name] for name in whole if name != key}, whole | {key: [None]}):
        path.write_text(json.dumps(changed))
        with pytest.raises(UsageError, match=f"of another version: its `{key}` is .*; evaluate that draft again"):
            comparison((path,))
    path.write_text(json.dumps(whole | {"sampled": {"temperature": 1.0}}))
    with pytest.raises(UsageError, match="its `sampled` is"):
        comparison((path,))


def test_a_name_longer_than_its_column_is_shown_whole(capsys):
    name = "corpus-" + "x" * 150 + ".jsonl:4711"
    table = grid("row", "file")
    table.add_row("1", name)
    VisibleConsole().print(table)
    assert name in "".join(capsys.readouterr().out.split())
