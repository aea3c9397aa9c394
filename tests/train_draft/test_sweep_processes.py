"""A sweep on several devices: the same runs and table as one after the other, whatever happens to a process of it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.errors import CacheError, DiskError, PipelineError
from pipeline.runs import checkpoint
from stages.train_draft.stop import GracefulStop
from stages.train_draft.sweep import sweep
from stages.train_draft.sweep_processes import Work, failure, named_devices, train_on_devices

ROOT = Path(__file__).parents[2]
BASE = """
[draft]
method = "dflash"
block_size = 4
[train]
steps = 4
batch = 4
anchors = 6
log_every = 1
[sweep]
"""


def contents(folder: Path) -> dict[str, bytes]:
    """What a sweep made, timings and versions aside, which differ from run to run."""
    differ = ("timing.jsonl", "run.json", "sweep.json", "sweep.csv")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in differ)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def without_paths(report: dict) -> str:
    runs = [run | {"seconds": None} for run in report["runs"]]
    return re.sub(r"'[^']*/(dflash-\w+)'", r"\1", str([runs, report["pooled"], report["ratios"]]))


def test_two_processes_and_shared_reads_make_the_runs_and_the_table_that_one_makes(tiny_cache, tmp_path, capsys):
    recipe = tmp_path / "sweep.toml"
    recipe.write_text(BASE + '"train.lr" = [1e-3, 1e30, 3e-3]\n')
    serial = sweep(tiny_cache, recipe, out=tmp_path / "serial", device="cpu")
    capsys.readouterr()
    together = sweep(tiny_cache, recipe, out=tmp_path / "together", devices="cpu,cpu", shared_read=True)

    assert without_paths(together) == without_paths(serial)
    assert sum(run["failed"] is not None for run in together["runs"]) == 1, "it diverges, and the others go on"
    assert contents(tmp_path / "together") == contents(tmp_path / "serial")
    printed = capsys.readouterr().out.splitlines()
    assert "3 runs, 0 of them finished before" in printed, "and no device is left without a run:"
    assert {"runs 1, 2 of 3: lr = 0.001; lr = 1e+30, on cpu", "run 3 of 3: lr = 0.003, on cpu"} <= {*printed}
    begun = {line.partition(": 2")[0] for line in printed if "parameters; starting at step 0" in line}
    assert begun == {"[runs 1, 2] run 1", "[runs 1, 2] run 2", "[run 3] 24,832 parameters; starting at step 0 of 4"}
    assert any(line.startswith("[runs 1, 2] run 2: failed: step ") for line in printed)


def test_signals_to_all_processes_have_each_save_its_run_and_end(tiny_cache, tmp_path):
    recipe = tmp_path / "sweep.toml"
    recipe.write_text(
        BASE.replace("steps = 4", "steps = 2000\nsave_every = 2000\neval_every = 2000") + '"train.seed" = [0, 1]\n'
    )
    cache, out = shutil.copytree(tiny_cache, tmp_path / "cache"), tmp_path / "runs"
    command = [sys.executable, "-m", "pipeline", "sweep", recipe, "--cache", cache, "--device", "cpu", "--jobs", "2"]
    process = subprocess.Popen(
        [*command, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    while len(list(out.glob("*/metrics.jsonl"))) < 2 or not all(
        log.stat().st_size for log in out.glob("*/metrics.jsonl")
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler sends it, and this one's parent does besides
    printed, said = process.communicate(timeout=60)

    assert process.returncode == 130 and said.strip().startswith("interrupted") and said.count("\n") == 2, said
    saved = [checkpoint.steps(run) for run in out.glob("*-*")]
    assert len(saved) == 2 and all(len(steps) == 1 and 0 < steps[0] < 2000 for steps in saved), saved
    assert printed.count("the same command goes on from there") == 2, printed
    for run in out.glob("*-*"):
        checkpoint.latest(run)  # checks every byte


def test_a_signal_that_comes_twice_at_once_is_one_and_a_later_one_acts(monkeypatch):
    with pytest.raises(KeyboardInterrupt), GracefulStop() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # as from a scheduler and from the process that started this one
        assert stop.received == signal.SIGINT
        later = time.monotonic() + 60
        monkeypatch.setattr(time, "monotonic", lambda: later)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the later one acts at once")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_nothing_acted_on_ends_the_process_as_the_block_ends():
    with pytest.raises(SystemExit, match="143"), GracefulStop() as stop:
        signal.raise_signal(signal.SIGTERM)  # after the last step, for example: a sweep would go on with the next run
        assert stop.received == signal.SIGTERM
    with pytest.raises(CacheError), GracefulStop():
        signal.raise_signal(signal.SIGTERM)
        raise CacheError("damaged")


# The processes, with work that is done at once


def prepared(folder: Path, device: str):
    """Work that ends as the name of its run says, and notes that it was done, and where."""

    def train(work: Work) -> dict:
        (path,) = work.runs
        (folder / path.name).write_text(f"{device} {os.getpid()}")
        if path.name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if path.name == "damaged":
            raise CacheError("damaged")
        if path.name == "odd":
            raise UnicodeDecodeError("ascii", b"x", 0, 1, "odd")
        if path.name == "waits":
            print("waiting", flush=True)
            time.sleep(60)
        return {}

    return train


def work(*names: str) -> list[Work]:
    return [Work(f"run {name}", name, (Path(name),)) for name in names]


def test_whatever_ends_a_run_the_others_are_done(tmp_path, capsys):
    names = ["killed", "one", "damaged", "odd", "two", "three"]
    errors = train_on_devices(["cpu", "cuda:7"], work(*names), partial(prepared, tmp_path))

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert {path.name: type(error) for path, error in errors.items()} == {
        "killed": PipelineError, "damaged": CacheError, "odd": UnicodeDecodeError,
    }  # fmt: skip
    assert "signal 9 ended its process" in str(errors[Path("killed")])
    assert "Traceback" in errors[Path("odd")].__notes__[0], "the trace is the one of its own process"
    assert {path.read_text().split()[0] for path in tmp_path.iterdir()} == {"cpu", "cuda:7"}
    assert "[damaged] failed: damaged" in capsys.readouterr().out.splitlines()


ALONE = """
import sys
from functools import partial
from pathlib import Path
from test_sweep_processes import prepared, work
from stages.train_draft.sweep_processes import train_on_devices
if __name__ == "__main__":
    train_on_devices(["cpu", "cpu"], work("waits", "one", "two"), partial(prepared, Path(sys.argv[1])))
"""


def test_processes_whose_parent_is_killed_end_too(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    (tmp_path / "out").mkdir()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [sys.executable, tmp_path / "alone.py", tmp_path / "out"], env={**os.environ, "PYTHONPATH": paths}
    )
    noted = tmp_path / "out" / "waits"
    while not (noted.exists() and noted.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    child = int(noted.read_text().split()[1])
    process.kill()
    process.wait()
    for _ in range(200):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the process outlives its parent")


def test_what_ended_a_run_is_told_without_secrets(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    try:
        raise RuntimeError("refused at https://me:secret@host/ with key 0123456789abcdef")
    except RuntimeError as error:
        text = str(failure(error, tmp_path))
    printed = capsys.readouterr().out
    assert text == "bug: RuntimeError: refused at https://***@host/ with key ***"
    assert "Traceback" in printed and "0123456789abcdef" not in printed and "me:secret" not in printed


# Which devices


def test_devices_are_those_named_each_as_often_as_there_are_jobs(monkeypatch):
    assert named_devices("cpu", None, 3) == ["cpu"] * 3
    assert named_devices(None, "cpu, meta", 2) == ["cpu", "meta"] * 2
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert named_devices(None, None, 1) == ["cuda:0", "cuda:1"], "all there are"
    assert named_devices("cuda:1", None, 1) == ["cuda:1"], "the one that is named"
    assert named_devices(None, "cuda:1,cpu", 1) == ["cuda:1", "cpu"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert named_devices(None, None, 1) == ["cpu"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--devices", "cpu,nowhere"], "device nowhere: "),
        (["--devices", ","], "write names separated by commas"),
        (["--devices", "cpu", "--device", "cpu"], "leave one out"),
    ],
)
def test_a_device_that_is_not_there_ends_a_sweep_before_its_first_run(tiny_cache, tmp_path, capsys, options, says):
    recipe = tmp_path / "sweep.toml"
    recipe.write_text(BASE + '"train.seed" = [0, 1]\n')
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", str(recipe), "--cache", str(tiny_cache), "--out", str(tmp_path / "runs"), *options])
    assert says in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_run_that_is_trained_elsewhere_is_recorded_and_the_others_are_done(tiny_cache, tmp_path):
    from pipeline.runs.folder import run_lock

    recipe = tmp_path / "sweep.toml"
    recipe.write_text(BASE + '"train.seed" = [0, 1, 2]\n')
    first = sweep(tiny_cache, recipe, out=tmp_path / "runs", device="cpu")["runs"]
    before = contents(tmp_path / "runs")
    taken, *others = [Path(run["run"]) for run in sorted(first, key=lambda run: run["setting"]["train.seed"])]
    (taken / "done.json").unlink()
    for run in others:
        shutil.rmtree(run)
    with run_lock(taken):
        report = sweep(tiny_cache, recipe, out=tmp_path / "runs", devices="cpu,cpu")
    failed = {run["run"]: run["failed"] for run in report["runs"] if run["state"] == "failed"}
    assert failed.keys() == {str(taken)} and "being trained by another process" in failed[str(taken)]
    assert contents(tmp_path / "runs") == {
        name: data for name, data in before.items() if name != f"{taken.name}/done.json"
    }


def full(folder: Path, device: str):
    """Work of which the first piece finds the disk full."""

    def train(work: Work) -> dict:
        (path,) = work.runs
        (folder / path.name).touch()
        raise DiskError("no space left") if path.name == "full" else SystemExit(143)

    return train


def test_a_full_disk_in_one_process_ends_them_all(tmp_path):
    errors = train_on_devices(["cpu"], work("full", "one", "two"), partial(full, tmp_path))
    assert {path.name: type(error) for path, error in errors.items()} == {"full": DiskError}
    assert [path.name for path in tmp_path.iterdir()] == ["full"], "nothing more was begun"
