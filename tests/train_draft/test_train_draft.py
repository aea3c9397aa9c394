"""`train-draft`: from a cache alone, exact whatever is killed when, and refusing what cannot be right."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_train import Trial
from rewritten_caches import rewrite

from pipeline.cache import HiddenCache
from pipeline.cache.samples import PlannedSample
from pipeline.cli import commands
from pipeline.drafts import DRAFTS, lay_blocks
from pipeline.drafts import block_draft as draft_module
from pipeline.errors import CacheError, DataError, ProofError, RoomError, UsageError
from pipeline.json_files import parse_checksummed, record_bytes
from pipeline.published.init_from import InitialDraft
from pipeline.runs import checkpoint
from pipeline.runs import folder as run_folder
from pipeline.runs.folder import Evaluation
from pipeline.runs.recipe import load_recipe, resolve
from pipeline.runs.training_data import prompt_hash, split_by_prompt, split_samples, stratified_subset
from pipeline.target.head import NEWEST
from stages.recode.run import run as recode
from stages.train_draft.batches import Sampler
from stages.train_draft.loader import BatchLoader, Prefetcher
from stages.train_draft.logs import evaluation_text, run_description
from stages.train_draft.optimizers import hidden_matrices, load_state_tensors, make_optimizer, state_tensors
from stages.train_draft.run import make_draft, run, split_for
from stages.train_draft.step import Trainer

SMALL = ("train.batch=4", "train.anchors=6", "train.log_every=1", "draft.block_size=4", "train.steps=8")
CPU = torch.device("cpu")

# Every method as published; soft targets that read one distance to the teacher, two, or pull both kinds of logits.
METHODS = [(f"draft.method={method}",) for method in DRAFTS]
GATED = ("draft.method=dspark", "draft.markov_head_type=gated")
REDUCED = ("draft.method=dspark", "draft.vocabulary=32")  # as many ids as the layers are wide
SOFT = [
    ("draft.method=dflash", "draft.objective=kl"),
    ("draft.method=domino", "draft.objective=lk-hybrid"),
    ("draft.method=domino", "draft.objective=dspark", "draft.weighting=dpace"),
    ("draft.method=dspark", "draft.markov_head_type=rnn", "draft.confidence_head_with_markov=true"),
]


def named(sets) -> str:
    """What a test of these fields is called."""
    return " ".join(entry.partition("=")[2] for entry in sets)


every_loss = pytest.mark.parametrize("sets", [*METHODS, *SOFT], ids=named)


def trained(cache, out, *sets, method="domino"):
    return run(cache, None, (*SMALL, f"draft.method={method}", *sets), out, "cpu")


def lines(run_folder) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def prepared(cache, *sets):
    """A fresh draft and its stream, as a run makes them."""
    store = HiddenCache.open(cache)
    resolved = resolve(load_recipe(None, (*SMALL, *sets)), store)
    corpus = split_samples(store, resolved.draft.mask_token_id, resolved.recipe.train.heldout)
    resolved = resolved.with_steps(len(corpus.train))
    loader = BatchLoader(Sampler(store, corpus, resolved.draft, resolved.recipe.train))
    supervised = (ids[mask] for ids, mask in map(store.tokens_of, map(int, corpus.train)))
    return make_draft(resolved, store, CPU, samples=supervised), loader


def take_step(trainer: Trainer, number: int) -> dict | None:
    """Train on the batch of a step, read as it is needed."""
    batch = trainer.loader.sampler.batch(number)
    return trainer.step(batch, trainer.loader.read_all(batch))


def add_gradients(draft, loader, cells, blocks, lambda_base: float, metrics: bool = False):
    trainer = Trainer(draft, make_optimizer("adamw", draft), loader)
    return trainer.add_gradients(cells, blocks, {"lambda_base": lambda_base}, metrics)


def gradients(draft) -> dict:
    return {name: weight.grad.clone() for name, weight in draft.named_parameters() if weight.grad is not None}


def unused_token(cache) -> int:
    store = HiddenCache.open(cache)
    used = np.concatenate([store.tokens_of(i)[0] for i in range(len(store))])
    return int(np.setdiff1d(np.arange(200, 264), [*used, 256, 258])[0])


# The rate and the optimiser


@pytest.mark.parametrize("sets", [*METHODS, GATED, REDUCED, SOFT[3]], ids=named)
def test_muon_moves_the_matrices_of_the_layers_and_adamw_the_rest(tiny_cache, sets):
    # At lambda 1 the correction has no gradient yet.
    sets = [*sets, *["draft.lambda_start=0.5"] * ("draft.method=domino" in sets)]

    def moved(kind):
        draft, loader = prepared(tiny_cache, *sets)
        before = {name: weight.detach().clone() for name, weight in draft.named_parameters()}
        optimizer = make_optimizer(kind, draft)
        take_step(Trainer(draft, optimizer, loader), 0)
        return draft, {name: weight.detach() - before[name] for name, weight in draft.named_parameters()}

    draft, by_muon = moved("muon")
    _, by_adamw = moved("adamw")
    named = hidden_matrices(draft)

    assert {name for name in by_muon if not torch.equal(by_muon[name], by_adamw[name])} == named
    assert {"fc.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight"} <= named
    # "layers.0.input_layernorm.weight" is no matrix; a correction's output is a vocabulary, a table's input one, too;
    # confidence is one number; a GRU's weights, and the Markov head's of that kind, are three matrices in one.
    others = ("norm", "gru", "embed_proj.2", "markov_w", "confidence", "joint_proj")
    assert not any(other in name for name in named for other in others)
    assert ("markov_head.gate_proj.weight" in named) == (GATED[1] in sets)
    for name in named:  # torch's AdamW moves by signs, Muon along each direction that the gradient has, alike
        left, sizes, right = torch.linalg.svd(draft.get_parameter(name).grad, full_matrices=False)
        seen = sizes > 0.01 * sizes.norm()
        along = torch.diagonal(left.T @ by_muon[name] @ right.T)[seen]
        assert along.max() < 0 and along.min() > 2 * along.max(), f"{name}: {along}"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_optimizer_makes_the_same_step_to_the_bit(tiny_cache, kind):
    def made():
        draft, loader = prepared(tiny_cache)
        optimizer = make_optimizer(kind, draft)
        return draft, Trainer(draft, optimizer, loader)

    straight, trainer = made()
    for step in range(4):
        take_step(trainer, step)
    stopped, trainer = made()
    for step in range(2):
        take_step(trainer, step)
    again = make_optimizer(kind, stopped)
    saved = {name: tensor.clone() for name, tensor in state_tensors(trainer.optimizer).items()}
    load_state_tensors(again, saved, step=2)
    for step in (2, 3):
        take_step(Trainer(stopped, again, trainer.loader), step)

    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), stopped.parameters(), strict=True))


# Which samples


def test_all_answers_to_a_prompt_stay_together():
    mask = np.array([0, 0, 1, 1], bool)
    ask, other = np.array([5, 6, 7, 8], np.int32), np.array([5, 6, 1, 2], np.int32)

    assert prompt_hash(ask, mask) == prompt_hash(other, mask)
    assert prompt_hash(ask, mask) != prompt_hash(ask + 1, mask)
    assert prompt_hash(ask, ~mask) != prompt_hash(other, ~mask), "without a prompt a sample is its own"


def test_about_the_share_of_prompts_is_held_out_and_more_samples_move_none():
    prompts = np.random.default_rng(0).integers(0, 2**64, 4000, dtype=np.uint64)
    everyone = np.ones(4000, bool)

    held = split_by_prompt(prompts, everyone, 0.05)
    of_some = split_by_prompt(prompts[:3000], everyone[:3000], 0.05)

    assert 0.04 < held.mean() < 0.06
    assert (held[:3000] == of_some).all()
    assert not split_by_prompt(prompts, everyone, 0.0).any()
    assert split_by_prompt(prompts[:2], everyone[:2], 0.05).sum() == 1, "two prompts: one to train on, one to measure"
    assert not split_by_prompt(prompts[:1], everyone[:1], 0.05).any()


def test_the_corpus_says_what_is_held_out(tiny_cache):
    store = HiddenCache.open(tiny_cache)

    corpus = split_samples(store, 259, 0.5)

    assert [store.samples.split[i] for i in corpus.heldout] == ["heldout"] * len(corpus.heldout)
    assert {store.samples.split[i] for i in corpus.train} == {"train"}
    assert len(corpus.train) + len(corpus.heldout) + corpus.unusable == len(store)


def test_where_the_corpus_does_not_say_prompts_are_held_out_by_hash(tiny_cache, tmp_path):
    def unsaid(index, sample):
        return PlannedSample(sample.ids, sample.mask, sample.domain)

    corpus = split_samples(HiddenCache.open(rewrite(tiny_cache, tmp_path / "cache", samples=unsaid)), 259, 0.3)

    assert 0 < len(corpus.heldout) < len(corpus.train)


def test_measured_samples_are_spread_over_domains(tiny_cache):
    store = HiddenCache.open(tiny_cache)
    chosen = stratified_subset(store, np.arange(len(store)), 6)

    assert sorted(store.samples.domain[i] for i in chosen) == sorted(["colours", "numbers", "places"] * 2)
    assert len(stratified_subset(store, np.arange(len(store)), 1000)) == len(store)


def test_a_mask_token_that_the_corpus_uses_is_refused(tiny_cache):
    store = HiddenCache.open(tiny_cache)
    used = int(store.tokens_of(0)[0][0])

    with pytest.raises(UsageError, match=f"mask token {used} occurs in sample .* set draft.mask_token_id"):
        split_samples(store, used, 0.05)


def test_an_evaluation_of_samples_without_a_domain_names_none():
    of = {"prompts": 1, "calls": 3, "accept_len": 1.5, "interval": [1.0, 2.0], "per_slot": [0.5]}
    unnamed, named = Evaluation(**of, domains={"": of}), Evaluation(**of, domains={"": of, "sql": of})
    assert evaluation_text(unnamed) == "accept length 1.50 [1.00, 2.00] on held-out samples"
    assert evaluation_text(named).endswith("on held-out samples (sql 1.50)")


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
@pytest.mark.parametrize("name", ["run.json", "done.json"])
def test_a_damaged_record_of_a_run_is_named(tiny_cache, tmp_path, name, text):
    from pipeline.published.card import provenance

    done = trained(tiny_cache, tmp_path / "run", "train.steps=1")
    (done.run / name).write_text(text)
    with pytest.raises(CacheError, match=rf"{name}: damaged.*; (put it back|remove it)"):
        trained(tiny_cache, tmp_path / "run", "train.steps=1")
    if name == "run.json":
        with pytest.raises(CacheError, match=r"run\.json: damaged"):
            provenance(done.run)


@pytest.mark.parametrize("taken", ["config.json", "cache.json"])
def test_no_run_begins_in_a_folder_that_is_something_else(tiny_cache, tmp_path, taken):
    (tmp_path / taken).write_text("{}")
    with pytest.raises(UsageError, match=rf"holds a .* \({taken}\), and a run in it would hide it; pass another --out"):
        trained(tiny_cache, tmp_path)


def test_a_draft_that_memory_does_not_hold_is_refused(tiny_cache, tmp_path):
    with pytest.raises(RoomError, match=r"no memory on the device for the draft .* make its sizes in \[draft\] "):
        trained(tiny_cache, tmp_path / "run", f"draft.intermediate_size={10**14}")


def test_a_corpus_that_holds_everything_out_cannot_train(tiny_cache, tmp_path):
    def held(index, sample):
        return PlannedSample(sample.ids, sample.mask, sample.domain, "heldout")

    said = r"none of (\d+) samples can train a draft: (\1) are held out .* --append"
    with pytest.raises(DataError, match=said):
        split_samples(HiddenCache.open(rewrite(tiny_cache, tmp_path / "cache", samples=held)), 259, 0.05)


# Batches and their loss


def test_a_batch_is_the_same_whenever_it_is_made(tiny_cache):
    _, loader = prepared(tiny_cache)
    _, other = prepared(tiny_cache)

    for step, (batch, cells) in enumerate(Prefetcher(loader, 3, 8), 3):
        again = other.sampler.batch(step)
        assert again.names == batch.names
        for cell, cell2 in zip(cells, other.read_all(again), strict=True):
            assert torch.equal(cell.aux_KRD, cell2.aux_KRD)
        for blocks, blocks2 in zip(batch.blocks, again.blocks, strict=True):
            assert torch.equal(blocks.anchors_N, blocks2.anchors_N)


def test_every_sample_comes_once_an_epoch_with_fresh_anchors(tiny_cache):
    _, loader = prepared(tiny_cache, "train.batch=1", "train.anchors=3")
    sampler = loader.sampler
    epochs = [[sampler.batch(epoch * sampler.per_epoch + at) for at in range(sampler.per_epoch)] for epoch in (0, 1)]
    names = [[batch.names[0] for batch in epoch] for epoch in epochs]

    assert len(set(names[0])) == sampler.per_epoch == len(sampler.indices)
    assert sorted(names[0]) == sorted(names[1]) and names[0] != names[1]
    anchors = [{batch.names[0]: batch.blocks[0].anchors_N.tolist() for batch in epoch} for epoch in epochs]
    assert anchors[0] != anchors[1]


def test_a_long_sample_gives_a_window_with_true_positions(tiny_cache):
    _, loader = prepared(tiny_cache, "train.context=24", "train.batch=1")
    store = loader.cache
    for step in range(loader.sampler.per_epoch):
        batch = loader.sampler.batch(step)
        cell, blocks = loader.read(batch, 0), batch.blocks[0]
        index = next(i for i in range(len(store)) if store.samples.hex(i) == batch.names[0])
        whole = store.read(index, layers=loader.sampler.config.target_layer_ids)
        assert len(cell.ids_R) <= 24
        assert torch.equal(cell.ids_R, whole.ids[cell.pos_R])
        assert torch.equal(cell.aux_KRD, whole.aux[:, cell.pos_R])
        assert (whole.mask[cell.pos_R[blocks.anchors_N]] & whole.mask[cell.pos_R[blocks.anchors_N] + 1]).all()


@every_loss
def test_the_loss_and_its_gradient_do_not_depend_on_how_a_batch_is_cut(tiny_cache, sets):
    found = []
    for cut in ((), ("train.cells=3",), ("train.context=128",), ("train.cell_anchors=12",)):
        draft, loader = prepared(tiny_cache, "train.batch=8", *sets, *cut)
        batch = loader.sampler.batch(0)
        shares = add_gradients(draft, loader, loader.read_all(batch), batch.blocks, 0.4, metrics=True)
        found.append((len(batch.cells), shares, gradients(draft)))

    (_, whole, gradient), *others = found
    assert found[0][0] == 1 and all(count > 1 for count, _, _ in others)
    for _, shares, other in others:
        assert float(shares.total) == pytest.approx(float(whole.total), rel=1e-6)
        assert shares.terms.keys() == shares.dens.keys() == whole.terms.keys()
        for name in whole.terms:
            assert float(shares.dens[name]) == pytest.approx(float(whole.dens[name]), rel=1e-9)
            assert float(shares.terms[name]) == pytest.approx(float(whole.terms[name]), rel=1e-6)
        assert torch.equal(shares.sums["scored_S"], whole.sums["scored_S"])
        for name, expected in gradient.items():
            torch.testing.assert_close(other[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["domino", "dspark"])
def test_fifty_steps_do_not_depend_on_how_batches_are_cut(tiny_cache, method):
    recipe = (f"draft.method={method}", "train.steps=50", "train.lr=1e-4", "train.batch=8")

    def losses(*sets):
        draft, loader = prepared(tiny_cache, *recipe, *sets)
        trainer = Trainer(draft, make_optimizer("adamw", draft), loader)
        return [take_step(trainer, step)["loss"] for step in range(50)]

    assert losses("train.cells=3") == pytest.approx(losses(), rel=1e-6)


@pytest.mark.parametrize("sets", [*METHODS, ("draft.method=dflash", "draft.weighting=dpace"), SOFT[2]], ids=named)
@pytest.mark.parametrize("text", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory: you tried"])
def test_a_small_device_computes_fewer_blocks_at_a_time_and_the_same_loss(tiny_cache, monkeypatch, text, sets):
    def losses(most):
        draft, loader = prepared(tiny_cache, "train.steps=8", "train.lr=1e-4", *sets)
        hidden, seen = draft.hidden, []

        def small(cell, blocks):
            seen.append(len(blocks.anchors_N))
            if seen[-1] > most:
                raise (torch.OutOfMemoryError if "CUDA" in text else RuntimeError)(text)
            return hidden(cell, blocks)

        monkeypatch.setattr(draft, "hidden", small)
        trainer = Trainer(draft, make_optimizer("adamw", draft), loader)
        return [take_step(trainer, step) for step in range(8)], trainer.blocks_per_pass, seen

    whole, blocks_per_pass, seen = losses(10**6)
    parts, fewer, _ = losses(3)

    assert blocks_per_pass is None and max(seen) > 3 >= fewer > 1
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=1e-6)
    assert [line["accept_len_tf"] for line in parts] == pytest.approx([line["accept_len_tf"] for line in whole])
    with pytest.raises(RoomError, match=r"with a single block .*lower train.context"):
        losses(0)


def live(target, cell, layers) -> dict:
    """The states of a cell as the target computes them now, `final` of every row."""
    from pipeline.target.model import run_decoder, tap_layers

    aux, final = [], []
    for start, length in zip(cell.starts_M.tolist(), cell.lengths_M.tolist(), strict=True):
        with torch.no_grad(), tap_layers(target, layers) as taps:
            final.append(run_decoder(target, cell.ids_R[None, start : start + length]).last_hidden_state[0])
        aux.append(torch.stack([taps[layer][0] for layer in layers]))
    return {
        "aux_KRD": torch.cat(aux, dim=1),
        "final_FD": torch.cat(final),
        "final_at_R": torch.arange(len(cell.ids_R)),
    }


@every_loss
def test_the_cache_gives_the_loss_that_the_live_target_gives(tiny_cache, tiny_target, sets):
    from pipeline.target.loading import load_target

    draft, loader = prepared(tiny_cache, *sets)
    target, layers = load_target(str(tiny_target)), draft.config.target_layer_ids
    for step in range(3):
        batch = loader.sampler.batch(step)
        cells = list(loader.read_all(batch))
        cached = add_gradients(draft, loader, cells, batch.blocks, 0.3)
        lively = [replace(cell, **live(target, cell, layers)) for cell in cells]
        blocks = [
            lay_blocks(cell, blocks.anchors_N, draft.config) for cell, blocks in zip(lively, batch.blocks, strict=True)
        ]
        now = add_gradients(draft, loader, lively, blocks, 0.3)
        assert float(cached.total) == pytest.approx(float(now.total), rel=1e-6)
        for name, value in now.terms.items():
            assert float(cached.terms[name]) == pytest.approx(float(value), rel=1e-6), name


def test_a_label_is_learned_from_the_state_before_it(tiny_cache):
    sets = ("draft.method=dflash", "draft.objective=kl", "train.context=24", "train.batch=1")
    _, loader = prepared(tiny_cache, *sets)
    store = loader.cache
    place = {store.samples.hex(i): i for i in range(len(store))}
    for step in range(loader.sampler.per_epoch):
        batch = loader.sampler.batch(step)
        for cell, blocks in zip(loader.read_all(batch), batch.blocks, strict=True):
            whole = store.read(place[cell.names[0]], final=True)
            kept = {row: at for at, row in enumerate(whole.final_rows.tolist())}
            at = blocks.positions_NS[blocks.scored_NS]  # of the labels, which DFlash has at their own slots
            before = whole.final[[kept[row - 1] for row in at.tolist()]]
            found = cell.final_FD[cell.final_at_R[blocks.final_row_NS[blocks.scored_NS]]]
            assert torch.equal(found, before)
            assert torch.equal(whole.ids[at], blocks.labels_NS[blocks.scored_NS])


def test_an_error_while_reading_ahead_reaches_the_loop(tiny_cache, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(tiny_cache, cache)
    loader = prepared(cache)[1]
    for file in sorted(cache.glob("shards/*/aux.3/**/c/**/*")):
        if file.is_file():
            data = bytearray(file.read_bytes())
            data[100] ^= 1
            file.write_bytes(data)

    with pytest.raises(CacheError, match=r"aux\.3"):
        for _, cells in Prefetcher(loader, 0, 8):
            list(cells)


@every_loss
def test_bfloat16_arithmetic_stays_near_float32(tiny_cache, sets):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        draft, loader = prepared(tiny_cache, f"train.dtype={dtype}", *sets)
        batch = loader.sampler.batch(0)
        losses[dtype] = float(add_gradients(draft, loader, loader.read_all(batch), batch.blocks, 0.5).total)
        assert all(weight.dtype == torch.float32 for weight in draft.parameters())

    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)
    assert losses["bfloat16"] != losses["float32"]


# A whole run


LOGGED = {"loss", "lr", "grad_norm", "accuracy", "accept_len_tf", "slot_accuracy"}
TERMS = {
    "dflash": {"final_loss"},
    "domino": {"lambda_base", "final_loss", "base_loss", "base_accuracy", "base_accept_len_tf", "base_slot_accuracy"},
    "dspark": {
        "ce_loss",
        "l1_loss",
        "confidence_loss",
        "confidence_abs_error",
        "teacher_agreement",
        "tau_probabilistic",
    },
}


@pytest.mark.parametrize("method", DRAFTS)
def test_a_run_learns_and_leaves_what_it_promised(greedy_cache, tmp_path, capsys, method):
    mask = f"draft.mask_token_id={unused_token(greedy_cache)}"
    done = trained(greedy_cache, tmp_path / "run", "train.steps=40", "train.eval_every=20", mask, method=method)
    logged = [line for line in lines(done.run) if "eval" not in line]
    evaluated = [line for line in lines(done.run) if "eval" in line]

    learned = "ce_loss" if method == "dspark" else "final_loss"
    assert logged[-1][learned] < 0.9 * logged[0][learned]
    assert [line["step"] for line in logged] == list(range(1, 41))
    assert logged[0].get("lambda_base") == (1.0 if method == "domino" else None)
    printed = capsys.readouterr().out
    assert "  lr " in printed and ("  lambda 1.00  lr " in printed) == ("  lambda " in printed) == (method == "domino")
    assert LOGGED | TERMS[method] <= set(logged[0]) and "accept_len" not in logged[0]
    if method == "dspark":
        for line in logged:
            terms = 0.1 * line["ce_loss"] + 0.9 * line["l1_loss"] + line["confidence_loss"]
            assert terms == pytest.approx(line["loss"], rel=1e-6)
        assert logged[-1]["confidence_abs_error"] < 0.6 * logged[0]["confidence_abs_error"]
    assert [line["step"] for line in evaluated] == [20, 40]
    assert evaluated[-1]["eval"]["accept_len"] == done.accept_len >= 1
    assert {"colours", "numbers", "places"} == set(evaluated[-1]["eval"]["domains"])
    assert (done.run / "timing.jsonl").read_text().count("\n") == 40

    facts = json.loads((done.run / "run.json").read_text())
    store = HiddenCache.open(greedy_cache)
    assert (facts["cache"]["digest"], facts["target"]) == (store.digest, store.identity.target.name)
    assert {"torch", "pipeline"} <= set(facts["versions"]) and facts["command"] == sys.argv
    recipe = load_recipe(done.run / "recipe.toml")
    assert recipe.train.steps == 40 and resolve(recipe, store).draft == checkpoint.load_config(done.run)


def test_running_a_finished_run_again_says_so_and_changes_nothing(tiny_cache, tmp_path, capsys):
    done = trained(tiny_cache, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in done.run.rglob("*")}
    capsys.readouterr()

    again = trained(tiny_cache, tmp_path / "run")

    assert again == done
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in done.run.rglob("*")} == before


def test_the_end_says_where_the_run_is_and_what_to_do_next(greedy_cache, tmp_path, capsys):
    done = trained(greedy_cache, tmp_path / "run", f"draft.mask_token_id={unused_token(greedy_cache)}")

    last = capsys.readouterr().out.splitlines()[-2:]

    assert f"accept length {done.accept_len:.2f}" in last[0]
    assert last[1] == f"next: pipeline evaluate --draft {tmp_path / 'run'}"


@pytest.mark.parametrize(
    "sets, said",
    [
        (("draft.method=dflash", "draft.shift_label=true"), "same-position labels only"),
        (("draft.method=domino", "draft.pure_draft_prefix_len=0"), "pure_draft_prefix_len 1 only"),
        (("draft.method=domino",), None),
        (("draft.method=dspark", "draft.markov_head_type=rnn"), None),  # by SGLang alone
    ],
)
def test_what_no_engine_will_serve_is_said_before_it_is_trained(tiny_cache, tmp_path, sets, said):
    cache = HiddenCache.open(tiny_cache)
    resolved = resolve(load_recipe(None, sets), cache)
    lines = run_description(tmp_path, cache, split_for(resolved, cache), resolved, torch.device("cpu"))
    found = [line for line in lines if line.startswith("no engine will serve this draft")]
    assert len(found) == (said is not None) and all(said in line for line in found)


def test_the_default_folder_is_named_by_what_decides_the_draft(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    runs = [run(tiny_cache, None, (*SMALL, *sets)).run for sets in ((), ("train.seed=1",), ("draft.method=dflash",))]

    assert len(set(runs)) == 3
    assert [path.parent for path in runs] == [Path("runs")] * 3
    assert [path.name.split("-")[0] for path in runs] == ["domino", "domino", "dflash"]
    assert trained(tiny_cache, None).run == runs[0]


def test_states_that_a_codec_rounded_are_another_run(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = Path(shutil.copytree(tiny_cache, tmp_path / "cache"))
    exact = trained(cache, None).run
    recode(cache, "zstd")
    assert trained(cache, None).run == exact

    recode(cache, "aux=int8")

    assert trained(cache, None).run != exact
    with pytest.raises(UsageError, match=r"states = as captured, .* aux\.\d int8, .*pass another --out"):
        trained(cache, exact)


def test_final_states_that_a_codec_rounded_are_another_run_where_they_are_learned_from(tiny_cache, tmp_path):
    cache = Path(shutil.copytree(tiny_cache, tmp_path / "cache"))
    hard, soft = (trained(cache, tmp_path / method, method=method).run for method in ("domino", "dspark"))

    recode(cache, "final=int8")

    assert trained(cache, hard).run == hard, "cross-entropy reads none of them"
    with pytest.raises(UsageError, match=r"states = as captured, this command asks for final int8.*another --out"):
        trained(cache, soft, method="dspark")
    facts = json.loads((trained(cache, tmp_path / "other", method="dspark").run / "run.json").read_text())
    assert facts["cache"]["rounded"] == ["final int8"]


def test_the_command_a_refusal_names_adds_the_final_states(tiny_target, tiny_corpus, tmp_path):
    from stages.cache_hidden.run import run as capture
    from stages.cache_hidden.settings import CaptureOptions

    cache = tmp_path / "cache"
    options = CaptureOptions(layers="1,3", final="none", max_length=256, max_samples=12)
    capture(str(tiny_target), str(tiny_corpus), cache, options=options)
    with pytest.raises(
        UsageError, match=r'objective "dspark" learns from; add them with `.*--final needed`'
    ) as refused:
        trained(cache, tmp_path / "run", method="dspark")
    assert not (tmp_path / "run").exists(), "refused before any work"

    commands.main(shlex.split(str(refused.value).split("`")[1])[1:], standalone_mode=False)

    assert HiddenCache.open(cache).has_final and HiddenCache.open(cache).layers == (1, 3)
    assert trained(cache, tmp_path / "run", method="dspark").steps == 8


def test_without_final_states_or_held_out_samples_it_trains_and_says_why_there_is_no_accept_length(
    tiny_cache, tmp_path, capsys
):
    bare = rewrite(tiny_cache, tmp_path / "bare", final=False)
    done = trained(bare, tmp_path / "run")
    assert done.accept_len is None and "holds no final states" in capsys.readouterr().out

    def all_train(index, sample):
        return PlannedSample(sample.ids, sample.mask, sample.domain, "train")

    done = trained(rewrite(tiny_cache, tmp_path / "train", samples=all_train), tmp_path / "run2")
    assert done.accept_len is None and "holds nothing out" in capsys.readouterr().out


# Stopped and killed


def stopping(monkeypatch, at: int, how) -> None:
    """Let something happen to the process while it computes step `at`."""
    step = Trainer.step

    def stopped(trainer, batch, cells):
        metrics = step(trainer, batch, cells)
        if batch.step + 1 == at:
            how()
        return metrics

    monkeypatch.setattr(Trainer, "step", stopped)


class Killed(BaseException):
    """Stands for a kill that leaves the process no time for anything."""


def kill():
    raise Killed


@pytest.mark.parametrize(("method", "at"), [*(("domino", at) for at in (1, 3, 4, 7, 8)), ("dspark", 4), ("dspark", 7)])
def test_a_killed_run_ends_with_the_same_bytes(tiny_cache, tmp_path, monkeypatch, method, at):
    sets = ("train.save_every=3", "train.eval_every=4")
    straight = trained(tiny_cache, tmp_path / "straight", *sets, method=method)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        stopping(patch, at, kill)
        trained(tiny_cache, tmp_path / "killed", *sets, method=method)
    resumed = trained(tiny_cache, tmp_path / "killed", *sets, method=method)

    assert resumed.accept_len == straight.accept_len
    for name in ("metrics.jsonl", "recipe.toml", "done.json", "checkpoints/step-00000008/draft.safetensors"):
        assert (resumed.run / name).read_bytes() == (straight.run / name).read_bytes(), name


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_first(tiny_cache, tmp_path, monkeypatch, number, raised):
    sets = ("train.save_every=100", "train.eval_every=5")
    straight = trained(tiny_cache, tmp_path / "straight", *sets)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(raised) as stopped:
        stopping(patch, 5, lambda: os.kill(os.getpid(), number))
        trained(tiny_cache, tmp_path / "stopped", *sets)

    assert getattr(stopped.value, "code", 143) == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert checkpoint.steps(tmp_path / "stopped") == [5], "saved at the step it was on, before the evaluation due there"
    resumed = trained(tiny_cache, tmp_path / "stopped", *sets)
    assert (resumed.run / "metrics.jsonl").read_bytes() == (straight.run / "metrics.jsonl").read_bytes()


def test_a_run_that_goes_on_elsewhere_says_what_differs(tiny_cache, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stopping(patch, 3, kill)
        trained(tiny_cache, tmp_path / "run", "train.save_every=2")
    facts, _ = parse_checksummed((tmp_path / "run" / "run.json").read_bytes())
    facts["machine"], facts["versions"]["torch"] = {"device": "cpu", "threads": "64"}, "2.0.0"
    (tmp_path / "run" / "run.json").write_bytes(record_bytes(facts))
    assert "began with" not in capsys.readouterr().out

    trained(tiny_cache, tmp_path / "run", "train.save_every=2")

    here = f"threads 64, now {torch.get_num_threads()}; torch 2.0.0, now {version('torch')}"
    assert f"began with {here}" in capsys.readouterr().out


def test_a_run_keeps_the_rule_of_chunks_that_it_began_with(tiny_cache, tmp_path, monkeypatch):
    cells = ("train.save_every=1", "train.anchors=64", "train.batch=8", "train.cell_anchors=512")
    asked, real = [], draft_module.chunk_blocks

    def noted(*shapes_and_rule):
        asked.append((shapes_and_rule[-1], real(*shapes_and_rule)))
        return asked[-1][1]

    monkeypatch.setattr(draft_module, "chunk_blocks", noted)
    with monkeypatch.context() as patch:  # what versions before the second rule did
        patch.setattr(run_folder, "NEWEST", 1)
        straight = trained(tiny_cache, tmp_path / "straight", *cells)
        stopping(patch, 3, kill)
        with pytest.raises(Killed):
            trained(tiny_cache, tmp_path / "old", *cells)
    record = tmp_path / "old" / "run.json"
    facts, _ = parse_checksummed(record.read_bytes())
    del facts["head_chunk"]  # and they did not say so
    record.write_bytes(record_bytes(facts))
    assert {rule for rule, _ in asked} == {1}
    of_old = {blocks for _, blocks in asked}
    asked.clear()

    old = trained(tiny_cache, tmp_path / "old", *cells)

    assert {rule for rule, _ in asked} == {1}
    for name in ("metrics.jsonl", "done.json", "checkpoints/step-00000008/draft.safetensors"):
        assert (old.run / name).read_bytes() == (straight.run / name).read_bytes(), name
    asked.clear()
    new = trained(tiny_cache, tmp_path / "new", *cells)
    assert json.loads((new.run / "run.json").read_text())["head_chunk"] == NEWEST
    assert {rule for rule, _ in asked} == {NEWEST} and of_old.isdisjoint(blocks for _, blocks in asked)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def scaled_cache(tiny_cache, tmp_path_factory):
    """The cache of a target whose rotary positions are scaled, or so it says."""
    scaling = {"rope_parameters": {"rope_theta": 10000.0, **LLAMA3}}
    return rewrite(tiny_cache, tmp_path_factory.mktemp("scaled") / "cache", config=scaling)


def test_a_targets_scaled_rotary_positions_are_taken_over_said_and_kept(scaled_cache, tmp_path, capsys):
    done = trained(scaled_cache, tmp_path / "run")
    assert "rotary positions are scaled as the target scales them: llama3, factor 8" in capsys.readouterr().out
    assert json.loads((done.run / "run.json").read_text())["rope_scaling"] == LLAMA3
    config = checkpoint.load_config(done.run)
    assert config.rope_scaling.as_config() == LLAMA3
    assert resolve(load_recipe(done.run / "recipe.toml"), HiddenCache.open(scaled_cache)).draft == config


def test_scaled_rotary_positions_that_no_engine_computes_alike_become_plain_ones_and_this_is_said(
    tiny_cache, tmp_path, capsys
):
    dynamic = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}}
    done = trained(rewrite(tiny_cache, tmp_path / "cache", config=dynamic), tmp_path / "run")
    said = "the target scales its rotary positions by dynamic, which engines compute otherwise than transformers, or"
    assert said in capsys.readouterr().out
    assert checkpoint.load_config(done.run).rope_scaling is None


def test_a_run_begun_with_plain_rotary_positions_goes_on_with_them(scaled_cache, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:  # what versions before did with such a target
        patch.setattr("pipeline.runs.recipe.draft_rope_scaling", lambda target: (None, None))
        straight = trained(scaled_cache, tmp_path / "straight", "train.save_every=1")
        stopping(patch, 3, kill)
        with pytest.raises(Killed):
            trained(scaled_cache, tmp_path / "old", "train.save_every=1")
    record = tmp_path / "old" / "run.json"
    facts, _ = parse_checksummed(record.read_bytes())
    del facts["rope_scaling"]  # and they did not say so
    record.write_bytes(record_bytes(facts))
    capsys.readouterr()

    old = trained(scaled_cache, tmp_path / "old", "train.save_every=1")

    assert "the draft goes on as it began: plain ones" in capsys.readouterr().out
    for name in ("metrics.jsonl", "done.json", "checkpoints/step-00000008/draft.safetensors"):
        assert (old.run / name).read_bytes() == (straight.run / name).read_bytes(), name
    new = trained(scaled_cache, tmp_path / "new")
    assert (new.run / "metrics.jsonl").read_bytes() != (straight.run / "metrics.jsonl").read_bytes()


def test_a_draft_that_training_begins_with_keeps_its_rotary_positions(tiny_cache, scaled_cache, tmp_path, capsys):
    plain = trained(tiny_cache, tmp_path / "plain", "train.steps=1")
    capsys.readouterr()
    sets = (*SMALL, "train.steps=1")
    done = run(scaled_cache, None, sets, tmp_path / "run", "cpu", init_from=InitialDraft(plain.run))
    assert "the draft goes on as it began: plain ones" in capsys.readouterr().out
    assert checkpoint.load_config(done.run).rope_scaling is None


@pytest.mark.parametrize("record", [{"rope_type": "llama3"}, [], "llama3", {"rope_type": "yarn", "other": 1}])
def test_a_damaged_record_of_rotary_positions_is_named(tiny_cache, tmp_path, monkeypatch, record):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stopping(patch, 1, kill)
        trained(tiny_cache, tmp_path / "run")
    facts, _ = parse_checksummed((tmp_path / "run" / "run.json").read_bytes())
    (tmp_path / "run" / "run.json").write_bytes(record_bytes(facts | {"rope_scaling": record}))

    with pytest.raises(CacheError, match=r"run\.json: damaged"):
        trained(tiny_cache, tmp_path / "run")


@pytest.mark.parametrize(
    ("rule", "error", "said"),
    [
        (99, UsageError, r"begun by a later version: its logits are cut by rule 99, this version knows 1, 2, 3; go on"),
        (0, CacheError, r"run\.json: damaged"),
        (True, CacheError, r"run\.json: damaged"),
        ("2", CacheError, r"run\.json: damaged"),
    ],
)
def test_a_rule_of_chunks_that_there_is_none_of_is_refused(tiny_cache, tmp_path, monkeypatch, rule, error, said):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stopping(patch, 1, kill)
        trained(tiny_cache, tmp_path / "run")
    facts, _ = parse_checksummed((tmp_path / "run" / "run.json").read_bytes())
    (tmp_path / "run" / "run.json").write_bytes(record_bytes(facts | {"head_chunk": rule}))

    with pytest.raises(error, match=said):
        trained(tiny_cache, tmp_path / "run")


def test_a_torn_last_line_is_written_again(tiny_cache, tmp_path, monkeypatch):
    straight = trained(tiny_cache, tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stopping(patch, 6, kill)
        trained(tiny_cache, tmp_path / "torn", "train.save_every=1")
    with (tmp_path / "torn" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')

    torn = trained(tiny_cache, tmp_path / "torn", "train.save_every=1")

    assert (torn.run / "metrics.jsonl").read_bytes() == (straight.run / "metrics.jsonl").read_bytes()


def test_kill_9_at_random_moments_changes_no_byte(tiny_cache, tmp_path):
    """The short form of `tests/kill_train.py`, which does it 20 times."""
    trial = Trial(tiny_cache, tmp_path, steps=30, seed=0)

    assert trial.kill(3) == []


# Refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.steps=9", r"train\.steps = 8, this command asks for 9"),
        ("train.seed=1", r"train\.seed = 0, this command asks for 1"),
        ("draft.block_size=8", r"draft\.block_size = 4, this command asks for 8"),
        ("train.anchors=5", r"train\.anchors = 6, this command asks for 5"),
    ],
)
def test_a_run_goes_on_only_with_what_it_began_with(tiny_cache, tmp_path, change, said):
    trained(tiny_cache, tmp_path / "run")

    with pytest.raises(UsageError, match=said):
        trained(tiny_cache, tmp_path / "run", change)


def test_another_cache_in_the_same_run_is_refused(tiny_cache, tmp_path):
    trained(tiny_cache, tmp_path / "run")

    def other(index, sample):
        return PlannedSample(sample.ids, sample.mask, sample.domain, "train")

    with pytest.raises(UsageError, match=r"started with c\w+ digest = \w+, this command asks for \w+"):
        trained(rewrite(tiny_cache, tmp_path / "other", samples=other), tmp_path / "run")


def test_a_second_process_in_the_same_run_is_refused(tiny_cache, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="being trained by another process"):
            trained(tiny_cache, tmp_path / "run")


def test_layers_the_cache_lacks_and_misspelt_keys_are_refused_before_anything_is_written(tiny_cache, tmp_path):
    for sets, told in (("draft.layers=[1, 2]", "also reads \\[2\\]"), ("train.setps=3", "did you mean `train.steps`")):
        with pytest.raises(UsageError, match=told):
            trained(tiny_cache, tmp_path / "run", sets)
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_refused(tiny_cache, tmp_path):
    with pytest.raises(UsageError, match="device nowhere"):
        run(tiny_cache, None, SMALL, tmp_path / "run", "nowhere")


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(tiny_cache, tmp_path):
    store = HiddenCache.open(tiny_cache)
    broken = next(i for i in range(len(store)) if store.samples.split[i] == "train")

    def poisoned(index, sample, column):
        return np.full((len(sample.ids), 32), np.nan, np.float32) if (index, column) == (broken, "aux.3") else None

    cache = rewrite(tiny_cache, tmp_path / "cache", states=poisoned)

    with pytest.raises(ProofError) as stopped:
        trained(cache, tmp_path / "run", "train.steps=20", "train.save_every=1")

    said = str(stopped.value)
    assert store.samples.hex(broken) in said
    assert not any(store.samples.hex(i) in said for i in range(len(store)) if i != broken)
    step = int(said.split()[1].rstrip(":"))
    assert checkpoint.steps(tmp_path / "run")[-1:] == ([step - 1] if step > 1 else [])
    assert all(torch.isfinite(w).all() for w in checkpoint.load_draft(tmp_path / "run", store.head()).parameters())


def test_a_draft_that_diverges_blames_itself(tiny_cache, tmp_path):
    draft, loader = prepared(tiny_cache)
    with torch.no_grad():
        draft.norm.weight.fill_(float("inf"))

    with pytest.raises(ProofError, match=r"step 1: loss nan.*the draft itself has diverged: lower train\.lr"):
        take_step(Trainer(draft, make_optimizer("adamw", draft), loader), 0)


# Without the target

ALONE = """
import sys
for name in ("transformers", "datasets", "tokenizers"):
    sys.modules[name] = None  # importing it now fails
from pathlib import Path
from stages.train_draft.run import run
run(Path(sys.argv[1]), None, tuple(sys.argv[3:]), Path(sys.argv[2]), "cpu")
named = ("pipeline.target.", "transformers.", "stages.")
loaded = [n for n in sys.modules if n.startswith(named) and n != "stages"]
print("LOADED", sorted(loaded))
"""


def test_it_trains_where_there_is_no_target_and_nothing_that_could_load_one(tiny_cache, tiny_target, tmp_path):
    hidden = tiny_target.with_name("hidden-away")
    tiny_target.rename(hidden)
    try:
        done = subprocess.run(
            [sys.executable, "-c", ALONE, tiny_cache, tmp_path / "run", *SMALL],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            check=False,
        )
    finally:
        hidden.rename(tiny_target)

    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split("LOADED")[1]
    assert "pipeline.target.head" in loaded
    assert not any(f"'pipeline.target.{live}'" in loaded for live in ("model", "loading", "files"))
    assert "stages.cache_hidden" not in loaded and "stages.evaluate" not in loaded
