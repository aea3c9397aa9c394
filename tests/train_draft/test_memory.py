"""A step's memory, known before anything is loaded: beside what a step allocates, and what a run makes of it."""

import gc
import json
import re
from dataclasses import replace

import pytest
import torch
from test_train_draft import Killed, kill, lines, stopping, trained

from pipeline.cache import HiddenCache
from pipeline.cli import commands
from pipeline.drafts import DRAFTS, fused, lay_blocks, pack
from pipeline.runs import checkpoint
from pipeline.runs.recipe import load_recipe, resolve
from stages.train_draft.memory import USABLE, Fit, LiveBytes, StepMemory, memory_lines, step_memory
from stages.train_draft.optimizers import make_optimizer
from stages.train_draft.run import make_draft

MIB = 1 << 20


@pytest.mark.parametrize("method", DRAFTS)
def test_a_fake_step_has_the_bytes_of_a_real_one(tiny_cache, method):
    store = HiddenCache.open(tiny_cache)
    sets = (f"draft.method={method}", "train.context=128", "train.anchors=8", "train.cell_anchors=8")
    resolved = resolve(load_recipe(None, (*sets, "train.optimizer=adamw")), store)
    found = step_memory(resolved.draft, resolved.recipe.train, torch.float32, tied=store.head().tied)

    draft = make_draft(resolved, store, torch.device("cpu"))
    sample = store.read(0, layers=resolved.draft.target_layer_ids, final=resolved.draft.needs_final_states)
    cell = pack([sample], ["s"], final=resolved.draft.needs_final_states)
    blocks = lay_blocks(cell, torch.linspace(len(sample.ids) // 2, len(sample.ids) - 2, 8).long(), resolved.draft)
    with LiveBytes() as memory:
        for tensor in (*draft.parameters(), draft.target.embed_VD, draft.target.head_VD):
            memory.note(tensor)
        optimizer = make_optimizer("adamw", draft)
        static = memory.live
        ahead = [states.clone() for states in (cell.aux_KRD, cell.final_FD) if states is not None]  # as the next cell
        for _ in range(2):
            memory.peak = memory.live
            draft.loss(cell, blocks, {"lambda_base": 0.5}, draft.denominators(blocks), True).total.backward()
            gc.collect()
        optimizer.step(1e-3)
    assert ahead

    assert found.parameters == sum(weight.numel() for weight in draft.parameters())
    assert abs(found.static / static - 1) < 0.02
    assert abs(found.peak(Fit(8)) / memory.peak - 1) < 0.15


def test_a_device_computes_a_step_whole_or_in_parts_or_with_its_moments_on_the_host():
    memory = StepMemory(100, 1000, 500, {1: 2000, 5: 2400, 9: 4000})
    assert (memory.gradients, memory.blocks) == (400, 9)
    assert [memory.peak(Fit(count)) for count in (1, 3, 5, 7, 9)] == [2000, 2200, 2400, 3200, 4000]
    assert memory.peak(Fit(7, True)) == 2700

    def fit(live: int, moments: int = 500) -> Fit:
        return replace(memory, moments=moments).fit(int(live / USABLE) + 1)

    assert [fit(live) for live in (4000, 3999, 3200, 2200)] == [Fit(9), Fit(8), Fit(7), Fit(3)]
    assert [fit(live) for live in (2100, 2000, 1500)] == [Fit(5, True), Fit(5, True), Fit(1, True)]
    assert fit(1400).at_once == 0 and fit(2100, moments=0) == Fit(2) and fit(1900, moments=0) == Fit(0)


def test_what_costs_least_is_done_first_and_the_embedding_moves_before_anything_slower():
    memory = StepMemory(100, 1000, 500, {1: 2000, 5: 2400, 9: 4000}, 50, lambda: {1: 1900, 5: 2000, 9: 2200})

    def fit(live: int) -> Fit:
        return memory.fit(int(live / USABLE) + 1)

    assert fit(4000) == Fit(9) and fit(3950) == Fit(9, embedding_on_host=True)
    assert fit(2400) == Fit(5) and fit(2350) == Fit(5, embedding_on_host=True)
    assert fit(2200) == Fit(9, recomputes_layers=True)
    assert fit(2150) == Fit(9, recomputes_layers=True, embedding_on_host=True)
    assert fit(1950) == Fit(3, recomputes_layers=True)
    assert fit(1925) == Fit(4, recomputes_layers=True, embedding_on_host=True)
    assert fit(1860) == Fit(5, moments_on_host=True, embedding_on_host=True)
    assert fit(1350) == memory.smallest == Fit(1, True, True, True) and fit(1340).at_once == 0
    assert Fit(9).over([Fit(4, True), Fit(5, False, True)]) == Fit(4, True, True)


def test_a_run_computes_what_its_device_holds_and_says_so(tiny_cache, tmp_path, monkeypatch, capsys):
    sets = ("train.cell_anchors=12", "train.eval_every=100")
    whole = trained(tiny_cache, tmp_path / "whole", *sets)
    store = HiddenCache.open(tiny_cache)
    resolved = resolve(load_recipe(whole.run / "recipe.toml"), store)
    head = store.head()
    memory = step_memory(resolved.draft, resolved.recipe.train, torch.float32, head.tied, compiled=False)
    size = int(memory.peak(Fit(5, recomputes_layers=True)) / USABLE) + 1
    monkeypatch.setattr("stages.train_draft.device_fit.device_bytes", lambda device: size)
    capsys.readouterr()

    parts = trained(tiny_cache, tmp_path / "parts", *sets)

    printed = " ".join(capsys.readouterr().out.split())
    means = "computes it in 3 parts, its layers again for their gradient, with"
    assert re.search(rf"a step of 3,072 rows and 12 blocks needs .* {means} .*: the same loss", printed)
    state = checkpoint.latest(parts.run).state
    assert state.blocks_per_pass == 5 and state.recomputes_layers and not state.moments_on_host
    found, wanted = ([line["loss"] for line in lines(run) if "loss" in line] for run in (parts.run, whole.run))
    assert found == pytest.approx(wanted, rel=1e-4) and len(found) == 8


@pytest.mark.parametrize("method", ["dflash", "domino", "dspark"])
def test_compiled_kernels_take_less_memory(tiny_cache, method):
    sets = (f"draft.method={method}", "train.cell_anchors=64", "train.anchors=64", "train.dtype=bfloat16")
    resolved = resolve(load_recipe(None, sets), HiddenCache.open(tiny_cache))
    plain, compiled = (
        step_memory(resolved.draft, resolved.recipe.train, torch.bfloat16, tied=True, compiled=compiled)
        for compiled in (False, True)
    )
    assert compiled.static == plain.static and fused.kernels is None
    assert compiled.peak(Fit(64)) - compiled.static < 0.9 * (plain.peak(Fit(64)) - plain.static)


def test_whatever_is_done_for_want_of_memory_makes_the_same_steps_and_checkpoints(tiny_cache, tmp_path, monkeypatch):
    """And a run that goes on where there is more memory does it, too."""
    sets = ("train.cell_anchors=12", "train.eval_every=100", "train.optimizer=adamw", "train.save_every=3")
    whole = trained(tiny_cache, tmp_path / "whole", *sets)
    monkeypatch.setattr("stages.train_draft.run.fit_device", lambda *_: Fit(12, True, True, True))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stopping(patch, 5, kill)
        trained(tiny_cache, tmp_path / "host", *sets)
    monkeypatch.setattr("stages.train_draft.run.fit_device", lambda *_: Fit(12))
    on_host = trained(tiny_cache, tmp_path / "host", *sets)
    state = checkpoint.latest(on_host.run).state
    assert state.moments_on_host and state.recomputes_layers and state.embedding_on_host
    assert "recomputes_layers" not in checkpoint.latest(whole.run).state.as_dict()
    for name in ("draft.safetensors", "optimizer.safetensors"):
        found, wanted = (run.run / "checkpoints/step-00000008" / name for run in (on_host, whole))
        assert found.read_bytes() == wanted.read_bytes(), name


def test_a_device_for_which_nothing_fits_is_named_and_tried_with_one_block(tiny_cache):
    store = HiddenCache.open(tiny_cache)
    resolved = resolve(load_recipe(None, ("train.cell_anchors=12", "train.anchors=8")), store)
    memory = step_memory(resolved.draft, resolved.recipe.train, torch.float32, tied=True)
    assert memory.fit(80 << 30) == Fit(12) and memory_lines(memory, 64, 80 << 30)[-1] == "it fits a device of 80.0 GiB"
    assert memory.fit(MIB).at_once == 0
    assert re.search("IT DOES NOT FIT a device of 1.0 MiB: .*lower train.context", memory_lines(memory, 64, MIB)[-1])


def planned(tiny_target, tiny_corpus, out, *more) -> object:
    arguments = ["plan", "--model", tiny_target, "--corpus", tiny_corpus, "--out", out, *more]
    from click.testing import CliRunner

    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def test_plan_says_what_of_a_training_fits(tiny_target, tiny_corpus, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[draft]\nmethod = "domino"\n[train]\nanchors = 64\n')
    training = ("--train", recipe, "--device-memory", "36MiB")
    found = json.loads(planned(tiny_target, tiny_corpus, tmp_path / "cache", *training, "--json").stdout)["training"]
    assert 0 < found["at_once"] < found["blocks"] == 512, found
    assert found["static_bytes"] + found["gradient_bytes"] < found["step_bytes"]
    assert found["moments_on_host"] in (True, False)
    assert found["device_bytes"] == 36 * MIB < found["step_bytes"]
    shown = " ".join(planned(tiny_target, tiny_corpus, tmp_path / "cache", *training).stdout.replace("│", " ").split())
    assert "training" in shown and "a device of 36.0 MiB computes it in" in shown


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--train", "nothing.toml"), "no recipe at nothing.toml"),
        (("--train", "configs/demo.toml", "--device-memory", "much"), "--device-memory much: wanted a size"),
    ],
)
def test_a_training_that_cannot_be_planned_is_refused(tiny_target, tiny_corpus, tmp_path, more, said):
    ended = planned(tiny_target, tiny_corpus, tmp_path / "cache", *more)
    assert ended.exit_code and said in f"{ended.exception} {ended.output}"
