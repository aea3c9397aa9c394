"""The digest covers what is loaded, and a cache takes states only of the weights that it began with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import config, conversations, random_model, save_target, write_jsonl

from pipeline.cache.catalog import Catalog, target_json
from pipeline.cache.layout import WEIGHTS
from pipeline.errors import UsageError
from pipeline.target.files import WEIGHTS_INDEX
from pipeline.target.loading import load_target
from pipeline.target.weights import check_weights, target_digest, weight_facts, weight_files, weights_digest
from stages.cache_hidden import capture as shards
from stages.cache_hidden.run import plan, run
from stages.cache_hidden.settings import CaptureOptions

ONE = "model-00001-of-00001.safetensors"


@pytest.fixture
def folder(tiny_target, tmp_path):
    return shutil.copytree(tiny_target, tmp_path / "target")


def other_weights(path: Path, add: float = 1.0) -> None:
    tensors = {name: tensor + add for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def write_index(folder: Path, name: str) -> None:
    names = load_file(folder / "model.safetensors").keys()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index))


def change_config(folder: Path, **facts) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def two_sets(folder):
    shutil.copyfile(folder / "model.safetensors", folder / ONE)
    write_index(folder, ONE)


def led_out(folder):
    shutil.copytree(folder, folder.parent / "elsewhere")
    write_index(folder, "../elsewhere/model.safetensors")
    (folder / "model.safetensors").rename(folder / "kept")


def below(folder):
    (folder / "sub").mkdir()
    write_index(folder, "sub/model.safetensors")
    (folder / "model.safetensors").rename(folder / "sub" / "model.safetensors")


def absolute(folder):
    write_index(folder, str(folder.parent / "x.safetensors"))
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")


def a_pickle(folder):
    write_index(folder, "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_names(folder):
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {"a": ["list"], "b": None}}))
    (folder / "model.safetensors").unlink()


def named_by_the_config(folder):
    shutil.copyfile(folder / "model.safetensors", folder / "other.safetensors")
    change_config(folder, transformers_weights="other.safetensors")


def another_config(folder):
    shutil.copyfile(folder / "config.json", folder / "config.4.0.0.json")
    change_config(folder, configuration_files=["config.4.0.0.json"])


def an_adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (two_sets, "holds two sets of weights, model.safetensors and what model.safetensors.index.json names; move"),
        (led_out, r"names '\.\./elsewhere/model\.safetensors', wanted safetensors files beside it"),
        (below, "names 'sub/model.safetensors', wanted safetensors files beside it"),
        (absolute, "wanted safetensors files beside it"),
        (a_pickle, "names 'pytorch_model.bin', wanted safetensors files beside it"),
        (no_names, "wanted safetensors files beside it"),
        (named_by_the_config, r"sends readers to other files \(transformers_weights\)"),
        (another_config, r"sends readers to other files \(configuration_files\)"),
        (an_adapter, r"holds an adapter beside the weights \(adapter_config.json\)"),
    ],
)
def test_weights_that_are_loaded_and_not_digested_are_refused(folder, tiny_corpus, change, says):
    change(folder)
    for use in (target_digest, weight_facts, lambda folder: load_target(str(folder))):
        with pytest.raises(UsageError, match=says) as found:
            use(folder)
        assert "\n" not in str(found.value)
    with pytest.raises(UsageError, match=says):
        run(str(folder), str(tiny_corpus), folder.parent / "cache", options=CaptureOptions(layers="1"))
    assert not (folder.parent / "cache").exists()


def left_over_shards(folder):
    for name in ("model-00002-of-00002.safetensors", "consolidated.safetensors", "model.fp16.safetensors"):
        shutil.copyfile(folder / "model.safetensors", folder / name)
        other_weights(folder / name)


def pickles(folder):
    torch.save({"model.norm.weight": torch.zeros(32)}, folder / "pytorch_model.bin")


def an_index_of_the_one(folder):
    write_index(folder, "model.safetensors")


@pytest.mark.parametrize("add", [left_over_shards, pickles, an_index_of_the_one])
def test_files_that_are_not_loaded_change_neither_states_nor_digest(folder, tiny_target, add):
    add(folder)
    assert target_digest(folder) == target_digest(tiny_target)
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]
    held, wanted = load_target(str(folder)).state_dict(), load_target(str(tiny_target)).state_dict()
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A target of more than 2 MiB, in whose middle the digest of a cache's identity does not look."""
    folder = save_target(tmp_path_factory.mktemp("large") / "target")
    random_model(config(vocab_size=20_000, hidden_size=32)).save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > 4 << 20
    return folder


@pytest.fixture(scope="module")
def captured(large, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured")
    corpus = write_jsonl(folder / "chats.jsonl", conversations(6))
    run(str(large), str(corpus), folder / "cache", options=CaptureOptions(layers="1", max_length=128))
    return folder


def flip_the_middle(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def tree(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def changed(large, captured, tmp_path):
    """The target, one bit of its middle changed; a copy of the cache, and of its corpus with more samples."""
    folder = shutil.copytree(large, tmp_path / large.name)
    flip_the_middle(folder)
    assert target_digest(folder) == target_digest(large)
    shutil.copytree(captured / "cache", tmp_path / "cache")
    write_jsonl(tmp_path / "more.jsonl", conversations(12)[6:])
    return folder


LATER = {
    "another layer": lambda target, corpus, more, out: run(target, corpus, out, options=CaptureOptions(layers="1,3")),
    "append": lambda target, corpus, more, out: run(target, more, out, options=CaptureOptions(append=True)),
    "plan of more": lambda target, corpus, more, out: plan(target, more, out, options=CaptureOptions(append=True)),
}


@pytest.mark.parametrize("how", LATER)
def test_weights_changed_in_their_middle_are_not_captured_from(how, captured, changed, tmp_path):
    before, out = tree(tmp_path / "cache"), tmp_path / "cache"
    with pytest.raises(UsageError, match=r"model\.safetensors is not the file that .* captured with \(xxh3 ") as found:
        LATER[how](str(changed), str(captured / "chats.jsonl"), str(tmp_path / "more.jsonl"), out)
    assert "\n" not in str(found.value)
    assert tree(out) == before


def test_a_repair_takes_nothing_from_changed_weights(changed, tmp_path):
    from stages.cache_hidden.repair import repair

    lost = tmp_path / "cache" / "shards" / "000000" / "aux.1.json"
    lost.unlink()
    before = tree(tmp_path / "cache")
    with pytest.raises(UsageError, match="is not the file that"):
        repair(tmp_path / "cache", str(changed), "cpu")
    after = tree(tmp_path / "cache")
    assert not lost.exists() and {*before} == {*after}


def test_a_repair_of_half_a_target_folder_takes_nothing_from_changed_weights(changed, tmp_path):
    from stages.cache_hidden.repair import repair

    (tmp_path / "cache" / "target" / "head.safetensors").unlink()
    with pytest.raises(UsageError, match="is not the file that"):
        repair(tmp_path / "cache", str(changed), "cpu")


def test_a_worker_that_loads_other_weights_than_those_stored_writes_nothing(changed, captured, tmp_path, monkeypatch):
    """It looked before they were stored, and they were when it had loaded its own."""
    monkeypatch.setattr("stages.cache_hidden.run.check_weights_if_recorded", lambda *_: None)
    monkeypatch.setattr(shards, "ShardWriter", lambda *_: pytest.fail("a shard was begun"))
    with pytest.raises(UsageError, match="is not the file that"):
        LATER["another layer"](str(changed), str(captured / "chats.jsonl"), "", tmp_path / "cache")


def test_unchanged_weights_are_captured_from_and_read_once(captured, large, tmp_path, monkeypatch):
    from pipeline.cache.manifest import FileFact
    from pipeline.target.weights import _fact

    read, whole = [], FileFact.of_file
    monkeypatch.setattr(FileFact, "of_file", lambda path: read.append(path.name) or whole(path))
    _fact.cache_clear()
    out = shutil.copytree(captured / "cache", tmp_path / "cache")
    done = run(str(large), str(captured / "chats.jsonl"), out, options=CaptureOptions(layers="1,3"))
    assert done.new_shards == done.shards
    assert read.count("model.safetensors") == 1
    check_weights(Catalog(out), large)


def test_a_file_more_or_less_is_named(captured, changed, tmp_path):
    random_model(config(vocab_size=20_000, hidden_size=32)).save_pretrained(changed, max_shard_size="3MB")
    (changed / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model-00001-of-0000\d\.safetensors .*the cache knows no such file"):
        check_weights(Catalog(tmp_path / "cache"), changed)


def test_the_weights_digest_sees_every_byte(large, changed):
    assert weights_digest(large) == weights_digest(large) != weights_digest(changed)


def test_the_digests_kept_are_of_the_files_themselves(captured, large):
    kept = target_json(Catalog(captured / "cache"), WEIGHTS)
    assert kept == weight_facts(large)
    assert kept["model.safetensors"]["size"] == (large / "model.safetensors").stat().st_size


def test_nothing_is_evaluated_with_changed_weights(captured, changed, large):
    from pipeline.cache import HiddenCache
    from stages.evaluate.run import find_model

    store = HiddenCache.open(captured / "cache")
    assert find_model(str(large), store)[0] == large
    with pytest.raises(UsageError, match="is not the file that"):
        find_model(str(changed), store)


def test_a_tokenizer_that_is_read_from_a_file_that_is_not_digested_is_refused(folder, tiny_corpus, tmp_path):
    shutil.copyfile(folder / "tokenizer.json", folder / "tokenizer.4.0.0.json")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fast_tokenizer_files": ["tokenizer.4.0.0.json"]}))
    with pytest.raises(UsageError, match=r"sends readers to other files \(fast_tokenizer_files\)"):
        plan(str(folder), str(tiny_corpus), tmp_path / "cache", options=CaptureOptions())
