"""`search = "optuna"`: each trial is made once, and alike however often it is stopped, by any number of processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.runs.sweep_record import read_sweep
from stages.train_draft import sweep_search
from stages.train_draft.sweep import sweep
from stages.train_draft.sweep_search import Search
from stages.train_draft.sweep_settings import read_sweep_file
from stages.train_draft.sweep_study import drop_incomplete_line

ROOT = Path(__file__).parents[2]
BASE = """
[draft]
method = "dflash"
block_size = 4
mask_token_id = 260
[train]
steps = 6
eval_every = 2
save_every = 1
batch = 4
anchors = 6
log_every = 1
[sweep]
search = "optuna"
"""
SPACE = """
trials = 3
"train.lr" = {low = 1e-4, high = 1e-2, log = true}
"draft.layers" = [[1], [1, 3]]
"""


@pytest.fixture
def recipe(tmp_path):
    def written(lines: str = SPACE, base: str = BASE) -> Path:
        (tmp_path / "search.toml").write_text(base + lines)
        return tmp_path / "search.toml"

    return written


def settings(report: dict) -> list:
    """The trials of a search with what they gained, in order."""
    runs = sorted(report["runs"], key=lambda run: run["trial"])
    return [(run["trial"], run["setting"], run["accept_len"], run["state"], Path(run["run"]).name) for run in runs]


def command(path: Path, cache: Path, out: Path, *options: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "pipeline", "sweep", path, "--cache", cache, "--device", "cpu", "--out", out]
    return subprocess.Popen(
        [*words, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_one_process_makes_the_same_trials_again_and_more_of_them_go_on_with_the_study(recipe, greedy_cache, tmp_path):
    first = sweep(greedy_cache, recipe(), out=tmp_path / "one", device="cpu")
    assert [trial[0] for trial in settings(first)] == [0, 1, 2]
    assert all(run["accept_len"] >= 1 and 1e-4 <= run["setting"]["train.lr"] <= 1e-2 for run in first["runs"])
    assert len({run["setting"]["train.lr"] for run in first["runs"]}) == 3
    assert settings(sweep(greedy_cache, recipe(), out=tmp_path / "two", device="cpu")) == settings(first)

    more = sweep(greedy_cache, recipe(SPACE.replace("trials = 3", "trials = 4")), out=tmp_path / "one", device="cpu")
    assert settings(more)[:3] == settings(first) and len(more["runs"]) == 4
    other = sweep(greedy_cache, recipe("seed = 5\n" + SPACE), out=tmp_path / "one", device="cpu")
    assert len(other["runs"]) == 3 and settings(other) != settings(first), "another study"
    assert read_sweep(tmp_path / "one").search.seed == 5


def test_a_killed_trial_is_taken_up_again_and_the_study_ends_as_if_undisturbed(recipe, greedy_cache, tmp_path):
    cache, out = shutil.copytree(greedy_cache, tmp_path / "cache"), tmp_path / "killed"
    path = recipe(base=BASE.replace("steps = 6", "steps = 40"))
    process = command(path, cache, out)
    while not list(out.glob("dflash-*/checkpoints/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not list(out.glob("*/done.json"))

    went_on = sweep(cache, path, out=out, device="cpu")
    assert settings(went_on) == settings(sweep(cache, path, out=tmp_path / "undisturbed", device="cpu"))
    assert len(list(out.glob("dflash-*"))) == 3, "the killed run went on in its own folder"


def test_two_commands_share_one_study(recipe, greedy_cache, tmp_path):
    cache, out = shutil.copytree(greedy_cache, tmp_path / "cache"), tmp_path / "runs"
    path = recipe(SPACE.replace("trials = 3", "trials = 5"))
    both = [command(path, cache, out), command(path, cache, out, "--jobs", "2")]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said

    runs = read_sweep(out).runs
    assert sorted(run.trial for run in runs) == [0, 1, 2, 3, 4] and len({run.run for run in runs}) == 5
    assert all(run.state in ("finished", "pruned") for run in runs)
    assert sum(text.count("starting at step 0") for text, _ in said) == 5, "each was trained once"


def test_a_trial_that_does_badly_is_pruned_and_one_that_crashes_failed(recipe, greedy_cache, tmp_path, monkeypatch):
    asked = []

    def fails(trial, axis):
        asked.append(trial.number)
        return 1 if trial.number == 2 else 0

    monkeypatch.setattr(sweep_search, "suggest_number", fails)
    monkeypatch.setattr("optuna.trial.Trial.should_prune", lambda trial: trial.number == 1)
    whole = Search._train_run

    def crashing(self, trial, *rest):
        if trial.number == 2:
            raise ZeroDivisionError("a bug")
        return whole(self, trial, *rest)

    monkeypatch.setattr(Search, "_train_run", crashing)
    report = sweep(greedy_cache, recipe(), out=tmp_path / "runs", device="cpu")
    found = {run["trial"]: run for run in report["runs"]}
    assert [found[number]["state"] for number in range(3)] == ["finished", "pruned", "failed"]
    assert found[1]["pruned"]["step"] == 2 and found[1]["failed"] is None and found[1]["accept_len"] is None
    assert found[2]["failed"] == "bug: ZeroDivisionError: a bug"
    assert not (Path(found[1]["run"]) / "done.json").exists()

    again = sweep(greedy_cache, recipe(), out=tmp_path / "runs", device="cpu")
    assert settings(again) == settings(report), "nothing is done again"


def test_the_median_of_the_others_at_the_same_step_prunes(recipe, greedy_cache, tmp_path, monkeypatch):
    """Six trials whose evaluations are given: the sixth is below the median of the five before."""
    lengths = iter([[2.0] * 3, [2.5] * 3, [3.0] * 3, [3.5] * 3, [4.0] * 3, [1.1] * 3])
    whole = Search._train_run

    def measured(self, trial, run, device):
        given = iter(next(lengths))
        report = type(trial).report
        monkeypatch.setattr(type(trial), "report", lambda me, value, step: report(me, next(given), step))
        try:
            return whole(self, trial, run, device)
        finally:
            monkeypatch.setattr(type(trial), "report", report)

    monkeypatch.setattr(Search, "_train_run", measured)
    report = sweep(greedy_cache, recipe(SPACE.replace("trials = 3", "trials = 6")), out=tmp_path / "runs", device="cpu")
    assert [run["trial"] for run in report["runs"] if run["state"] == "pruned"] == [5]


def test_a_space_with_fewer_settings_than_trials_ends(recipe, greedy_cache, tmp_path, capsys):
    report = sweep(greedy_cache, recipe('trials = 5\n"draft.layers" = [[1], [1, 3]]\n'), out=tmp_path, device="cpu")
    assert len(report["runs"]) == 2 == len({run["run"] for run in report["runs"]})
    assert "proposes nothing new: 3 of 5 trials are left out" in capsys.readouterr().out


def test_paired_fields_are_one_choice_of_a_search(recipe, greedy_cache, tmp_path):
    lines = 'trials = 3\n[sweep.paired]\n"draft.layers" = [[1], [1, 3]]\n"train.lr" = [1e-3, 2e-3]\n'
    report = sweep(greedy_cache, recipe(lines), out=tmp_path, device="cpu")
    assert {str(run["setting"]) for run in report["runs"]} == {
        "{'draft.layers': [1], 'train.lr': 0.001}", "{'draft.layers': [1, 3], 'train.lr': 0.002}",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (SPACE + '"train.seed" = [0, 1]\n', "luckiest seed"),
        (SPACE + '"train.heldout" = [0.1, 0.2]\n', "over train.heldout would compare .* on different samples"),
        (SPACE + '"train.eval_samples" = {low = 1, high = 8}\n', "over train.eval_samples would compare"),
        (SPACE.replace("trials = 3", ""), "`trials` in .sweep.: Field required; such as trials = 20"),
        (SPACE.replace("high", "hihg"), "hihg.*did you mean `high`|`high`: Field required"),
        (SPACE.replace("1e-4", "1e-1"), "low has to be below high"),
        (SPACE + '"draft.num_hidden_layers" = {low = 0, high = 2}\n', "num_hidden_layers = 0"),
        (SPACE.replace("[1, 3]]", "[2]]"), r"with layers = \[2\].*holds layers"),
        (SPACE + "trails = 3\n", "`trails` in .sweep. is no field; did you mean `trials`"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_its_first_run(recipe, greedy_cache, tmp_path, lines, says):
    with pytest.raises(UsageError, match=says):
        sweep(greedy_cache, recipe(lines), out=tmp_path / "runs", device="cpu")
    assert not (tmp_path / "runs").exists()


def test_what_a_search_needs_is_said(recipe, greedy_cache, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r'there is "optuna"'):
        read_sweep_file(recipe(SPACE, BASE.replace("optuna", "grid")))
    with pytest.raises(UsageError, match=r'add search = "optuna"'):
        read_sweep_file(recipe(SPACE, BASE.replace('search = "optuna"', "")))
    with pytest.raises(UsageError, match="is a range, which a grid has no values of"):
        read_sweep_file(recipe(SPACE.replace("trials = 3", ""), BASE.replace('search = "optuna"', "")))
    with pytest.raises(UsageError, match="--shared-read is of a grid"):
        sweep(greedy_cache, recipe(), out=tmp_path / "runs", device="cpu", shared_read=True)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'draft-pipeline\[search\]'"):
        sweep(greedy_cache, recipe(), out=tmp_path / "runs", device="cpu")


def test_an_incomplete_line_of_the_journal_is_cut_off(tmp_path):
    path = tmp_path / "journal"
    path.write_text('{"a": 1}\n{"b"')
    drop_incomplete_line(path)
    assert path.read_text() == '{"a": 1}\n'
    drop_incomplete_line(tmp_path / "none")


def test_a_signal_leaves_the_trial_to_the_next_command(recipe, greedy_cache, tmp_path):
    cache, out = shutil.copytree(greedy_cache, tmp_path / "cache"), tmp_path / "runs"
    path = recipe(base=BASE.replace("steps = 6", "steps = 2000").replace("eval_every = 2", "eval_every = 2000"))
    process = command(path, cache, out)
    while not list(out.glob("dflash-*/checkpoints/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    (run,) = json.loads((out / "sweep.json").read_text())["runs"]
    assert run["state"] == "unfinished" and run["trial"] == 0
