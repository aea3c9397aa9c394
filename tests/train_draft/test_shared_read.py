"""`sweep --shared-read`: several runs from one read of the cache, each with the bytes that it has alone."""

import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_maker import COLUMNS, make_cache, random_samples
from test_logs import check_shares

from pipeline.cache import HiddenCache
from pipeline.drafts import draft_config, fused
from pipeline.errors import DiskError, RoomError
from pipeline.runs import checkpoint
from pipeline.runs.recipe import TrainSection
from pipeline.runs.run_logs import read_log
from pipeline.runs.training_data import split_samples
from stages.train_draft import run as run_module
from stages.train_draft.batches import Sampler
from stages.train_draft.loader import BatchLoader
from stages.train_draft.shared_read import SharedSampler, SharedStates, group_runs, resident_bytes
from stages.train_draft.step import Trainer
from stages.train_draft.sweep import Planned, sweep

BASE = """
[draft]
block_size = 4
[train]
steps = 6
batch = 6
anchors = 6
context = 128
log_every = 1
save_every = 2
keep = 9
[sweep]
"""
# Methods of which one reads final states, and other layers, objectives, rates and numbers of steps and anchors.
GRIDS = {
    "methods": '"draft.method" = ["dflash", "domino", "dspark"]\n',
    "layers": '"draft.method" = ["dflash"]\n"draft.layers" = [[1, 4], [3], [1, 3, 4]]\n',
    "rest": '"draft.method" = ["domino"]\n"draft.objective" = ["ce", "kl"]\n"train.anchors" = [6, 3]\n',
    "echo": '"draft.method" = ["dflash", "dspark"]\n"train.echo" = [2]\n',
}


def contents(folder: Path) -> dict[str, bytes]:
    """What a sweep made, timings and versions aside, which differ from run to run."""
    differ = ("timing.jsonl", "run.json", "sweep.json", "sweep.csv")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in differ)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def without_paths(report: dict) -> str:
    runs = [run | {"seconds": None} for run in report["runs"]]
    return re.sub(r"'[^']*/(\w+-\w+)'", r"\1", str([runs, report["pooled"], report["ratios"]]))


@pytest.fixture
def grid(tmp_path):
    def written(lines: str, base: str = BASE) -> Path:
        (tmp_path / "sweep.toml").write_text(base + lines)
        return tmp_path / "sweep.toml"

    return written


@pytest.fixture
def reads(monkeypatch):
    """Count how often each range of rows is read from a cache while a batch is filled, by its layers."""
    counted, fill = Counter(), HiddenCache.fill

    def counting(self, out, parts, layers):
        counted.update((part, layer) for part in parts for layer in layers)
        fill(self, out, parts, layers)

    monkeypatch.setattr(HiddenCache, "fill", counting)
    return counted


@pytest.mark.parametrize("name", GRIDS)
def test_every_run_has_the_bytes_that_it_has_alone_and_the_cache_is_read_once(
    greedy_cache, tmp_path, grid, name, reads
):
    recipe, mask = grid(GRIDS[name]), ("draft.mask_token_id=260",)
    serial = sweep(greedy_cache, recipe, mask, out=tmp_path / "serial", device="cpu")
    alone = reads.copy()
    reads.clear()
    shared = sweep(greedy_cache, recipe, mask, out=tmp_path / "shared", device="cpu", shared_read=True)

    assert without_paths(shared) == without_paths(serial)
    assert contents(tmp_path / "shared") == contents(tmp_path / "serial")
    for log in (tmp_path / "shared").glob("*/timing.jsonl"):
        check_shares(read_log(log)[-1])
    steps = 6 // (2 if name == "echo" else 1)
    trained = {key: count for key, count in reads.items() if key[1] != "final"}
    assert sum(trained.values()) == steps * 6 * 3, "each batch once: six samples' three layers"
    assert sum(alone.values()) > 1.5 * sum(reads.values())
    assert all(run["accept_len"] >= 1 for run in shared["runs"])


def test_runs_of_different_lengths_share_what_they_have_in_common(tiny_cache, tmp_path, grid, reads):
    recipe = grid('"draft.method" = ["dflash", "dspark"]\n"train.steps" = [2, 5]\n', BASE.replace("steps = 6\n", ""))
    sweep(tiny_cache, recipe, out=tmp_path / "shared", device="cpu", shared_read=True)
    assert sum(count for (_, layer), count in reads.items() if layer != "final") == 5 * 6 * 3
    sweep(tiny_cache, recipe, out=tmp_path / "serial", device="cpu")
    assert contents(tmp_path / "shared") == contents(tmp_path / "serial")


def test_it_is_said_which_runs_share_and_why_others_do_not(tiny_cache, tmp_path, grid, capsys):
    recipe = grid('"train.seed" = [0, 1]\n"train.lr" = [1e-3, 3e-3]\n')
    sweep(tiny_cache, recipe, ("train.steps=1",), tmp_path / "one", "cpu", shared_read=True)
    printed = capsys.readouterr().out
    assert "run 1, run 2 share one read of the cache: layers [1, 3, 4]; their weights and moments take " in printed
    assert printed.count("Two batches are held in memory, about ") == 2
    assert "run 3, run 4 share one read" in printed and "apart from run 1: train.seed = 1, run 1 has 0" in printed
    assert "runs 1, 2 of 4: seed = 0, lr = 0.001; seed = 0, lr = 0.003" in printed
    assert re.search(r"^run 2: step 1/1  loss .* tokens/s .* data wait .* peak memory ", printed, re.M)

    recipe = grid('"train.batch" = [2, 3]\n', BASE.replace("batch = 6\n", ""))
    sweep(tiny_cache, recipe, ("train.steps=1",), tmp_path / "two", "cpu", shared_read=True)
    assert "run 2 reads alone: train.batch = 3, run 1 has 2" in capsys.readouterr().out


def test_as_many_runs_share_as_there_is_room_for_and_devices_leave(tiny_cache, tmp_path, grid):
    recipe = grid('"draft.method" = ["dflash"]\n"train.lr" = [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]\n')
    runs = list(Planned(tiny_cache, recipe, out=tmp_path).runs.values())
    size = resident_bytes(runs[0].resolved)
    assert size == 12 * 24_832, "as its first line says"
    sizes = {
        (room, most): [len(group) for group in group_runs(runs, room, most)]
        for room, most in [(10 * size, 9), (2 * size, 9), (size - 1, 9), (10 * size, 3)]
    }
    assert sizes == {
        (10 * size, 9): [5], (2 * size, 9): [2, 2, 1], (size - 1, 9): [1] * 5, (10 * size, 3): [3, 2],
    }  # fmt: skip


def test_a_run_that_diverges_leaves_the_group_and_the_others_go_on(tiny_cache, tmp_path, grid):
    recipe = grid('"draft.method" = ["dflash"]\n"train.lr" = [1e-3, 1e30, 3e-3]\n')
    serial = sweep(tiny_cache, recipe, out=tmp_path / "serial", device="cpu")
    shared = sweep(tiny_cache, recipe, out=tmp_path / "shared", device="cpu", shared_read=True)
    assert without_paths(shared) == without_paths(serial)
    assert [run["failed"] is not None for run in shared["runs"]].count(True) == 1
    assert contents(tmp_path / "shared") == contents(tmp_path / "serial")


def test_an_error_of_one_run_is_recorded_and_the_others_are_done(tiny_cache, tmp_path, grid, monkeypatch):
    recipe, step = grid('"draft.method" = ["dflash", "domino"]\n'), Trainer.step

    def small(trainer, batch, cells):
        if batch.step == 3 and trainer.draft.config.method == "dflash":
            raise RoomError("no memory")
        return step(trainer, batch, cells)

    monkeypatch.setattr(Trainer, "step", small)
    report = sweep(tiny_cache, recipe, out=tmp_path / "runs", device="cpu", shared_read=True)
    assert {run["setting"]["draft.method"]: run["failed"] for run in report["runs"]} == {
        "dflash": "no memory",
        "domino": None,
    }
    assert [path.parent.name.split("-")[0] for path in (tmp_path / "runs").glob("*/done.json")] == ["domino"]


def test_each_run_of_a_group_keeps_the_kernels_that_were_chosen_for_it(tiny_cache, tmp_path, grid, monkeypatch):
    recipe, step, seen = grid('"draft.method" = ["domino", "dflash"]\n'), Trainer.step, set()
    elsewhere = fused.Kernels(device_type="elsewhere")  # used by nothing here

    def chosen(draft, train):
        fused.use_kernels(elsewhere if draft.config.method == "domino" else None)
        return "chosen"

    def noting(trainer, batch, cells):
        seen.add((trainer.draft.config.method, fused.kernels))
        return step(trainer, batch, cells)

    monkeypatch.setattr(run_module, "kernels_of", lambda device: "compiled")
    monkeypatch.setattr(run_module, "compile_if_equal", chosen)
    monkeypatch.setattr(Trainer, "step", noting)
    try:
        sweep(tiny_cache, recipe, out=tmp_path / "runs", device="cpu", shared_read=True)
    finally:
        fused.use_kernels(None)
    assert seen == {("domino", elsewhere), ("dflash", None)}


class Killed(BaseException):
    """Stands for a kill that leaves the process no time for anything."""


def kill():
    raise Killed


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("how", "raised"), [(kill, Killed), (interrupt, KeyboardInterrupt)])
def test_a_group_that_is_stopped_anywhere_goes_on_to_the_same_bytes(
    tiny_cache, tmp_path, grid, monkeypatch, how, raised, capsys
):
    recipe, step = grid('"draft.method" = ["dflash", "domino", "dspark"]\n'), Trainer.step
    undisturbed = sweep(tiny_cache, recipe, out=tmp_path / "undisturbed", device="cpu")

    def stopped(trainer, batch, cells):
        metrics = step(trainer, batch, cells)
        if batch.step == 3 and trainer.draft.config.method == "domino":  # the first has taken its step, the third not
            how()
        return metrics

    with monkeypatch.context() as patch, pytest.raises(raised):
        patch.setattr(Trainer, "step", stopped)
        sweep(tiny_cache, recipe, out=tmp_path / "shared", device="cpu", shared_read=True)
    saved = {run.name.split("-")[0]: checkpoint.steps(run)[-1] for run in (tmp_path / "shared").glob("*-*")}
    killed = {"dflash": 4, "domino": 2, "dspark": 2}
    assert saved == (killed if how is kill else {"dflash": 4, "domino": 4, "dspark": 3})
    capsys.readouterr()

    went_on = sweep(tiny_cache, recipe, out=tmp_path / "shared", device="cpu", shared_read=True)
    assert "run 3: alone up to step 4, where another run is" in capsys.readouterr().out
    assert without_paths(went_on) == without_paths(undisturbed)
    for run in (tmp_path / "shared").glob("*-*"):
        for odd in run.glob("checkpoints/step-0000000[135]"):  # saved because it was stopped
            for file in odd.iterdir():
                file.unlink()
            odd.rmdir()
    assert contents(tmp_path / "shared") == contents(tmp_path / "undisturbed")


def test_a_stop_while_runs_catch_up_saves_every_one_and_one_that_cannot_be_saved_keeps_no_other_from_it(
    tiny_cache, tmp_path, grid, monkeypatch, capsys
):
    recipe, step, save = grid('"draft.method" = ["dflash", "domino", "dspark"]\n'), Trainer.step, checkpoint.save

    def stop_at(method: str, at: int, unsaved: str = "", raises=KeyboardInterrupt) -> dict[str, list[int]]:
        def stopped(trainer, batch, cells):
            metrics = step(trainer, batch, cells)
            if batch.step == at and trainer.draft.config.method == method:
                interrupt()
            return metrics

        def full(run, *arguments):
            if run.name.startswith(unsaved or "none"):
                raise DiskError("the disk is full")
            return save(run, *arguments)

        with monkeypatch.context() as patch, pytest.raises(raises):
            patch.setattr(Trainer, "step", stopped)
            patch.setattr(checkpoint, "save", full)
            sets = ("train.save_every=6", "train.eval_every=6")
            sweep(tiny_cache, recipe, sets, tmp_path / "shared", "cpu", shared_read=True)
        return {run.name.split("-")[0]: checkpoint.steps(run) for run in (tmp_path / "shared").glob("*-*")}

    assert stop_at("dflash", 2) == {"dflash": [3], "domino": [2], "dspark": [2]}
    assert stop_at("dspark", 2) == {"dflash": [3], "domino": [2, 3], "dspark": [2, 3]}, "they were alone up to step 3"
    assert stop_at("dspark", 3, unsaved="dflash") == {"dflash": [3], "domino": [2, 3, 4], "dspark": [2, 3, 4]}
    assert "run 1: failed: the disk is full" in capsys.readouterr().out
    found = stop_at("dspark", 4, unsaved="dspark", raises=DiskError)  # that the disk is full is what has to be heard
    assert found == {"dflash": [3, 5], "domino": [2, 3, 4, 5], "dspark": [2, 3, 4]}, (
        "the others are saved where they are"
    )


# The states

SIZES = {
    "hidden_size": 8, "vocab_size": 1100, "rope_theta": 1e4, "shift_label": False, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 8, "block_size": 4,
    "mask_token_id": 1001, "num_target_layers": 12, "max_position_embeddings": 4096, "method": "dflash",
}  # fmt: skip


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_states_are_those_that_a_run_reads_itself_however_it_packs_them(tmp_path, codec):
    columns = [replace(spec, codec=codec) for spec in COLUMNS]
    store = HiddenCache.open(make_cache(tmp_path / "cache", random_samples(20), columns))
    split = split_samples(store, 1001, 0.05, (1, 10), final=True)
    train = TrainSection(batch=6, context=300, anchors=5, cell_anchors=50)
    packed = [train, train.model_copy(update={"cells": 6}), train.model_copy(update={"cells": 5})]
    drafts = [((1, 10), "kl"), ((10,), "ce"), ((1, 10), "ce")]
    samplers = [
        Sampler(store, split, draft_config(**SIZES, target_layer_ids=layers, objective=objective), train)
        for (layers, objective), train in zip(drafts, packed, strict=True)
    ]
    keep = codec != "raw"
    shared = BatchLoader(SharedSampler(samplers), keep, layers=(1, 10))
    assert shared.sampler.read is samplers[0], "the one whose loss reads final states"
    otherwise = 0
    for step in range(8):
        batch = shared.sampler.batch(step)
        states = SharedStates((1, 10), batch, list(shared.read_all(batch)))
        for sampler, own in zip(samplers, batch.of_runs, strict=True):
            otherwise += [len(of) for of in own.windows] != [len(of) for of in batch.windows]
            wanted = BatchLoader(sampler).read_all(sampler.batch(step))
            for cell, windows, right in zip(own.cells, own.windows, wanted, strict=True):
                found = states.fill(cell, windows, sampler.config.target_layer_ids).to("cpu")
                assert torch.equal(found.aux_KRD.view(torch.int16), right.aux_KRD.view(torch.int16))
                assert (found.final_FD is None) == (right.final_FD is None)
                if right.final_FD is not None:
                    assert torch.equal(found.final_FD.view(torch.int16), right.final_FD.view(torch.int16))
                assert found.names == right.names and torch.equal(found.pos_R, right.pos_R)
    assert otherwise, "runs pack the same samples otherwise, too"
