"""`train.echo`: a batch is read once for several steps, which differ in their anchors; a run of 1 is what it was."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_maker import make_cache, random_samples

from pipeline.cache import HiddenCache
from pipeline.drafts import draft_config
from pipeline.errors import UsageError
from pipeline.runs.recipe import Recipe, TrainSection, load_recipe
from pipeline.runs.training_data import split_samples
from stages.train_draft import loader as loader_module
from stages.train_draft.batches import Sampler
from stages.train_draft.loader import BatchLoader, Prefetcher
from stages.train_draft.run import run
from stages.train_draft.step import Trainer

ROOT = Path(__file__).parents[2]
SETS = ("draft.method=dspark", "draft.block_size=4", "train.batch=4", "train.anchors=6", "train.log_every=1")
CONFIG = draft_config(
    method="dflash",
    hidden_size=8,
    vocab_size=1100,
    rope_theta=1e4,
    shift_label=False,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=8,
    block_size=4,
    mask_token_id=1001,
    num_target_layers=12,
    target_layer_ids=(1, 10),
    max_position_embeddings=4096,
    objective="kl",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return HiddenCache.open(make_cache(tmp_path_factory.mktemp("echo") / "cache", random_samples(20)))


def loader(store, echo, **changes):
    """Batches of three samples of up to 600 rows, windows of 300, in cells of 300."""
    train = TrainSection(batch=3, context=300, anchors=5, cell_anchors=50, echo=echo, **changes)
    return BatchLoader(Sampler(store, split_samples(store, 1001, 0.05, (1, 10)), CONFIG, train))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("timing.jsonl", "run.json"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def reads(monkeypatch):
    """Count how often each range of rows is read from a cache, by its layers."""
    counted, fill = Counter(), HiddenCache.fill

    def counting(self, out, parts, layers):
        counted.update((part, tuple(layers)) for part in parts)
        fill(self, out, parts, layers)

    monkeypatch.setattr(HiddenCache, "fill", counting)
    return counted


def windows_of(batch) -> list[list[tuple]]:
    return [[window.part for window in of_cell] for of_cell in batch.windows]


def anchors_of(batch) -> dict[str, list[int]]:
    """The anchors of each sample, as rows of its window."""
    return {window.name: window.anchors.tolist() for of_cell in batch.windows for window in of_cell}


def test_steps_of_a_group_share_samples_windows_and_cells_and_differ_in_anchors(store):
    once, echoed = loader(store, 1).sampler, loader(store, 3).sampler
    fresh = repeated = 0
    for turn in range(2 * once.per_epoch):
        first, *others = [echoed.batch(3 * turn + use) for use in range(3)]
        assert (first.use, [batch.use for batch in others]) == (0, [1, 2])
        read = once.batch(turn)
        assert first.names == read.names and windows_of(first) == windows_of(read)
        assert anchors_of(first) == anchors_of(read)
        for batch in others:
            assert batch.names == first.names and windows_of(batch) == windows_of(first)
            for windows in batch.windows:
                for window in windows:
                    valid = np.flatnonzero(window.mask[:-1] & window.mask[1:])
                    drawn, before = window.anchors, anchors_of(first)[window.name]
                    assert len(drawn) == min(5, len(valid)) and set(drawn) <= set(valid)
                    if len(valid) <= 5:
                        repeated += drawn.tolist() == before
                    else:
                        fresh += drawn.tolist() != before
        assert anchors_of(others[0]) != anchors_of(others[1])
    assert fresh > 50, "almost every further use of a sample with many eligible rows has other anchors"


def test_a_sample_with_few_eligible_rows_uses_all_of_them_each_time(store):
    sampler = loader(store, 2).sampler
    everyone = sampler.train.model_copy(update={"anchors": 1000, "cell_anchors": 4000})
    sampler.train = everyone
    assert anchors_of(sampler.batch(0)) == anchors_of(sampler.batch(1))


def test_an_epoch_has_as_many_steps_whatever_the_echo(store):
    once, echoed = loader(store, 1).sampler, loader(store, 3).sampler
    steps = range(3 * once.per_epoch)
    assert [echoed.batch(step).epoch for step in steps] == [once.batch(step).epoch for step in steps]
    uses = Counter(name for step in steps for name in echoed.batch(step).names)
    assert {*uses.values()} == {3} and len(uses) == 3 * once.per_epoch, "three epochs of one reading"


@pytest.mark.parametrize("limit", [0, 20_000, 1 << 30])
@pytest.mark.parametrize("start", [0, 2])
def test_states_are_read_once_for_all_steps_that_use_them(store, reads, monkeypatch, limit, start):
    monkeypatch.setattr(loader_module, "BUFFER_STEP", 1024)
    echoed = loader(store, 3)
    expected = Counter()
    for step in (start, *range(3, 12, 3)):
        for windows in echoed.sampler.batch(step).windows:
            expected.update([((window.part), (1, 10)) for window in windows])
            expected.update([((window.final_part), ("final",)) for window in windows])
    found = []
    for batch, cells in Prefetcher(echoed, start, 12, limit=limit):
        if batch.step % 3 == 0:
            next(cells)  # a step may stop early; the next ones find all cells
            continue
        found.append((batch.step, [(cell.aux_KRD.clone(), cell.final_FD.clone()) for cell in cells]))
    assert reads == expected

    for step, cells in found:
        for (aux, final), right in zip(cells, echoed.read_all(echoed.sampler.batch(step)), strict=True):
            assert torch.equal(aux, right.aux_KRD) and torch.equal(final, right.final_FD)


def test_the_next_batch_is_read_whole_while_one_is_used(store, reads, monkeypatch):
    monkeypatch.setattr(loader_module, "BUFFER_STEP", 1024)
    echoed = loader(store, 4, cells=3)
    batches = Prefetcher(echoed, 0, 8, limit=0)
    _, cells = next(iter(batches))
    assert len(list(cells)) >= 3
    following = {(window.part, (1, 10)) for of_cell in echoed.sampler.batch(4).windows for window in of_cell}
    with batches._changed:
        assert batches._changed.wait_for(lambda: following <= reads.keys(), timeout=20)
    batches.close()


class Killed(BaseException):
    """Stands for a kill that leaves the process no time for anything."""


@pytest.mark.parametrize("at", [2, 5, 8])
def test_a_run_killed_within_a_group_ends_with_the_same_bytes(tiny_cache, tmp_path, monkeypatch, reads, at):
    sets = (*SETS, "train.echo=4", "train.steps=9", "train.save_every=1", "train.keep=9")
    straight = run(tiny_cache, None, sets, tmp_path / "straight", "cpu").run
    whole, step = reads.copy(), Trainer.step

    def killed(trainer, batch, cells):
        if batch.step == at:
            raise Killed
        return step(trainer, batch, cells)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "step", killed)
        run(tiny_cache, None, sets, tmp_path / "killed", "cpu")
    again = run(tiny_cache, None, sets, tmp_path / "killed", "cpu").run
    assert contents(again) == contents(straight)
    of_training = [count for (_, layers), count in whole.items() if layers != ("final",)]
    assert sum(of_training) == 3 * 4, "nine steps of four samples read three batches"


def test_an_echo_of_one_is_the_run_that_it_was(tiny_cache, tmp_path):
    plain = run(tiny_cache, None, (*SETS, "train.steps=3"), tmp_path / "plain", "cpu").run
    stated = run(tiny_cache, None, (*SETS, "train.steps=3", "train.echo=1"), tmp_path / "stated", "cpu").run
    assert contents(stated) == contents(plain) and "echo" not in (plain / "recipe.toml").read_text()
    # of version 0.5.0
    assert Recipe().digest() == "24c8e501f061ba93d499e116adec0c95"
    assert load_recipe(ROOT / "configs/demo.toml").digest() == "dad63a64aff0eabea83486b68f5cc5fe"


def test_a_run_goes_on_only_with_the_echo_that_it_began_with_and_says_what_it_is(tiny_cache, tmp_path, capsys):
    run(tiny_cache, None, (*SETS, "train.steps=3", "train.echo=2"), tmp_path / "run", "cpu")
    printed = capsys.readouterr().out
    assert "read once for 2 steps" in printed and "only in expectation" in printed and "echo = 2" in printed
    with pytest.raises(UsageError, match=r"train\.echo = 2, this command asks for 1"):
        run(tiny_cache, None, (*SETS, "train.steps=3"), tmp_path / "run", "cpu")
    with pytest.raises(UsageError, match=r"train\.echo"):
        load_recipe(None, ("train.echo=0",))
