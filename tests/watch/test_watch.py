"""`pipeline watch`: what a run, a sweep and a capture are at, from their files alone, whatever is in them."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from pipeline.cache import HiddenCache, layout
from pipeline.cache.atomic import Scratch, try_lock
from pipeline.errors import UsageError
from pipeline.json_files import with_checksum
from pipeline.runs import folder as run_folder
from pipeline.runs import sweep_record
from stages.train_draft.run import run
from stages.train_draft.sweep_study import JOURNAL
from stages.watch import capture_progress, run_progress, sweep_progress
from stages.watch.capture_progress import CaptureProgress
from stages.watch.locks import is_held
from stages.watch.run import Watched, watch
from stages.watch.run_progress import RunProgress
from stages.watch.screen import frame, spark

ROOT = Path(__file__).parents[2]
SETS = ("draft.method=dflash", "draft.block_size=4", "train.batch=4", "train.anchors=6", "train.log_every=1")
TIMING = {
    "seconds": 9.0,
    "step_seconds": 0.5,
    "tokens_s": 1234.0,
    "data_wait": 0.02,
    "peak_bytes": 3 << 30,
    "eta": 60.0,
}


@pytest.fixture(scope="module")
def finished(greedy_cache, tmp_path_factory):
    """A finished run of eight steps, measured four times."""
    sets = (*SETS, "train.steps=8", "train.eval_every=2", "draft.mask_token_id=260")
    return run(greedy_cache, None, sets, tmp_path_factory.mktemp("runs") / "one", "cpu").run


@pytest.fixture
def going(tmp_path):
    """The folder of a run that has logged two steps and one evaluation of 100, written by hand."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "recipe.toml").write_text('[draft]\nmethod = "domino"\n[train]\nsteps = 100\n')
    metrics = [{"step": 10, "loss": 3.0, "lr": 1e-3, "accept_len_tf": 1.5, "lambda_base": 0.5}]
    metrics += [{"step": 20, "eval": {"accept_len": 1.25, "interval": [1.0, 1.5], "calls": 9, "domains": {}}}]
    metrics += [{"step": 20, "loss": 2.0, "lr": 2e-3, "accept_len_tf": 1.75, "lambda_base": 0.25}]
    write_lines(path / "metrics.jsonl", metrics)
    shares = {"data": 0.02, "forward": 0.3, "head": 0.2, "backward": 0.4, "optimizer": 0.07, "other": 0.01}
    write_lines(path / "timing.jsonl", [{"step": 20, **TIMING, "time": shares}])
    return path


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_bytes(b"".join(with_checksum(json.dumps(record)) for record in records))


def shown(facts: dict, width: int = 120) -> str:
    console = Console(width=width, color_system=None, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.capture() as caught:
        console.print(frame(facts))
    return caught.get()


def test_a_finished_run_is_shown_and_ends_the_watch(finished, capsys):
    watch(finished, 60.0, once=False)  # a second look would take a minute
    printed = capsys.readouterr().out
    assert "finished  dflash" in printed and "step 8/8" in printed and "100%" in printed
    evaluations = RunProgress(finished).facts()["evaluations"]
    assert [found["step"] for found in evaluations] == [2, 4, 6, 8]
    last = evaluations[-1]
    low, high = last["interval"]
    assert f"{last['accept_len']:.2f} [{low:.2f}, {high:.2f}] at step 8" in printed
    assert all(f"{name} " in printed for name in ("loss", "accept_len_tf", "lr", "forward", "head", "backward"))


def test_a_run_that_is_trained_is_told_by_its_lock_which_nobody_takes(going):
    assert RunProgress(going).facts()["state"] == "stopped"
    with run_folder.run_lock(going):
        facts = RunProgress(going).facts()
        assert facts["state"] == "running" and 50 < facts["eta"] <= 60
        printed = shown(facts)
    assert RunProgress(going).facts()["state"] == "stopped"
    for text in ("running  domino", "step 20/100", "20%", "loss 2.000", "lambda 0.25", "lr 2.0e-03", "1,234 tokens/s",
                 "2.0 steps/s", "data wait 2%", "peak memory 3.0 GiB", "backward 40%", "ETA ",
                 "accept length ▁  1.25 [1.00, 1.50] at step 20"):  # fmt: skip
        assert text in printed, text


def test_looking_takes_no_lock(going, monkeypatch):
    def refused(*_):
        raise AssertionError("a lock was taken")

    (going / "lock").touch()
    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(fcntl, "lockf", refused)
    RunProgress(going).facts()
    Watched(going.parent).facts()


def test_a_lock_is_seen_from_its_file_alone(tmp_path):
    path = tmp_path / "lock"
    assert is_held(path) is False
    fd = try_lock(path)
    assert is_held(path) is True and is_held(path, tmp_path / "no table") is None
    os.close(fd)
    assert is_held(path) is False
    found = os.stat(path)
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    lines = {
        f"1: FLOCK  ADVISORY  WRITE 99 {device}:{found.st_ino} 0 EOF": True,
        f"1: FLOCK  ADVISORY  WRITE 99 00:31:{found.st_ino} 0 EOF": True,  # an overlay's or a network disk's
        f"1: -> FLOCK  ADVISORY  WRITE 99 {device}:{found.st_ino} 0 EOF": False,  # waits for it
        f"1: FLOCK  ADVISORY  READ 99 {device}:{found.st_ino} 0 EOF": False,
        f"1: FLOCK  ADVISORY  WRITE 99 ff:fe:{found.st_ino} 0 EOF": False,
        "": False,
    }
    for line, held in lines.items():
        (tmp_path / "table").write_text(f"{line}\n")
        assert is_held(path, tmp_path / "table") is held, line


def test_where_the_system_does_not_say_who_has_a_lock_a_fresh_log_counts(going, monkeypatch):
    monkeypatch.setattr(run_progress, "is_held", lambda _: None)
    assert RunProgress(going).facts()["state"] == "running"
    for name in ("metrics.jsonl", "timing.jsonl"):
        os.utime(going / name, (1, 1))
    assert RunProgress(going).facts()["state"] == "stopped"


def test_a_path_is_waited_for_and_may_become_anything(tmp_path, going, tiny_cache):
    watched = Watched(tmp_path / "later")
    assert watched.facts()["state"] == "waiting"
    assert "waiting for" in shown(watched.facts()) and shown(watched.facts()).count("\n") <= 3
    mistyped = going.with_name(going.name[:-1])
    assert f"did you mean {going}?" in shown(Watched(mistyped).facts()).replace("\n", "")
    going.rename(tmp_path / "later")
    assert watched.facts()["kind"] == "run"
    assert Watched(tiny_cache).facts()["kind"] == "capture"
    with pytest.raises(UsageError, match="is no folder"):
        Watched(tmp_path / "later" / "recipe.toml")


@pytest.mark.parametrize(
    "hostile",
    [b"", b"{", b"[]", b"null", b'{"step": "x"}\n', b'{"step": 3, "eval": []}\n', b"\xff\xfe\n" * 9, b"[" * 100_000,
     b'{"step": 3, "eval": {"accept_len": "a", "interval": 5, "calls": {}}}\n',
     b'{"step": 3, "time": {"\\u001b[2J": 0.5, "x": "y"}, "tokens_s": [], "eta": "soon", "peak_bytes": null}\n',
     b'{"step": 1e999, "loss": NaN}\n{"step": 5, "loss": 1e308, "lr": true}\n'],
)  # fmt: skip
def test_hostile_files_end_no_watch_and_steer_no_terminal(tmp_path, hostile, capsys):
    for kind in ("run", "sweep/one", "cache"):
        (tmp_path / kind / "plan").mkdir(parents=True) if kind == "cache" else (tmp_path / kind).mkdir(parents=True)
    (tmp_path / "cache" / "shards" / "000000").mkdir(parents=True)
    names = ("metrics.jsonl", "timing.jsonl", "done.json", "recipe.toml")
    places = [f"{kind}/{name}" for kind in ("run", "sweep/one") for name in names]
    places += ["sweep/sweep.json", "cache/plan/000000.json", "cache/capture.log", "cache/cache.json"]
    places += ["cache/shards/000000/aux.1.json", "cache/shards/000000/\x1b[2J.json"]
    for place in places:
        (tmp_path / place).write_bytes(hostile)
    for kind in ("run", "sweep", "cache"):
        watch(tmp_path / kind, 1.0, once=True)
        json.dumps(Watched(tmp_path / kind).facts(), allow_nan=False)
    assert "\x1b" not in capsys.readouterr().out


def test_a_sweep_has_a_line_for_each_run(finished, tmp_path, going):
    shutil.copytree(finished, tmp_path / "done")
    (tmp_path / "planned").mkdir()  # no run yet
    with run_folder.run_lock(going):
        sweep = Watched(tmp_path).facts()
    assert [(Path(each["path"]).name, each["state"]) for each in sweep["runs"]] == [
        ("done", "finished"),
        ("run", "running"),
    ]
    assert sweep["state"] == "running" and "1 done, 2 begun" in shown(sweep)
    rows = [line for line in shown(sweep, 80).splitlines() if line.startswith(("done", "run "))]
    assert len(rows) == 3 and "8/8" in rows[1] and "20/100" in rows[2] and "1.25" in rows[2]
    list_runs(tmp_path, {"elsewhere/run": "failed", "elsewhere/done": "finished"})
    sweep = Watched(tmp_path / "sweep.json").facts()
    assert [each["state"] for each in sweep["runs"]] == ["finished", "failed"] and sweep["state"] == "finished"


def list_runs(folder: Path, states: dict[str, str], trials: int | None = None) -> None:
    """Write a sweep.json of these runs' states, of a search where trials are given."""
    folder.mkdir(exist_ok=True)
    runs = [
        {"run": path, "state": state, "failed": "x" if state == "failed" else None} for path, state in states.items()
    ]
    (folder / "sweep.json").write_text(json.dumps({"runs": runs, "search": trials and {"trials": trials}}))


def state_of(path: Path) -> tuple[str, list[str]]:
    sweep = Watched(path).facts()
    return sweep["state"], [run["state"] for run in sweep["runs"]]


def age(folder: Path) -> None:
    """Have all files been written long ago."""
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))


def test_a_sweep_is_not_finished_between_two_of_its_runs(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "one")
    list_runs(tmp_path, {"out/one": "unfinished", "out/two": "unfinished"})
    assert state_of(tmp_path) == ("running", ["finished"])
    assert "1 done, 1 begun of 2" in shown(Watched(tmp_path).facts())
    age(tmp_path)
    assert state_of(tmp_path) == ("stopped", ["finished"])
    shutil.copytree(finished, tmp_path / "two")
    assert state_of(tmp_path) == ("finished", ["finished", "finished"])


def test_runs_that_no_sweep_lists_are_finished_after_a_wait(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "one")
    os.utime(tmp_path / "one" / "done.json")
    assert state_of(tmp_path) == ("waiting", ["finished"])
    assert "no sweep.json says whether more are to come" in shown(Watched(tmp_path).facts())
    age(tmp_path)
    assert state_of(tmp_path) == ("finished", ["finished"])


def test_pruned_and_failed_trials_have_ended(finished, going, tmp_path):
    sweep = tmp_path / "sweep"
    shutil.copytree(finished, sweep / "one")
    for name in ("two", "three"):
        shutil.copytree(going, sweep / name)
    list_runs(sweep, {"out/one": "finished", "out/two": "pruned", "out/three": "failed"}, trials=3)
    assert state_of(sweep) == ("finished", ["finished", "failed", "pruned"])
    assert "3 done, 3 begun of 3" in shown(Watched(sweep).facts()) and "pruned" in shown(Watched(sweep).facts())
    list_runs(sweep, {"out/one": "finished", "out/two": "pruned", "out/three": "failed"}, trials=4)
    assert state_of(sweep)[0] == "running", "one is to come, or the search proposes no more"
    age(sweep)
    (sweep / "trials-x").mkdir()
    fd = try_lock(sweep / "trials-x" / "3.lock")
    assert state_of(sweep)[0] == "running"
    os.close(fd)
    assert state_of(sweep)[0] == "finished"


def test_a_run_that_succeeded_on_retry_has_not_failed(finished, going, tmp_path):
    sweep = tmp_path / "sweep"
    shutil.copytree(finished, sweep / "one")
    shutil.copytree(going, sweep / "two")
    list_runs(sweep, {"out/one": "failed", "out/two": "failed"})
    with run_folder.run_lock(sweep / "two"):
        assert state_of(sweep) == ("running", ["finished", "running"])
    assert state_of(sweep) == ("finished", ["finished", "failed"])


@pytest.mark.parametrize("here", [True, False])
def test_the_runs_of_a_sweep_may_lie_beside_it(finished, tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path if here else ROOT)
    for name in ("one", "of-another-sweep"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    list_runs(tmp_path / "runs" / "sweep-0a", {"runs/one": "finished", "runs/..": "finished", "runs/gone": "failed"})
    assert state_of(tmp_path / "runs" / "sweep-0a") == ("finished", ["failed", "finished"])
    if here:
        assert state_of(Path("runs/sweep-0a/sweep.json")) == ("finished", ["failed", "finished"])


def test_what_is_named_here_to_spare_an_import_has_its_own_name():
    assert (run_progress.RECIPE, run_progress.DONE) == (run_folder.RECIPE, run_folder.DONE)
    names = ("CACHE", "PLAN", "SHARDS", "LOG", "SCRATCH", "SAMPLES")
    of_layout = ("IDENTITY", *names[1:])
    assert [getattr(capture_progress, name) for name in names] == [getattr(layout, name) for name in of_layout]
    assert sweep_progress.REPORT == sweep_record.SWEEP
    assert {*sweep_progress.ENDED, "unfinished"} == {*get_args(sweep_record.SweptRun.model_fields["state"].annotation)}
    assert fnmatch(JOURNAL, sweep_progress.JOURNALS)


def test_the_lock_of_a_run_is_where_it_is_looked_for(tmp_path):
    with run_folder.run_lock(tmp_path / "run"):
        assert is_held(tmp_path / "run" / run_progress.LOCK)


def test_a_captured_cache_is_finished_and_its_figures_are_those_of_the_cache(tiny_cache):
    facts, store = CaptureProgress(tiny_cache).facts(), HiddenCache.open(tiny_cache)
    shards = store.catalog.shards
    assert (facts["state"], facts["shards"], facts["shards_planned"]) == ("finished", shards, shards)
    assert facts["columns"] == dict.fromkeys(("aux.1", "aux.3", "aux.4", "final"), shards)
    assert facts["rows"] == facts["rows_planned"] == int(store.samples.length.sum())
    held = [path for path in (tiny_cache / "shards").rglob("*") if path.is_file()]
    own = sum(path.stat().st_size for path in held if path.suffix != ".json" and path.name != "samples.arrow")
    own += sum(path.stat().st_size for path in held if path.name == "zarr.json")
    assert facts["bytes"] == own
    assert all(f"{name} {shards}/{shards}" in shown(facts, 80) for name in facts["columns"])


def copied_shards(cache: Path, out: Path, count: int) -> CaptureProgress:
    """A cache of so many shards, each a copy of the first one, a second apart."""
    shutil.copytree(cache, out)
    manifest = json.loads((out / "plan" / "000000.json").read_text())
    (out / "plan" / "000000.json").write_text(json.dumps(manifest | {"shards": count, "tokens": 100 * count}))
    first, *others = sorted((out / "shards").iterdir())
    for other in others:
        shutil.rmtree(other)
    for number in range(1, count):
        shutil.copytree(first, out / "shards" / f"{number:06d}")
    for number in range(count):
        for path in (out / "shards" / f"{number:06d}").glob("*.json"):
            os.utime(path, (1000 + number, 1000 + number))
    return CaptureProgress(out)


def test_a_capture_in_progress_says_what_is_done_how_fast_and_by_how_many(tiny_cache, tmp_path):
    progress = copied_shards(tiny_cache, tmp_path / "cache", 12)
    for number in range(9, 12):
        shutil.rmtree(tmp_path / "cache" / "shards" / f"{number:06d}")
    (tmp_path / "cache" / "shards" / "000008" / "final.json").unlink()
    for name in ("cache.json", "capture.log"):
        os.utime(tmp_path / "cache" / name, (1, 1))
    assert progress.facts()["state"] == "stopped"
    with Scratch(tmp_path / "cache", "000008") as one, Scratch(tmp_path / "cache", "000009"):
        (one.path / "values").write_bytes(b"x" * 5000)
        facts = progress.facts()
    assert (facts["state"], facts["workers"], facts["bytes_being_written"]) == ("running", 2, 5000)
    assert (facts["shards"], facts["columns"]["aux.1"], facts["columns"]["final"]) == (8, 9, 8)
    assert (facts["rows"], facts["rows_planned"]) == (800, 1200)
    assert facts["tokens_s"] == 100.0 and facts["eta"] == 4.0, "a shard of 100 rows each second, four are left"
    printed = shown(facts, 80)
    assert "running  2 workers" in printed and "shard 8/12" in printed and "final 8/12" in printed


def test_a_further_look_costs_what_the_unfinished_shards_cost(tiny_cache, tmp_path, monkeypatch):
    progress = copied_shards(tiny_cache, tmp_path / "cache", 40)
    (tmp_path / "cache" / "shards" / "000039" / "final.json").unlink()
    first = progress.facts()
    looked, read = [], []
    list_one, read_one = capture_progress.manifests, capture_progress.read_json
    monkeypatch.setattr(capture_progress, "manifests", lambda folder: looked.append(folder) or list_one(folder))
    monkeypatch.setattr(capture_progress, "read_json", lambda path: read.append(path.name) or read_one(path))
    assert progress.facts() | {"written_ago": 0} == first | {"written_ago": 0}
    assert [folder.name for folder in looked] == ["000039"] and sorted(read) == ["000000.json", "capture.log"]


def test_a_narrow_terminal_cuts_no_figure_off(going):
    with run_folder.run_lock(going):
        facts = RunProgress(going).facts()
    narrow = shown(facts | {"written_ago": None}, 60)
    for text in ("loss 2.000", "1,234 tokens/s", "peak memory 3.0 GiB", "optimizer 7%", "1.25 [1.00, 1.50]"):
        assert text in narrow, text


def test_a_spark_line_has_the_newest_values_from_low_to_high():
    assert spark([1.0, 2.0, 1.5]) == "▁█▄" and spark([2.0]) == "▁" and spark([*range(100)])[-1] == "█"
    assert len(spark([*range(100)])) == 40


def test_the_command_imports_no_torch_and_its_json_is_one_frame(finished):
    code = f"import sys; sys.argv = ['pipeline', 'watch', {str(finished)!r}, '--json']\n"
    code += "from pipeline.cli import main\ntry:\n    main()\nfinally:\n"
    code += "    print({'torch', 'pyarrow', 'numpy', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "set()"
    facts = json.loads(done.stdout)
    assert (facts["state"], facts["step"], facts["method"]) == ("finished", 8, "dflash")


def test_watching_a_live_training_until_it_is_done(tiny_cache, tmp_path):
    words = [sys.executable, "-m", "pipeline", "watch", str(tmp_path / "run"), "--every", "0.1"]
    watcher = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    run(tiny_cache, None, (*SETS, "train.steps=4"), tmp_path / "run", "cpu")
    out, err = watcher.communicate(timeout=60)
    assert (watcher.returncode, err) == (0, "")
    assert "finished  dflash" in out and "step 4/4" in out
