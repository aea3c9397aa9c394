"""Several workers make the same cache as one, byte for byte, even if some are killed or run twice."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from cache_maker import contents as all_files
from kill_capture import contents

import pipeline.cache.atomic as disk
import stages.cache_hidden.run as planning
from pipeline.cache.atomic import process_lock
from pipeline.cache.plan import load_plan
from pipeline.errors import UsageError
from stages.cache_hidden.run import run
from stages.cache_hidden.settings import CaptureOptions
from stages.cache_hidden.shard_assignment import Worker, _built_for_gpus, find_worker

ROOT = Path(__file__).parents[2]
ARRAY = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "5"}
RANKS = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
TORCHRUN = {**RANKS, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("named", "environment", "worker"),
    [
        (None, {}, Worker(0, 1)),
        ("2/4", {}, Worker(2, 4, local=2)),
        (None, RANKS, Worker(5, 8, local=1)),
        ("2/4", RANKS, Worker(2, 4, local=1)),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_ID": "3"}, Worker(1, 3)),
        (None, {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}, Worker(1, 2, local=1)),
        (
            None,
            {**ARRAY, "SLURM_ARRAY_TASK_ID": "5", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
            Worker(5, 6),
        ),
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Worker(0, 1)),  # a batch script itself: no srun, one process
        (None, {**RANKS, **ARRAY, "SLURM_ARRAY_TASK_ID": "1"}, Worker(5, 8, local=1)),
        (None, {k: "1" for k in ARRAY} | {"SLURM_ARRAY_TASK_ID": "1"}, Worker(0, 1)),
    ],
)
def test_who_a_worker_is(named, environment, worker):
    assert find_worker(named, environment) == worker


@pytest.mark.parametrize(
    ("named", "environment", "says"),
    [
        ("4/4", {}, "--worker 4/4: wanted I/N with I from 0 to N-1"),
        ("1", {}, "--worker 1: wanted I/N"),
        ("-1/2", {}, "wanted I/N"),
        ("0/0", {}, "wanted I/N"),
        (None, {"RANK": "1"}, "WORLD_SIZE = None in the environment: wanted a number"),
        (None, {"RANK": "a", "WORLD_SIZE": "2"}, "RANK = 'a' in the environment"),
        (None, {"RANK": "2", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE say worker 2 of 2: wanted 0 to 1"),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_ID": "2"}, "3 ids from 1 to 7 leave gaps"),
        (None, {"LOCAL_RANK": ""}, "LOCAL_RANK = ''"),
    ],
)
def test_a_worker_that_cannot_be_is_a_typed_error(named, environment, says):
    with pytest.raises(UsageError, match=says):
        find_worker(named, environment)


def test_ranks_of_torchrun_make_workers_of_several():
    assert find_worker(None, TORCHRUN, 2) == Worker(2, 4, local=1, ranks=2, rank=1)
    assert find_worker(None, TORCHRUN, 8) == Worker(0, 1, local=1, ranks=8, rank=5)
    assert find_worker("1/3", TORCHRUN, 8) == Worker(1, 3, local=1, ranks=8, rank=5)
    assert find_worker(None, TORCHRUN) == Worker(5, 8, local=1)


@pytest.mark.parametrize(
    ("named", "environment", "found"),
    [
        (None, {}, "takes 2 processes; start the same command with `torchrun --nproc-per-node 2 -m pipeline"),
        (None, {"RANK": "0", "WORLD_SIZE": "3"}, "takes 2 processes"),  # numbered by hand: nowhere to meet
        (None, {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "3"}, "torchrun started 3 processes, wanted a multiple of 2"),
        ("0/2", {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "4"}, "started 4 processes, wanted 2 with --worker 0/2"),
        ("2/2", {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "2"}, "--worker 2/2: wanted I/N"),
    ],
)
def test_ranks_that_make_no_workers_are_refused(named, environment, found):
    with pytest.raises(UsageError, match=found):
        find_worker(named, environment, 2)


def test_what_all_ranks_find_wrong_one_of_them_says():
    with pytest.raises(SystemExit) as left:
        find_worker(None, {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "3"}, 2)
    assert left.value.code == UsageError.code


def test_the_local_number_chooses_the_gpu(monkeypatch):
    monkeypatch.setattr("stages.cache_hidden.shard_assignment._built_for_gpus", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert Worker(5, 8, local=5).device(None) == Worker(5, 8, local=1).device("cuda") == "cuda:1"
    assert Worker(5, 8).device(None) == "cuda" and Worker(1, 2, local=1).device("cuda:3") == "cuda:3"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # as SLURM shows a task its own GPU only
    assert Worker(1, 2, local=1).device(None) == "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Worker(1, 2, local=1).device(None) == "cpu"
    with pytest.raises(UsageError, match="--device cuda:3: torch sees no CUDA device; use --device cpu"):
        Worker().device("cuda:3")


@pytest.mark.parametrize(("of", "told"), [("cuda", "12.8"), ("hip", "6.4"), ("none", None)])
def test_a_torch_built_for_gpus_is_recognised_by_its_version_file(of, told, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('it takes a second')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    importlib.invalidate_caches()
    assert _built_for_gpus()  # there is no telling
    (tmp_path / "torch" / "version.py").write_text(f"cuda = hip = None\n{of} = {told!r}")
    assert _built_for_gpus() == (told is not None)


@pytest.fixture
def work(tiny_target, tiny_corpus, tmp_path):
    """Return a function that runs a worker on tmp_path/cache, or on `out`."""

    def worked(worker=None, out=tmp_path / "cache"):
        options = CaptureOptions(layers="1,3,4", max_length=256, worker=worker)
        return run(str(tiny_target), str(tiny_corpus), out, options=options)

    return worked


def test_three_workers_make_the_bytes_that_one_makes(work, tiny_cache, tmp_path, capsys):
    shards = len(load_plan(tiny_cache).shards)
    done = [work(worker) for worker in ("1/3", "0/3", "2/3")]

    assert [len(range(at, shards, 3)) for at in (1, 0, 2)] == [one.new_shards for one in done]
    assert [one.left for one in done] == [shards - done[0].new_shards, done[2].new_shards, 0]
    assert f"by worker 1/3, {done[0].left} left to the other workers" in capsys.readouterr().out
    assert contents(tmp_path / "cache") == contents(tiny_cache)
    assert work("1/3").new_shards == 0 and work().new_shards == 0


def test_another_number_of_workers_continues_without_holes_or_duplicates(work, tiny_cache, tmp_path):
    before = work("0/2").new_shards
    between = work("2/5").new_shards
    last = work().new_shards

    assert before + between + last == len(load_plan(tiny_cache).shards) and between and last
    assert contents(tmp_path / "cache") == contents(tiny_cache)


def test_who_waited_for_the_planner_uses_its_plan(work, tiny_cache, tmp_path, monkeypatch):
    """Were both to plan, a large corpus would be tokenised twice, or, from a hub that moved on, differently."""
    out, waiting, held, sleep = tmp_path / "cache", threading.Event(), threading.Event(), time.sleep
    out.mkdir()

    def planner():
        with process_lock(out, "plan"):
            held.set()
            waiting.wait(60)
            for name in ("plan", "cache.json", "index.arrow", "index.json"):
                copy = shutil.copytree if (tiny_cache / name).is_dir() else shutil.copyfile
                copy(tiny_cache / name, out / name)

    other = threading.Thread(target=planner)
    other.start()
    held.wait(60)
    monkeypatch.setattr(time, "sleep", lambda seconds: (waiting.set(), sleep(seconds)))
    monkeypatch.setattr(planning, "make_plan", None)
    work("0/2")
    other.join()

    assert waiting.is_set()
    monkeypatch.undo()
    work()
    assert contents(out) == contents(tiny_cache)


def test_workers_started_at_once_and_killed_at_random_end_with_the_same_bytes():
    """The short version of `python tests/kill_capture.py --kills 60 --workers 3`; two of three have the same share."""
    script = [sys.executable, str(ROOT / "tests/kill_capture.py"), "--kills", "4", "--seed", "5", "--workers", "3"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "4 kills" in done.stdout


def test_a_worker_that_waits_for_another_says_so_and_continues(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(disk, "QUIET_WAIT_S", 0.02)
    inside, go = threading.Event(), threading.Event()

    def first():
        with process_lock(tmp_path, "plan"):
            inside.set()
            go.wait(10)

    holder = threading.Thread(target=first)
    holder.start()
    inside.wait(10)
    threading.Timer(0.2, go.set).start()
    with process_lock(tmp_path, "plan"):
        assert go.is_set()
    holder.join()

    assert f"waiting for another process, which is at the plan in {tmp_path} (it holds tmp-plan.lock" in (
        capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_killed_planner_does_not_block_others(work, tiny_cache, tmp_path):
    (tmp_path / "cache").mkdir()
    child = os.fork()
    if not child:
        with process_lock(tmp_path / "cache", "plan"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "cache/tmp-plan.lock").exists()

    work()

    assert contents(tmp_path / "cache") == contents(tiny_cache)
    assert not list((tmp_path / "cache").glob("tmp-*"))


def test_a_ctrl_c_in_the_clean_up_waits_until_it_is_done(tmp_path, monkeypatch):
    real = disk.shutil.rmtree

    def interrupted(*arguments, **named):
        signal.raise_signal(signal.SIGINT)
        real(*arguments, **named)

    monkeypatch.setattr(disk.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), disk.Scratch(tmp_path, "one") as scratch:
        (scratch.path / "half").write_text("x")
    assert list(tmp_path.iterdir()) == []

    with pytest.raises(KeyboardInterrupt), disk.commit_lock(tmp_path):
        signal.raise_signal(signal.SIGINT)
        (tmp_path / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_stopped_before_its_first_shard_does_not_read_its_corpus_again(work, tmp_path, monkeypatch):
    @contextmanager
    def stopped():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("stages.cache_hidden.capture.capture_shards", interrupt)
            yield

    def interrupt(*arguments, **named):
        raise KeyboardInterrupt

    with stopped():
        work()
    with monkeypatch.context() as patch:
        patch.setattr("stages.cache_hidden.run.file_sources", None)  # what reads it whole
        assert work().new_shards
    assert "capture.log" in all_files(tmp_path / "cache")
