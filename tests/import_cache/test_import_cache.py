"""Other trainers' caches: what is imported, how it is proven, and what is refused.

The files are written by `foreign_maker.py`, from the descriptions of the three forms.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_maker import contents
from foreign_maker import compute, compute_of, write_deepspec, write_specforge, write_speculators
from tiny import config, random_model, save_model, save_target

from pipeline.cache import HiddenCache
from pipeline.cache.inspect import describe
from pipeline.cache.layout import IDENTITY
from pipeline.cache.manifest import read_canonical
from pipeline.cache.schema import column_manifest
from pipeline.cache.verify import verify
from pipeline.cache.writer import ShardWriter
from pipeline.cli import commands
from pipeline.errors import DataError, ProofError, UsageError
from pipeline.target.loading import load_target
from pipeline.target.model import head_of
from stages.evaluate.run import find_model
from stages.import_cache import source
from stages.import_cache.run import run

LAYERS = [1, 3, 4]
SAVED = {"specforge": write_specforge, "speculators": write_speculators, "deepspec": write_deepspec}
BUNDLED = Path(__file__).parents[2] / "data" / "tiny-qwen3"
SHORT = [f"--set={one}" for one in ("train.steps=3", "train.batch=4", "train.heldout=0.3")]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("made") / "tiny-random")


@pytest.fixture(scope="module")
def samples(target):
    return compute(target)


@pytest.fixture(scope="module")
def imported(target, samples, tmp_path_factory):
    """A SpecForge folder, and the cache imported from it."""
    folder = tmp_path_factory.mktemp("imported")
    write_specforge(folder / "sf", samples, LAYERS)
    run(folder / "sf", folder / "cache", model=str(target), layers="1,3,4")
    return folder


def read_all(cache):
    """Every sample of a cache by its ids: mask, aux [K, T, D], final by row."""
    store, found = HiddenCache.open(cache), {}
    for index in range(len(store)):
        sample = store.read(index, layers=store.layers, final=store.has_final)
        found[tuple(sample.ids.tolist())] = sample
    return store, found


def check_states(cache, samples, layers, dtype=torch.bfloat16, final=True):
    """The cache holds these samples: layers by the bit, and the normed last state, the norm's own rounding apart."""
    store, found = read_all(cache)
    assert store.layers == tuple(layers) and store.has_final is final
    assert len(found) == len(samples)
    for sample in samples:
        held = found[tuple(sample.ids.tolist())]
        assert torch.equal(held.mask, sample.mask)
        assert torch.equal(held.aux, sample.layers(layers, dtype).transpose(0, 1))
        if final:
            wanted = sample.normed[held.final_rows]
            assert torch.allclose(held.final.float(), wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("form", SAVED)
def test_every_form_becomes_a_cache_that_verifies(form, target, samples, tmp_path, capsys):
    source = SAVED[form](tmp_path / form, samples, LAYERS)
    named = None if form == "deepspec" else "1,3,4"

    done = run(source, tmp_path / "cache", model=str(target), layers=named)

    assert (done.samples, done.refused) == (len(samples), 0)
    check_states(tmp_path / "cache", samples, LAYERS)
    report = verify(tmp_path / "cache")
    assert not report.damaged and not report.missing and not report.foreign
    assert f"{form}: layers 1,3,4 are counted from 0" in capsys.readouterr().err


@pytest.mark.parametrize("count_from", [0, 1])
@pytest.mark.parametrize("last", ["normed", "raw"])
def test_the_target_shows_how_layers_were_counted_and_whether_the_last_was_normed(
    count_from, last, target, samples, tmp_path, capsys
):
    source = write_speculators(tmp_path / "sp", samples, LAYERS, last=last)
    named = ",".join(str(layer + count_from) for layer in LAYERS)

    run(source / "hidden_states", tmp_path / "cache", model=str(target), layers=named)

    check_states(tmp_path / "cache", samples, LAYERS)
    assert f"layers {named} are counted from {count_from}" in capsys.readouterr().err
    facts = read_canonical(tmp_path / "cache" / IDENTITY)["capture"]["imported"]
    assert (facts["count_from"], facts["last"], facts["proven"]) == (count_from, last, True)
    assert all(column["probe"] < 5e-3 for column in describe(tmp_path / "cache")["columns"])


def test_a_manifest_that_miscounts_is_read_as_the_target_shows(target, samples, tmp_path):
    source = write_deepspec(tmp_path / "ds", samples, LAYERS, last="raw")
    facts = json.loads((source / "manifest.json").read_text())
    (source / "manifest.json").write_text(json.dumps({**facts, "target_layer_ids": [2, 4, 5]}))

    run(source, tmp_path / "cache", model=str(target))

    check_states(tmp_path / "cache", samples, LAYERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_states_of_other_types_are_kept_exactly(dtype, target, samples, tmp_path):
    source = write_specforge(tmp_path / "sf", samples, LAYERS, dtype=dtype, eagle=True)

    run(source, tmp_path / "cache", model=str(target), layers="1,3,4")

    _, found = read_all(tmp_path / "cache")
    for sample in samples:
        held = found[tuple(sample.ids.tolist())]
        assert torch.equal(held.aux, sample.layers(LAYERS, dtype).float().transpose(0, 1))


def test_what_enters_the_first_layer_and_a_cache_without_a_last_state_are_imported(target, samples, tmp_path):
    source = write_specforge(tmp_path / "sf", samples, [-1, 2], last="none")
    run(source, tmp_path / "cache", model=str(target), layers="-1,2")
    check_states(tmp_path / "cache", samples, [-1, 2], final=False)


def test_embedding_and_head_come_from_the_target(imported, target):
    held, wanted = HiddenCache.open(imported / "cache").head(), head_of(load_target(str(target)))
    assert torch.equal(held.embed_VD.float(), wanted.embed_VD) and torch.equal(held.head_VD.float(), wanted.head_VD)
    assert (imported / "cache" / "target" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (
            {"layers": "2,3,4"},
            r"differs .* are the layers 1,3,4 counted from 0: pass --layers 1,3,4 --count-from 0",
        ),
        ({"layers": "1,3,4", "count_from": 1}, r"differs .* by \d.\de.\d\d counted from 1, .* pass --layers 1,3,4"),
        (
            {"layers": "1,3,4", "last": "raw"},
            r"\de-03 if it is after the norm, .* at most .* pass --last normed",
        ),
    ],
)
def test_what_was_said_wrongly_is_refused_with_the_figures_and_what_is_right(said, match, target, imported, tmp_path):
    with pytest.raises(ProofError, match=match):
        run(imported / "sf", tmp_path / "cache", model=str(target), **said)
    assert not (tmp_path / "cache").exists()


def test_another_targets_states_are_refused_with_the_figures(imported, tmp_path):
    other = save_model(tmp_path / "other", random_model(config(), seed=1))
    with pytest.raises(ProofError, match=r"differs from the target's by .* none fits better than .*--model"):
        run(imported / "sf", tmp_path / "cache", model=str(other), layers="1,3,4")


def test_files_of_another_run_among_the_rest_are_named_and_not_imported(target, samples, tmp_path):
    source = write_specforge(tmp_path / "sf", samples, LAYERS)
    strangers = write_specforge(tmp_path / "sf2", samples, [2, 3, 4])
    for number in (5, 6, 7, 8):  # not those that are looked at first
        name = f"rows_0-5000/data_{number}.ckpt"
        shutil.copyfile(strangers / name, source / name)

    with pytest.raises(ProofError, match=r"data_[5-8].ckpt.*: probe: .* layer 2 fits better .* another run"):
        run(source, tmp_path / "cache", model=str(target), layers="1,3,4")


def test_the_last_layer_is_no_auxiliary_one(target, samples, tmp_path):
    source = write_specforge(tmp_path / "sf", samples, LAYERS)
    with pytest.raises(UsageError, match=r"\[5\] .* the last layer's state is kept as `final`"):
        run(source, tmp_path / "cache", model=str(target), layers="1,3,5", count_from=0, last="normed", unproven=True)


def test_without_the_target_everything_has_to_be_said(imported, tmp_path):
    for said, match in (
        ({"layers": "1,3,4"}, "--model, or say --unproven"),
        ({"layers": "1,3,4", "unproven": True}, "name with --model a folder that does"),
    ):
        with pytest.raises(UsageError, match=match):
            run(imported / "sf", tmp_path / "cache", **said)


def test_an_unproven_import_takes_what_is_said_and_says_so(imported, target, samples, tmp_path, capsys):
    said = {"model": str(target), "unproven": True, "layers": "1,3,4"}
    with pytest.raises(UsageError, match="no file says what --count-from is"):
        run(imported / "sf", tmp_path / "cache", **said)
    with pytest.raises(UsageError, match="no file says what --last is"):
        run(imported / "sf", tmp_path / "cache", **said, count_from=0)
    with pytest.raises(UsageError, match="--last raw needs the target's norm"):
        run(imported / "sf", tmp_path / "cache", **said, count_from=0, last="raw")

    run(imported / "sf", tmp_path / "cache", **said, count_from=0, last="normed")

    assert "unproven: no state was compared" in capsys.readouterr().out
    check_states(tmp_path / "cache", samples, LAYERS)
    assert read_canonical(tmp_path / "cache" / IDENTITY)["capture"]["imported"]["proven"] is False
    facts = column_manifest(tmp_path / "cache", 0, "aux.1").facts.as_dict()
    assert facts == {"engine": "imported from specforge", "proven": False}
    assert describe(tmp_path / "cache")["gauge"] == describe(imported / "cache")["gauge"]
    same = HiddenCache.open(tmp_path / "cache").head()
    assert torch.equal(same.head_VD.float(), head_of(load_target(str(target))).head_VD)
    with pytest.raises(UsageError, match=r"proven = False, this command asks for True"):
        run(imported / "sf", tmp_path / "cache", model=str(target), layers="1,3,4")


def test_a_cache_that_holds_the_targets_files_itself_needs_no_model(target, samples, tmp_path):
    source = write_deepspec(tmp_path / "ds", samples, LAYERS)
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        shutil.copyfile(target / name, source / name)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(target / name, source / name)

    run(source, tmp_path / "cache", unproven=True)

    check_states(tmp_path / "cache", samples, LAYERS)


def test_a_stopped_import_goes_on_and_ends_in_the_same_bytes(imported, target, tmp_path, monkeypatch):
    whole, commits = ShardWriter.commit, []

    def stopping(writer, *rest):
        if len(commits) == 3:
            raise KeyboardInterrupt
        commits.append(writer.shard.number)
        return whole(writer, *rest)

    monkeypatch.setattr(ShardWriter, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(imported / "sf", tmp_path / "cache", model=str(target), layers="1,3,4")
    monkeypatch.undo()

    done = run(imported / "sf", tmp_path / "cache", model=str(target), layers="1,3,4")

    assert done.new_shards == done.shards - 3 > 0
    assert contents(tmp_path / "cache") == contents(imported / "cache")


def test_pieces_of_any_size_give_the_same_bytes(imported, target, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "CHUNK_ROWS", 7)
    run(imported / "sf", tmp_path / "cache", model=str(target), layers="1,3,4")
    assert contents(tmp_path / "cache") == contents(imported / "cache")


def test_a_run_with_nothing_to_do_loads_no_target_and_writes_nothing(imported, target, monkeypatch, capsys):
    before = contents(imported / "cache")
    monkeypatch.setattr("stages.import_cache.layer_convention.load_target", lambda *rest, **more: pytest.fail("loaded"))
    assert run(imported / "sf", imported / "cache", model=str(target), layers="1,3,4").new_shards == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(imported / "cache") == before


def test_a_begun_cache_takes_no_other_files_and_no_other_reading(imported, target, samples, tmp_path):
    out = tmp_path / "cache"
    shutil.copytree(imported / "cache", out)
    with pytest.raises(UsageError, match=r"layers = \[1, 3, 4\], this command asks for \[1, 2, 4\]"):
        run(imported / "sf", out, model=str(target), layers="1,2,4")
    with pytest.raises(UsageError, match="count_from = 0, this command asks for 1"):
        run(imported / "sf", out, model=str(target), layers="1,3,4", count_from=1)
    fewer = write_specforge(tmp_path / "fewer", samples[:-1], LAYERS)
    with pytest.raises(UsageError, match=r"was planned from 12 files .* now holds 11"):
        run(fewer, out, model=str(target), layers="1,3,4")


def test_a_file_that_changed_since_it_was_planned_is_not_taken_for_what_it_was(imported, target, tmp_path):
    shutil.copytree(imported, tmp_path / "here")
    source, out = tmp_path / "here" / "sf", tmp_path / "here" / "cache"
    shutil.rmtree(out / "shards" / "000000")
    for path in source.rglob("*.ckpt"):
        record = torch.load(path, weights_only=True)
        torch.save({**record, "input_ids": record["input_ids"].flip(0)}, path)
    with pytest.raises(DataError, match=r"data_\d+.ckpt: holds other tokens than when it was planned"):
        run(source, out, model=str(target), layers="1,3,4")


def test_damage_is_mended_by_importing_again(imported, target, tmp_path):
    from stages.cache_hidden.repair import suggest_repair, verify_and_repair

    out = tmp_path / "cache"
    shutil.copytree(imported / "cache", out)
    values = next((out / "shards" / "000002" / "aux.1").rglob("c/*/*"))
    values.write_bytes(bytes(values.stat().st_size))
    assert verify(out).damaged and "run the same `pipeline import-cache` again" in suggest_repair(out, None, False)
    with pytest.raises(UsageError, match="was imported, and what it lost"):
        verify_and_repair(out, True, False, str(target), "cpu")

    shutil.rmtree(out / "shards" / "000002")
    run(imported / "sf", out, model=str(target), layers="1,3,4")

    assert contents(out) == contents(imported / "cache")


def test_samples_with_nothing_to_learn_are_left_out_and_counted(target, tmp_path, capsys):
    samples = compute(target, count=24, seed=3)
    samples[5].mask[:] = False
    samples[7].mask[:] = False
    samples[7].mask[2] = True
    source = write_specforge(tmp_path / "sf", samples, LAYERS)

    done = run(source, tmp_path / "cache", model=str(target), layers="1,3,4")

    said = capsys.readouterr().err
    assert done.samples == 22
    assert "left out, nothing supervised: 1, such as" in said and "data_5.ckpt" in said
    assert "left out, too short: 1" in said


def test_a_sample_with_states_that_cannot_be_kept_is_refused_and_two_stop_it_all(target, samples, tmp_path, capsys):
    source = write_specforge(tmp_path / "sf", samples, LAYERS)

    def spoil(number, value):
        path = source / f"rows_0-5000/data_{number}.ckpt"
        record = torch.load(path, weights_only=True)
        record["hidden_states"][2, 40] = value
        torch.save(record, path)

    spoil(3, float("nan"))
    done = run(source, tmp_path / "one", model=str(target), layers="1,3,4")
    assert done.refused == 1
    assert "data_3.ckpt: aux.3 is not finite" in capsys.readouterr().err
    assert [entry["reason"] for entry in describe(tmp_path / "one")["refused"]] == ["aux.3 is not finite"]
    assert not verify(tmp_path / "one").damaged
    assert int(np.sum(HiddenCache.open(tmp_path / "one").samples.ok)) == len(samples) - 1

    spoil(8, float("inf"))
    with pytest.raises(DataError, match=r"2 of 12 samples .*data_\d.ckpt: aux.3 is not finite"):
        run(source, tmp_path / "two", model=str(target), layers="1,3,4")


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A small capture of the bundled target, and what the target computes for its very samples."""
    from stages.cache_hidden.run import run as capture
    from stages.cache_hidden.settings import CaptureOptions

    out = tmp_path_factory.mktemp("captured") / "cache"
    capture(str(BUNDLED), None, out, options=CaptureOptions(max_samples=24, device="cpu"))
    store = HiddenCache.open(out)
    return store, compute_of(BUNDLED, [store.tokens_of(index) for index in range(len(store))])


@pytest.mark.parametrize("form", SAVED)
def test_the_bundled_target_in_every_form_is_imported_verified_and_trained_on(form, captured, tmp_path, capsys):
    store, samples = captured
    source = SAVED[form](tmp_path / form, samples, list(store.layers))
    named = [] if form == "deepspec" else ["--layers", ",".join(map(str, store.layers))]

    for command in (
        ["import-cache", str(source), "--out", str(tmp_path / "cache"), "--model", str(BUNDLED), *named],
        ["verify", str(tmp_path / "cache")],
        ["train-draft", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), *SHORT],
    ):
        commands.main([*command], standalone_mode=False)

    same = HiddenCache.open(tmp_path / "cache")
    assert find_model(None, same)[0] == BUNDLED.resolve()  # what `evaluate` takes
    assert np.array_equal(np.sort(same.samples.sample_id, axis=0), np.sort(store.samples.sample_id, axis=0))
    assert same.layers == store.layers and same.dtype == torch.bfloat16
    gauges = [describe(cache.path)["gauge"] for cache in (same, store)]
    assert abs(gauges[0]["agreement"] - gauges[1]["agreement"]) < 0.02
    result = json.loads((tmp_path / "run" / "done.json").read_text())
    assert result["steps"] == 3 and result["accept_len"] >= 1
