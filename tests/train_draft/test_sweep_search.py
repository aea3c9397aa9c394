"""`search = "optuna"`: each trial is made once, and alike however often it is stopped, by any number of processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from pipeline.cli import main
from pipeline.errors import PipelineError, ProofError, UsageError
from pipeline.runs.sweep_record import read_sweep
from stages.train_draft import sweep_plan, sweep_search
from stages.train_draft.sweep import Planned, sweep
from stages.train_draft.sweep_search import Search
from stages.train_draft.sweep_settings import read_sweep_file
from stages.train_draft.sweep_study import drop_incomplete_line
from stages.train_draft.training_run import TrainingRun

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


def test_each_run_is_planned_once_however_often_it_is_shown(recipe, greedy_cache, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sweep_plan, "data_digest", lambda *of: asked.append(of) or "data")
    planned = Planned(greedy_cache, recipe(), (), tmp_path)
    before = len(asked)
    planned.search.train(torch.device("cpu"), before_each=lambda: None)
    for _ in range(3):
        assert [row.state for row in planned.search.rows()] == ["finished"] * 3
    assert len(planned.search.run_facts()) == 3 and len(asked) - before == 3


def test_a_combination_that_is_refused_is_a_failed_trial(recipe, greedy_cache, tmp_path, monkeypatch, capsys):
    resolve = sweep_plan.resolve

    def refusing(stated, store):  # each value fits with the first one of the other list
        if (stated.draft.layers, stated.train.lr) == ((1, 3), 2e-3):
            raise UsageError("these do not fit")
        return resolve(stated, store)

    monkeypatch.setattr(sweep_plan, "resolve", refusing)
    path = recipe('trials = 4\n"draft.layers" = [[1], [1, 3]]\n"train.lr" = [1e-3, 2e-3]\n')
    with pytest.raises(SystemExit, match="1"):
        main(["sweep", str(path), "--cache", str(greedy_cache), "--out", str(tmp_path), "--device", "cpu"])
    runs = read_sweep(tmp_path).runs
    assert [run.state for run in runs] == ["finished"] * 3 + ["failed"]
    assert runs[-1].failed == "with layers = [1, 3], lr = 0.002: these do not fit"
    assert (runs[-1].run, runs[-1].steps, runs[-1].data) == (str(tmp_path), 0, "")
    printed = capsys.readouterr()
    assert "1 of 4 runs failed" in printed.err and "these do not fit" in printed.out


def test_trials_that_learn_from_other_samples_are_warned_of(recipe, greedy_cache, tmp_path, monkeypatch):
    digest = sweep_plan.data_digest
    monkeypatch.setattr(
        sweep_plan, "data_digest", lambda store, split, run: f"{digest(store, split, run)} {run.draft.target_layer_ids}"
    )  # as where the states of a sample are refused in one layer
    lines = 'trials = 2\n"draft.layers" = [[1], [1, 3]]\n'
    (line,) = sweep(greedy_cache, recipe(lines), out=tmp_path, device="cpu")["warnings"]
    assert "not the same data: run 0 on " in line and "run 1 on " in line


KILLED = """
import os, sys
from pathlib import Path
from stages.train_draft.sweep_search import Search
from pipeline.cli import main
whole = Search._train_run
def crashing(self, trial, *rest):
    if trial.number == 1:
        os.kill(os.getpid(), 9)
    return whole(self, trial, *rest)
Search._train_run = crashing
main(sys.argv[1:])
"""


def test_a_trial_that_kills_its_process_fails_after_three_attempts(recipe, greedy_cache, tmp_path):
    cache, out = shutil.copytree(greedy_cache, tmp_path / "cache"), tmp_path / "runs"
    words = [sys.executable, "-c", KILLED, "sweep", recipe(), "--cache", cache, "--out", out, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    codes = [subprocess.run(words, cwd=ROOT, env=environment, capture_output=True).returncode for _ in range(4)]
    assert codes == [-9, -9, -9, 1]
    found = {run.trial: run for run in read_sweep(out).runs}
    assert [found[number].state for number in range(3)] == ["finished", "failed", "finished"]
    assert "3 processes that trained it from step 0 on were killed" in found[1].failed


def test_a_signal_is_no_attempt(recipe, greedy_cache, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Search, "_train_run", stopped)
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                sweep(greedy_cache, recipe(), out=tmp_path / "runs", device="cpu")
    report = sweep(greedy_cache, recipe(), out=tmp_path / "runs", device="cpu")
    assert [run["state"] for run in report["runs"]] == ["finished"] * 3


def test_a_search_whose_processes_cannot_begin_is_no_success(recipe, greedy_cache, tmp_path, monkeypatch):
    out = tmp_path / "runs"

    def died(places, work, *_):
        return {path: PipelineError("signal 9 ended its process") for each in work for path in each.runs}

    with monkeypatch.context() as patched:
        patched.setattr("stages.train_draft.sweep.train_on_devices", died)
        with pytest.raises(ProofError, match=r"\(signal 9 ended its process\); 0 of 3 trials were begun; the same"):
            sweep(greedy_cache, recipe(), out=out, devices="cpu,cpu")
    assert read_sweep(out).runs == []
    assert len(sweep(greedy_cache, recipe(), out=out, device="cpu")["runs"]) == 3


def reported(out: Path) -> list:
    """What the study in a sweep's folder knows of each trial that is no repeat."""
    study = optuna.load_study(study_name=read_sweep(out).search.study, storage=journal_storage(out))
    trials = [trial for trial in study.trials if "repeats" not in trial.user_attrs]
    return [(trial.state.name, trial.value, trial.intermediate_values) for trial in trials]


def journal_storage(out: Path):
    return JournalStorage(JournalFileBackend(str(out / "search.journal")))


def test_a_run_that_is_finished_tells_a_study_what_its_evaluations_were(recipe, greedy_cache, tmp_path):
    out = tmp_path / "runs"
    sweep(greedy_cache, recipe(), out=out, device="cpu")
    first = reported(out)
    assert [list(values) for _, _, values in first] == [[2, 4, 6]] * 3
    for path in [*out.glob("search.journal*"), out / "sweep.json"]:
        path.unlink()  # the same as a kill before the study is told, and as another study in the folder
    sweep(greedy_cache, recipe(), out=out, device="cpu")
    assert reported(out) == first


def test_a_kill_before_the_study_is_told_of_a_pruned_trial_changes_nothing(recipe, greedy_cache, tmp_path, monkeypatch):
    out = tmp_path / "runs"
    monkeypatch.setattr("optuna.trial.Trial.should_prune", lambda trial: trial.number == 1)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("optuna.trial.Trial.set_user_attr", stopping_at("pruned", killed))
        with pytest.raises(KeyboardInterrupt):
            sweep(greedy_cache, recipe(), out=out, device="cpu")
    found = {run["trial"]: run for run in sweep(greedy_cache, recipe(), out=out, device="cpu")["runs"]}
    assert (found[1]["state"], found[1]["pruned"]["step"]) == ("pruned", 2)


def stopping_at(name: str, stop):
    whole = optuna.trial.Trial.set_user_attr
    return lambda trial, key, value: stop() if key == name else whole(trial, key, value)


def test_the_trackers_of_every_trial_are_closed_a_pruned_one_too(recipe, greedy_cache, tmp_path, monkeypatch):
    closed, close = [], TrainingRun.close
    monkeypatch.setattr(TrainingRun, "close", lambda run: closed.append(run.step) or close(run))
    monkeypatch.setattr("optuna.trial.Trial.should_prune", lambda trial: trial.number == 1)
    sweep(greedy_cache, recipe(), out=tmp_path / "runs", device="cpu")
    assert closed == [6, 2, 6]


def test_a_signal_leaves_the_trial_to_the_next_command(recipe, greedy_cache, tmp_path):
    cache, out = shutil.copytree(greedy_cache, tmp_path / "cache"), tmp_path / "runs"
    path = recipe(base=BASE.replace("steps = 6", "steps = 2000").replace("eval_every = 2", "eval_every = 2000"))
    process = command(path, cache, out)
    while not list(out.glob("dflash-*/checkpoints/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert [run.state for run in read_sweep(out).runs] == ["unfinished"]  # those who watch it see it while it runs
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    (run,) = json.loads((out / "sweep.json").read_text())["runs"]
    assert run["state"] == "unfinished" and run["trial"] == 0
