"""Several processes that train one draft: the losses of one process, the bytes of an undisturbed run, one error."""

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from kill_ranks import MEASURED, PATIENCE_S, ROOT, TORCHRUN, RankTrial
from rank_losses import all_combinations, found_on, largest_difference, run_out_of_memory, train
from rewritten_caches import with_most_held_out
from test_train_draft import lines, prepared, take_step

from pipeline.cache import HiddenCache
from pipeline.errors import RoomError, UsageError
from pipeline.runs import checkpoint
from pipeline.runs.recipe import load_recipe, resolve
from pipeline.torchrun import STOP_SIGNALS
from stages.train_draft import ranks as ranks_module
from stages.train_draft.device_fit import fit_device, shards
from stages.train_draft.memory import USABLE, Fit, step_memory
from stages.train_draft.optimizers import make_optimizer
from stages.train_draft.ranks import Ranks, joined, own_device
from stages.train_draft.run import TrainingRun, make_draft, split_for
from stages.train_draft.sharding import sharded_memory
from stages.train_draft.step import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trial(greedy_cache, tmp_path_factory):
    """Runs on two ranks, and one that was left alone."""
    folder = tmp_path_factory.mktemp("ranks")
    cache = with_most_held_out(greedy_cache, folder / "cache")
    return RankTrial(cache, folder, steps=24, seed=0, ranks=2, more=(*MEASURED, "--set", "train.lr=1e-4"))


@pytest.fixture(scope="module")
def alone(trial):
    """The same run of one process."""
    trial.finish("alone", ranks=1)
    return trial.folder / "alone"


def test_the_losses_do_not_depend_on_the_number_of_ranks_nor_on_sharding(tiny_cache, tmp_path):
    """Every method over 50 steps, every objective over a few; `rank_losses.py` takes 50 for all of them."""
    every = all_combinations(2)
    published = [[sets[0], *sets[2:]] for _, sets in every[:: len(every) // 3]]
    domino, common = published[1], [[False, 50, sets] for sets in published]
    twice = [[sharded, *case] for sharded in (False, True) for case in every]
    for sharded in (False, True):
        entries = ("train.dtype=bfloat16", "draft.weighting=dpace", "train.optimizer=adamw")
        twice += [[sharded, 5, [*domino, entry]] for entry in entries]
        twice += [[sharded, 5, [*domino, "train.batch=2", "train.cells=1"]]]  # one cell: other ranks have none
    of_ranks = {
        2: [*common, *twice, [True, 50, [*domino, "train.optimizer=adamw"]], [False, 8, domino, 2]],
        4: [[False, 50, domino], *([sharded, 4, sets] for sharded in (False, True) for sets in published)],
    }
    alone: dict[str, list] = {}
    for ranks, cases in of_ranks.items():
        for case, found in zip(cases, found_on(ranks, tiny_cache, cases, tmp_path), strict=True):
            key = json.dumps(case[1:3])
            wanted = alone.setdefault(key, train(Ranks(CPU), tiny_cache, False, *case[1:3]))
            assert largest_difference([found], [wanted]) < 1e-6, (ranks, case)
            for metrics, other in zip(found[:-1], wanted[:-1], strict=True):
                assert metrics.keys() == other.keys() and metrics["accept_len_tf"] == other["accept_len_tf"], case
                assert metrics["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), case


def test_a_rank_that_is_killed_ends_all_and_torchrun_goes_on_to_the_same_bytes(trial):
    assert trial.kill(1) == []
    assert trial.printed("killed-0").count("error: a process of this run ended without a word") <= 1


def stopped(trial, name: str, ranks: int, step: int, rank: int | None) -> str:
    """What a run printed, of which one rank (None: torchrun, or the only process) was sent SIGTERM after a step."""
    process, before = trial.start(name, ranks=ranks), len(checkpoint.steps(trial.folder / name))
    while process.poll() is None and trial.count(name) < step:
        time.sleep(0.005)
    os.kill(process.pid if rank is None else trial.alive(process)[rank], signal.SIGTERM)
    assert process.wait(PATIENCE_S) != 0
    saved = checkpoint.steps(trial.folder / name)
    assert saved[-1] >= step and (before or len(saved) in (1, 2))
    printed = trial.printed(name)
    trial.log(name).unlink()
    return printed


def test_a_run_goes_on_with_another_number_of_ranks_and_a_signal_to_any_saves_once(trial, alone):
    stopped(trial, "moved", 1, 4, None)
    two, four = stopped(trial, "moved", 2, 9, 1), stopped(trial, "moved", 4, 15, None)
    trial.finish("moved", ranks=1)

    assert "began with ranks 1, now 2: the run goes on" in two and "began with ranks 1, now 4" in four
    for printed in (two, four):
        assert printed.count("stopped at step") == printed.count("stopped by SIGTERM") == 1, printed
    found, wanted = ([line for line in lines(run) if "loss" in line] for run in (trial.folder / "moved", alone))
    for line, other in zip(found, wanted, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert [line[name] for name in ("step", "accept_len_tf")] == [other[name] for name in ("step", "accept_len_tf")]


def test_an_evaluation_shared_out_by_a_sharded_draft_writes_the_line_of_one_rank(trial, alone, monkeypatch):
    again = trial.folder / "again"
    shutil.copytree(alone, again)
    (again / "done.json").unlink()
    written = (again / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert b'"eval"' in written[-1]
    (again / "metrics.jsonl").write_bytes(b"".join(written[:-1]))
    monkeypatch.setattr(trial, "more", (*trial.more, "--shard"))

    trial.finish(again.name)

    for file in ("metrics.jsonl", "done.json"):
        assert (again / file).read_bytes() == (alone / file).read_bytes(), file


# Errors


def ends_with(*arguments, cache="cache$RANK") -> tuple[str, list[str]]:
    """What two ranks print on standard error, each with its own cache or device; and the errors among it."""
    command = f"exec {sys.executable} -m pipeline train-draft --device cpu --cache {cache} {' '.join(arguments)}"
    launcher = [sys.executable, *TORCHRUN, "--nproc-per-node", "2", "--no-python", "sh", "-c", command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1 and time.monotonic() - began < 25, "torchrun would end a rank that hangs after 30 s"
    return done.stderr, [line for line in done.stderr.splitlines() if line.startswith(("error:", "bug:", "[rank"))]


def test_an_error_of_one_rank_ends_all_with_one_line_and_its_code(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cache0").symlink_to(tiny_cache)
    printed, errors = ends_with("--out", "run", "--set", "train.steps=2")
    assert len(errors) == 1 and "cache1" in errors[0], printed
    codes = re.findall(r"exitcode *: (-?[0-9]+)", printed)
    assert len(codes) == 3 and set(codes) == {"2"}, printed  # torchrun's log, and of each rank


def test_ranks_that_see_different_caches_are_refused(monkeypatch):
    ranks = Ranks(CPU)
    monkeypatch.setattr(ranks, "gather", lambda facts: [facts, facts | {"cache": "1b"}])
    ranks.check_same({"recipe": "77"})
    with pytest.raises(UsageError, match="rank 1 has the cache 1b, rank 0 1a; start every rank with the same command"):
        ranks.check_same({"recipe": "77", "cache": "1a"})


def test_a_damaged_checkpoint_is_refused_by_all_ranks_with_one_line(trial):
    shutil.copytree(trial.folder / "straight", trial.folder / "damaged")
    (trial.folder / "damaged" / "done.json").unlink()
    newest = checkpoint.checkpoint_folder(trial.folder / "damaged", 24) / "draft.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"!")
    assert trial.start("damaged").wait(PATIENCE_S) == 1
    errors = [line for line in trial.printed("damaged").splitlines() if line.startswith(("error:", "bug:", "[rank"))]
    assert len(errors) == 1 and "draft.safetensors: damaged" in errors[0]


def test_one_device_for_several_ranks_is_refused():
    with pytest.raises(UsageError, match="--device cpu:0 is one device for several ranks; pass --device cpu"):
        own_device("cpu:0", 1)
    assert own_device("cpu", 1) == CPU


def test_one_process_is_no_group_and_cannot_be_sharded(tiny_cache):
    with joined("cpu", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere"}) as ranks:
        assert type(ranks) is Ranks and ranks.first and ranks.gather(7) == [7]
    store = HiddenCache.open(tiny_cache)
    with pytest.raises(UsageError, match="among several ranks, and there is one; start them with torchrun"):
        shards(True, ranks, store, resolve(load_recipe(None), store))


def test_a_draft_is_sharded_where_a_device_does_not_hold_it_whole(tiny_cache, monkeypatch, capsys):
    store, ranks = HiddenCache.open(tiny_cache), Ranks(CPU)
    resolved = resolve(
        load_recipe(None, ("train.optimizer=adamw", "train.context=64", "train.anchors=8", "train.cell_anchors=12")),
        store,
    )
    draft = make_draft(resolved, store, CPU)
    memory = step_memory(resolved.draft, resolved.recipe.train, torch.float32, tied=False, compiled=False)
    sizes = {"small": memory.peak(memory.smallest) / USABLE + 1, "large": memory.peak(Fit(memory.blocks)) / USABLE + 1}
    ranks.size = 8
    monkeypatch.setattr("stages.train_draft.device_fit.device_bytes", lambda device: int(sizes["large"]))
    assert not shards(None, ranks, store, resolved) and shards(True, ranks, store, resolved)
    monkeypatch.setattr("stages.train_draft.device_fit.device_bytes", lambda device: int(sizes["small"]))
    assert shards(None, ranks, store, resolved) and not shards(False, ranks, store, resolved)

    whole = fit_device(resolved, draft, ranks)
    ranks.sharded = True
    sharded = fit_device(resolved, draft, ranks)

    assert "sharded over 8 ranks (FSDP2)" in capsys.readouterr().out
    assert sharded.at_once >= whole.at_once and whole.moments_on_host and not sharded.moments_on_host
    share = sharded_memory(memory, draft, 8)
    assert memory.static - share.static > memory.moments // 2 and share.peak(Fit(1)) < memory.peak(Fit(1))
    monkeypatch.setattr(ranks, "gather", lambda fit: [fit, [2, True]])
    smallest = fit_device(resolved, draft, ranks)
    assert smallest == Fit(min(2, sharded.at_once), True, *astuple(sharded)[2:]), "what every device has memory for"


def test_sharded_ranks_without_memory_for_a_pass_end_with_a_remedy(tiny_cache):
    draft, loader = prepared(tiny_cache)
    ranks = Ranks(CPU)
    ranks.sharded = True  # the others would wait within the pass
    run_out_of_memory(draft, 2)
    with pytest.raises(RoomError, match=r"rank 0 has no memory for a pass of all blocks .* lower train.context or"):
        take_step(Trainer(draft, make_optimizer("adamw", draft), loader, ranks), 0)


def test_a_batch_with_fewer_cells_than_ranks_is_mentioned(tiny_cache, tmp_path):
    store = HiddenCache.open(tiny_cache)
    resolved = resolve(load_recipe(None, ("train.steps=3",)), store).with_steps(18)
    training = TrainingRun(tmp_path, store, split_for(resolved, store), resolved, make_draft(resolved, store, CPU))
    assert training.idle_ranks() is None
    training.ranks.size = 3
    assert training.idle_ranks().startswith("the next batch has 2 cells for 3 ranks")
    batch = training.loader.sampler.batch
    training.loader.sampler.batch = lambda step: replace(batch(step), cells=batch(step).cells[:1])
    assert training.idle_ranks().startswith("the next batch has 1 cell for 3 ranks")


def test_a_full_disk_under_a_rank_s_output_is_its_exit_code(monkeypatch):
    codes: list[int] = []

    class Started(Ranks):
        def __init__(self, environment):
            super().__init__(CPU)
            self.store = torch.distributed.HashStore()

        def take_device(self, named):
            pass

    def full():
        raise RoomError("standard output: No space left on device")

    monkeypatch.setattr(ranks_module, "ProcessGroup", Started)
    monkeypatch.setattr(ranks_module, "check_standard_output", full)
    monkeypatch.setattr(atexit, "register", lambda leave, code: codes.append(code))
    two = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.raises(RoomError, match="standard output"), joined("cpu", two):
        pass
    for number, handler in before.items():
        signal.signal(number, handler)
    assert codes == [RoomError.code]
