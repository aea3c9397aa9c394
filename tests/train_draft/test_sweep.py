"""`pipeline sweep`: the whole grid is checked first, every run is made once, and seeds are pooled by reply."""

import csv
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import stages.train_draft.sweep as sweep_module
from pipeline.cli import main
from pipeline.errors import DiskError, UsageError
from pipeline.evaluation.accept_length import bootstrap
from pipeline.evaluation.sweep_table import sweep_table
from pipeline.published.init_from import InitialDraft
from pipeline.runs.recipe import load_recipe
from pipeline.runs.sweep_record import read_sweep
from pipeline.torchrun import VARIABLES
from stages.train_draft.run import run
from stages.train_draft.sweep import sweep
from stages.train_draft.sweep_figures import HELDOUT_DIFFERS, data_warnings, pool_seeds, rank_by_accept_length, ratios
from stages.train_draft.sweep_files import as_csv, csv_text
from stages.train_draft.sweep_plan import data_digest
from stages.train_draft.sweep_settings import Axis, read_sweep_file

ROOT = Path(__file__).parents[2]
BASE = '[draft]\nmethod = "dflash"\nblock_size = 4\n[train]\nsteps = 4\nbatch = 4\nanchors = 6\nlog_every = 1\n'
SMALL = ("train.batch=4", "train.anchors=6", "train.log_every=1", "draft.block_size=4", "draft.method=dflash")


@pytest.fixture
def recipe(tmp_path):
    """Return a function that writes a sweep with the given lines in its table."""

    def written(*lines: str, base: str = BASE) -> Path:
        path = tmp_path / "sweep.toml"
        path.write_text(base + "".join(f"{line}\n" for line in ("[sweep]", *lines)))
        return path

    return written


def load_sweep(path: Path, sets: tuple[str, ...] = ()):
    """The settings of a sweep's file, each with its recipe."""
    file = read_sweep_file(path, sets)
    return [(setting, file.recipe(setting)) for setting in file.combinations()]


def contents(folder: Path) -> dict[str, bytes]:
    """What a sweep made, timings and versions aside, which differ from run to run."""
    differ = ("timing.jsonl", "run.json", "sweep.json", "sweep.csv")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in differ)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# The grid


def test_the_last_list_runs_fastest(recipe):
    path = recipe('"draft.method" = ["domino", "dflash"]', '"train.seed" = [2, 0]')

    combinations = load_sweep(path)

    assert [tuple(setting.values()) for setting, _ in combinations] == [
        ("domino", 2), ("domino", 0), ("dflash", 2), ("dflash", 0),
    ]  # fmt: skip
    assert [(one.draft.method, one.train.seed) for _, one in combinations] == [
        tuple(setting.values()) for setting, _ in combinations
    ]
    assert all(one.train.batch == 4 for _, one in combinations), "the base holds for every run"


def test_quotes_may_be_left_out_and_lists_may_hold_lists(recipe):
    path = recipe("train.lr = [1e-3, 3e-3]", "draft.layers = [[1], [1, 3]]")

    assert [(one.train.lr, one.draft.layers) for _, one in load_sweep(path, ("train.steps=9",))] == [
        (1e-3, (1,)), (1e-3, (1, 3)), (3e-3, (1,)), (3e-3, (1, 3)),
    ]  # fmt: skip
    assert all(one.train.steps == 9 for _, one in load_sweep(path, ("train.steps=9",)))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('"train.lrr" = [1e-3]', r"with lrr = 0.001: unknown key `train.lrr`; did you mean `train.lr`\?"),
        ('"trian.lr" = [1e-3]', r"unknown key `trian`; did you mean `train`\?"),
        ('"train.lr" = 1e-3', "wanted a list of values"),
        ('"train.lr" = []', "wanted a list of values"),
        ('"train.lr" = [1e-3, "fast"]', "with lr = fast: `train.lr` = 'fast'"),
        ('"train.lr" = [1e-3, 3e-3, 1e-3]', "holds a value twice"),
        ("lr = [1e-3]", "`lr` in .sweep. is no field"),
        ("", r"has no \[sweep\] table"),
        ("train = {}", r"has no \[sweep\] table"),
        ('"train.epochs" = [2]', "with epochs = 2 states train.steps = 4 and train.epochs = 2"),
    ],
)
def test_a_table_that_is_no_grid_is_refused_with_the_nearest_right_thing(recipe, line, says):
    with pytest.raises(UsageError, match=says):
        load_sweep(recipe(line))


def test_paired_fields_change_together_and_are_crossed_with_the_lists(recipe):
    path = recipe(
        '"train.seed" = [0, 1]', "[sweep.paired]", "train.lr = [1e-3, 3e-3]", '"draft.layers" = [[1], [1, 3]]'
    )

    assert [tuple(setting.values()) for setting, _ in load_sweep(path)] == [
        (0, 1e-3, [1]), (0, 3e-3, [1, 3]), (1, 1e-3, [1]), (1, 3e-3, [1, 3]),
    ]  # fmt: skip
    alone = recipe("[sweep.paired]", '"train.lr" = [1e-3, 3e-3]', '"draft.method" = ["dflash", "domino"]')
    assert [one.draft.method for _, one in load_sweep(alone)] == ["dflash", "domino"]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['"train.lr" = [1e-3, 2e-3]', '"train.seed" = [0]'], "need one length: `train.lr` has 2, `train.seed` has 1"),
        (['"train.steps" = [2]'], r"`train.steps` is in .sweep. and in .sweep.paired.; leave one out"),
        (['"train.lr" = [1e-3, 1e-3]', '"train.seed" = [0, 0]'], "holds an entry twice"),
        (['"train.lr" = 1e-3'], "wanted a list of values"),
        (['"train.lr" = {low = 1, high = 2}'], "wanted a list of values"),
        (['"train.lrr" = [1e-3]'], "unknown key `train.lrr`; did you mean"),
        (["lr = [1e-3]"], "`lr` in .sweep. is no field"),
        ([], "is no table of lists"),
    ],
)
def test_lists_that_cannot_be_paired_are_refused_in_one_line(recipe, lines, says):
    with pytest.raises(UsageError, match=says) as refused:
        load_sweep(recipe('"train.steps" = [2, 3]', "[sweep.paired]", *lines))
    assert "\n" not in str(refused.value)


def test_a_sweep_under_torchrun_is_refused(recipe, tiny_cache, tmp_path, monkeypatch):
    for name, value in zip(VARIABLES, ("0", "2", "0", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="start it without torchrun"):
        sweep(tiny_cache, recipe('"train.seed" = [0, 1]'), SMALL[:1], tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_recipe_and_a_sweep_are_not_taken_for_each_other(recipe, tmp_path):
    with pytest.raises(UsageError, match="run it with `pipeline sweep`"):
        load_recipe(recipe('"train.seed" = [0]'))
    plain = tmp_path / "plain.toml"
    plain.write_text(BASE)
    with pytest.raises(UsageError, match=r"plain\.toml has no \[sweep\] table.*train-draft"):
        load_sweep(plain)
    with pytest.raises(UsageError, match=r"sweeps over train\.seed and --set states it"):
        load_sweep(recipe('"train.seed" = [0]'), ("train.seed=1",))
    with pytest.raises(UsageError, match=r"no recipe at"):
        load_sweep(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('"draft.method" = ["dflash", "dfash"]', "with method = dfash: unknown draft.method `dfash`"),
        ('"draft.layers" = [[1], [2]]', r"with layers = \[2\]: .*--layers 1,2,3,4"),
        ('"draft.mask_token_id" = [259, 257]', "with mask_token_id = 257: mask token 257 occurs"),
        ('"draft.layers" = [[1, 3, 4], [4, 3, 1]]', "are the same recipe"),
        ('"draft.objective" = ["ce", "l1"]', "with objective = l1: .*'lk-hybrid' or 'dspark', found 'l1'"),
        ('"draft.alpha_l1" = [0.5]', 'with alpha_l1 = 0.5: alpha_l1 = 0.5 is a weight of objective "dspark"'),
    ],
)
def test_what_the_cache_refuses_is_found_before_the_first_run(recipe, tiny_cache, tmp_path, line, says):
    with pytest.raises(UsageError, match=says):
        sweep(tiny_cache, recipe(line), out=tmp_path / "runs", device="cpu")
    assert not (tmp_path / "runs").exists(), "nothing was begun"


def test_quoted_and_unquoted_fields_of_a_section_make_one_axis_each_in_the_files_order(recipe):
    found = load_sweep(recipe("train.lr = [1e-3, 3e-3]", '"train.seed" = [0, 1]', "train.steps = [2, 4]"))
    assert [list(setting) for setting, _ in found] == [["train.lr", "train.steps", "train.seed"]] * 8
    with pytest.raises(UsageError, match=r"`train\.lr` is there twice, with quotes and without; leave one out"):
        load_sweep(recipe("train.lr = [1e-3, 3e-3]", '"train.lr" = [1e-4]'))


# The runs


def test_every_run_is_the_one_train_draft_makes(recipe, tiny_cache, tmp_path):
    path = recipe('"train.seed" = [0, 1]', '"train.steps" = [2, 4]')
    report = sweep(tiny_cache, path, out=tmp_path / "runs", device="cpu")

    assert sorted((one["setting"]["train.seed"], one["steps"]) for one in report["runs"]) == [
        (0, 2), (0, 4), (1, 2), (1, 4),
    ]  # fmt: skip
    alone = run(tiny_cache, None, (*SMALL, "train.seed=1", "train.steps=4"), tmp_path / "alone", "cpu").run
    (same,) = (one["run"] for one in report["runs"] if one["setting"] == {"train.seed": 1, "train.steps": 4})
    assert contents(alone) == contents(Path(same))


def test_every_run_begins_with_the_draft_named_and_another_start_is_another_run(recipe, tiny_cache, tmp_path, capsys):
    first = run(tiny_cache, None, (*SMALL, "train.steps=2"), tmp_path / "first", "cpu").run
    path, out = recipe('"train.seed" = [0, 1]'), tmp_path / "runs"
    begun = sweep(tiny_cache, path, out=out, device="cpu", init_from=InitialDraft(first))
    assert capsys.readouterr().out.count(f"starting from the dflash draft {first}") == 2

    sets = (*SMALL, "train.seed=1", "train.steps=4")
    alone = run(tiny_cache, None, sets, tmp_path / "alone", "cpu", InitialDraft(first)).run
    (same,) = (Path(one["run"]) for one in begun["runs"] if one["setting"] == {"train.seed": 1})
    assert contents(alone) == contents(same)
    sweep(tiny_cache, path, out=out, device="cpu", init_from=InitialDraft(first))
    assert "2 runs, 2 of them finished before" in capsys.readouterr().out
    fresh = sweep(tiny_cache, path, out=out, device="cpu")
    assert not {one["run"] for one in fresh["runs"]} & {one["run"] for one in begun["runs"]}
    assert (fresh["init_from"], begun["init_from"]) == (None, str(first))


def test_a_combination_that_cannot_begin_with_that_draft_is_found_before_the_first_run(recipe, tiny_cache, tmp_path):
    first = run(tiny_cache, None, (*SMALL, "train.steps=2"), tmp_path / "first", "cpu").run
    with pytest.raises(UsageError, match=r"with layers = \[1\]: .* has target_layer_ids = .*, wanted is \[1\]"):
        sweep(
            tiny_cache,
            recipe('"draft.layers" = [[1]]'),
            out=tmp_path / "runs",
            device="cpu",
            init_from=InitialDraft(first),
        )
    assert not (tmp_path / "runs").exists()


def test_methods_and_objectives_make_one_grid(recipe, tiny_cache, tmp_path):
    path = recipe('"draft.method" = ["dflash", "domino", "dspark"]', '"draft.objective" = ["ce", "dspark"]')
    report = sweep(tiny_cache, path, ("train.steps=1",), out=tmp_path / "runs", device="cpu")

    for one in report["runs"]:
        method, objective = one["setting"].values()
        line = json.loads((Path(one["run"]) / "metrics.jsonl").read_text().splitlines()[0])
        assert "final_loss" in line if objective == "ce" else {"ce_loss", "l1_loss"} <= set(line)
        assert ("confidence_loss" in line) == ((method, objective) == ("dspark", "dspark"))
    assert len(report["runs"]) == 6


def test_finished_runs_are_not_run_again_and_a_longer_list_adds_the_rest(recipe, tiny_cache, tmp_path, monkeypatch):
    out, made, whole = tmp_path / "runs", [], sweep_module.train_resolved
    monkeypatch.setattr(sweep_module, "train_resolved", lambda path, *rest: made.append(path) or whole(path, *rest))

    first = sweep(tiny_cache, recipe('"train.seed" = [0, 1]'), out=out, device="cpu")
    before = contents(out)
    assert len(made) == 2
    assert sweep(tiny_cache, recipe('"train.seed" = [0, 1]'), out=out, device="cpu") == first
    assert len(made) == 2 and contents(out) == before
    sweep(tiny_cache, recipe('"train.seed" = [1, 5, 0]'), out=out, device="cpu")
    assert len(made) == 3 and contents(out).items() > before.items()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_sweep_goes_on_to_the_same_end(recipe, tiny_cache, tmp_path, number, code):
    path = recipe('"train.seed" = [0, 1]', base=BASE.replace("steps = 4", "steps = 30\nsave_every = 3"))
    cache, out = shutil.copytree(tiny_cache, tmp_path / "cache"), tmp_path / "runs"
    command = [sys.executable, "-m", "pipeline", "sweep", path, "--cache", cache, "--device", "cpu", "--out"]
    here = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    process = subprocess.Popen([*command, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **here)
    while not list(out.glob("*/checkpoints/*")):
        assert process.poll() is None, process.communicate()
    process.send_signal(number)
    said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert not list(out.glob("*/done.json")), "stopped in its first run"

    went_on = sweep(cache, path, out=out, device="cpu")
    undisturbed = sweep(cache, path, out=tmp_path / "undisturbed", device="cpu")
    assert len(contents(out)) > 8 and contents(out) == contents(tmp_path / "undisturbed")
    figures = [[one["accept_len"] for one in report["runs"]] for report in (went_on, undisturbed)]
    assert figures[0] == figures[1]


def test_a_run_that_diverges_is_noted_and_the_others_go_on(recipe, tiny_cache, tmp_path, capsys):
    path = recipe('"train.lr" = [1e30, 1e-3]')
    with pytest.raises(SystemExit, match="1"):
        main(["sweep", str(path), "--cache", str(tiny_cache), "--out", str(tmp_path / "runs"), "--device", "cpu"])
    printed = capsys.readouterr()
    assert "1 of 2 runs failed" in printed.err
    assert "failed" in printed.out and "accept length" in printed.out


def test_a_bug_in_one_run_is_recorded_and_the_others_go_on(recipe, tiny_cache, tmp_path, monkeypatch, capsys):
    whole = sweep_module.train_resolved

    def crashing(path, store, split, resolved, *rest):
        if resolved.recipe.train.seed == 0:
            raise IndexError("list index out of range")
        return whole(path, store, split, resolved, *rest)

    monkeypatch.setattr(sweep_module, "train_resolved", crashing)
    path, out = recipe('"train.seed" = [0, 1]'), tmp_path / "runs"
    with pytest.raises(SystemExit, match="1"):
        main(["sweep", str(path), "--cache", str(tiny_cache), "--out", str(out), "--device", "cpu"])
    printed = capsys.readouterr()
    assert (
        printed.err.rstrip().endswith("bug: IndexError: list index out of range")
        and "1 of 2 runs failed" in printed.err
    )
    assert "Traceback" in printed.out and "in crashing" in printed.out
    assert {run.setting["train.seed"]: run.state for run in read_sweep(out).runs} == {0: "failed", 1: "finished"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), DiskError("full"), KeyboardInterrupt()])
def test_what_would_end_every_run_stops_the_sweep_at_once(recipe, tiny_cache, tmp_path, monkeypatch, error):
    def failing(*_):
        raise error

    monkeypatch.setattr(sweep_module, "train_resolved", failing)
    with pytest.raises(type(error)):
        sweep(tiny_cache, recipe('"train.seed" = [0, 1]'), out=tmp_path / "runs", device="cpu")
    assert [run.state for run in read_sweep(tmp_path / "runs").runs] == ["unfinished"] * 2


def test_the_files_hold_what_json_prints_and_no_cell_is_a_formula(recipe, tiny_cache, tmp_path):
    path = recipe('"draft.layers" = [[1], [1, 3]]')
    report = sweep(tiny_cache, path, out=tmp_path / "runs", device="cpu")
    record = read_sweep(tmp_path / "runs")
    assert record.model_dump() == report and all(run.seconds > 0 for run in record.runs)

    evil = record.runs[0].model_copy(update={"failed": "=cmd|' /C calc'!A0", "run": "@x\x1b[2J", "accept_len": -1.5})
    head, first, second = csv.reader(csv_text(record.model_copy(update={"runs": [evil, record.runs[1]]})).splitlines())
    cells = dict(zip(head, first, strict=True))
    assert cells["failed"] == "'=cmd|' /C calc'!A0" and cells["run"] == "'@x\\x1b[2J" and cells["accept_len"] == "-1.5"
    assert cells["draft.layers"] == str(evil.setting["draft.layers"]) and len(first) == len(second) == len(head)
    assert as_csv([["+1", "-x", "\t=1", 2, None]]) == "'+1,'-x,\\t=1,2,\r\n"


def test_runs_of_one_order_share_a_digest_and_other_data_is_warned_of(recipe, tiny_cache, tmp_path):
    path = recipe('"train.seed" = [0, 1]', '"draft.method" = ["dflash", "domino"]', '"train.steps" = [2, 3]')
    planned = sweep_module.Planned(tiny_cache, path, (), tmp_path)
    data = {run.setting["train.seed"]: set() for run in planned.runs.values()}
    for one in planned.runs.values():
        data[one.setting["train.seed"]].add(one.data)
    assert all(len(of) == 1 for of in data.values()) and data[0] != data[1] and planned.warnings() == []
    other = next(iter(sweep_module.Planned(tiny_cache, path, ("train.batch=3",), tmp_path).runs.values()))
    assert other.data not in data[0] | data[1]

    first, *others = planned.runs.values()
    split = replace(first.split, train=first.split.train[1:])
    fewer = replace(first, split=split, data=data_digest(planned.store, split, first.resolved), heldout="fewer")
    seed, heldout = data_warnings([fewer, *others], planned.names)
    assert seed.startswith("train.seed = 0, but not the same data: run 1 on ") and "runs 2, 3, 4 on " in seed
    assert heldout == HELDOUT_DIFFERS


def test_json_is_the_only_thing_on_standard_output(recipe, tiny_cache, tmp_path, capfd):
    path = recipe('"train.seed" = [0]')
    arguments = ["sweep", str(path), "--cache", str(tiny_cache), "--out", str(tmp_path / "runs"), "--device", "cpu"]
    main([*arguments, "--json"])
    printed = capfd.readouterr()
    report = json.loads(printed.out)
    assert [one["setting"] for one in report["runs"]] == [{"train.seed": 0}]
    assert "run 1 of 1: seed = 0" in printed.err


# The figures


def fact(seed, replies, **setting):
    tokens, calls = np.sum([reply[2:] for reply in replies], axis=0) if replies else (0, 0)
    return {
        "setting": {**setting, "train.seed": seed},
        "run": f"runs/{seed}",
        "steps": 4,
        "parameters": 10,
        "accept_len": tokens / calls if calls else None,
        "interval": [1.0, 2.0] if calls else None,
        "replies": replies,
        "failed": None if calls else "step 1: loss nan",
        "state": "finished" if calls else "failed",
        "pruned": None,
        "data": f"data of seed {seed}",
    }


def test_seeds_are_pooled_by_reply_and_settings_are_not():
    lr = "train.lr"
    facts = [
        fact(0, [[7, 3, 8, 2], [9, 3, 6, 6]], **{lr: 1e-3}),
        fact(1, [[7, 3, 4, 2], [9, 3, 6, 2]], **{lr: 1e-3}),
        fact(0, [[7, 3, 5, 1], [9, 3, 5, 1]], **{lr: 3e-3}),
    ]

    low, high = rank_by_accept_length(pool_seeds(facts))[::-1]

    assert low["setting"] == {lr: 1e-3} and high["setting"] == {lr: 3e-3}, "best first"
    assert low["accept_len"] == (8 + 6 + 4 + 6) / (2 + 6 + 2 + 2)
    assert low["interval"] == bootstrap(np.array([12.0, 12.0]), np.array([4.0, 8.0]), seed=0)
    assert low["seeds"] == [14 / 8, 10 / 4] and high["seeds"] == [5.0]


def test_settings_are_paired_by_reply_and_seed():
    lr = "train.lr"
    facts = [
        fact(0, [[7, 3, 8, 2], [9, 3, 6, 6]], **{lr: 1e-3}),
        fact(1, [[7, 3, 8, 2], [9, 3, 6, 6]], **{lr: 1e-3}),
        fact(0, [[7, 3, 16, 2], [9, 3, 12, 6]], **{lr: 3e-3}),  # twice as good on each reply
        fact(5, [[7, 3, 99, 1]], **{lr: 3e-3}),  # a seed that the other has not
    ]
    to_best, ahead = ratios(facts, [Axis((lr,), [(1e-3,), (3e-3,)])])
    assert (to_best["setting"], to_best["to"], to_best["differs"]) == ({lr: 1e-3}, {lr: 3e-3}, [lr])
    assert (to_best["value"], to_best["interval"], to_best["by_seed"]) == (0.5, [0.5, 0.5], [0.5])
    assert (ahead["value"], ahead["interval"], ahead["replies"], ahead["same_data"]) == (2.0, [2.0, 2.0], 2, True)
    facts[2]["data"] = "another order"
    assert [ratio["same_data"] for ratio in ratios(facts, [])] == [False]


def test_runs_of_one_seed_are_pooled_to_their_own_figures(recipe, greedy_cache, tmp_path):
    path = recipe('"draft.method" = ["dflash", "domino"]')
    report = sweep(greedy_cache, path, ("draft.mask_token_id=260",), tmp_path, "cpu")
    assert len(report["runs"]) == 2 and all(one["accept_len"] >= 1 for one in report["runs"])
    for alone, together in zip(report["runs"], report["pooled"], strict=True):
        assert (together["accept_len"], together["interval"]) == (alone["accept_len"], alone["interval"])
        assert together["seeds"] == [alone["accept_len"]]


def test_what_has_no_figure_comes_last_and_says_why():
    facts = [fact(0, []), fact(1, [[7, 3, 8, 2]]), fact(2, [[7, 3, 9, 2]])]
    assert [one["setting"]["train.seed"] for one in rank_by_accept_length(facts)] == [2, 1, 0]

    console = Console(width=160, file=io.StringIO())
    runs, pooled = rank_by_accept_length(facts), pool_seeds(facts)
    console.print(sweep_table({"runs": runs, "pooled": pooled, "ratios": [], "warnings": []}))
    text = console.file.getvalue()
    assert "4.25" in text and "2 of 3" in text and "4.00 - 4.50" in text
    assert "runs/0: step 1: loss nan" in text


def test_where_nothing_was_measured_no_setting_is_the_best():
    facts = [fact(0, [], **{"train.lr": 1e-3}), fact(0, [], **{"train.lr": 1e30})]
    console = Console(width=160, file=io.StringIO())
    console.print(sweep_table({"runs": facts, "pooled": pool_seeds(facts), "ratios": [], "warnings": []}))
    rows = [line.split() for line in console.file.getvalue().splitlines()[1:3]]
    assert [row[:5] for row in rows] == [["0.001", "0", "failed", "-", "-"], ["1e+30", "0", "failed", "-", "-"]]


def test_the_example_is_a_sweep_and_its_base_is_the_demos():
    combinations = load_sweep(ROOT / "configs/sweep.toml")
    demo = load_recipe(ROOT / "configs/demo.toml").train
    assert len(combinations) == 8
    for _, one in combinations:
        assert (one.train.anchors, one.train.optimizer) == (demo.anchors, demo.optimizer)
