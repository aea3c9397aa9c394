"""An engine only computes: another one gives the same shards to the byte, a wrong one commits nothing."""

import json
import shutil
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

import pytest
import torch
from kill_capture import contents
from tiny import write_jsonl
from torch import nn
from transformers import AutoTokenizer

from pipeline.cache.manifest import read_canonical
from pipeline.errors import ProofError
from pipeline.target.loading import load_target
from stages.cache_hidden.engine import ENGINES
from stages.cache_hidden.run import plan, run
from stages.cache_hidden.settings import CaptureOptions

DATA = Path(__file__).parents[2] / "data"
NOT_FINITE = "~"  # in no chat of the bundled corpus


class LayerByLayer:
    """An engine that calls the target's own modules one after the other, and returns more layers than are asked for."""

    def __init__(self, model):
        self.model, self.device, self.closed = model, model.device, 0
        self.facts = {"engine": "layer by layer", "device": "cpu"}

    def forward(self, ids_BT, lengths_B, layers):
        assert ids_BT.shape == (len(lengths_B), max(lengths_B)) and not self.closed
        assert not any(ids_T[length:].any() for ids_T, length in zip(ids_BT, lengths_B, strict=True))
        decoder = self.model.model
        states = {-1: decoder.embed_tokens(ids_BT)}
        rotations = decoder.rotary_emb(states[-1], torch.arange(ids_BT.shape[1])[None])
        for i, module in enumerate(decoder.layers):
            states[i] = module(states[i - 1], attention_mask=None, position_embeddings=rotations)
        return states, decoder.norm(states[len(decoder.layers) - 1])

    def close(self):
        self.closed += 1


class OneLayerLate(LayerByLayer):
    """Counts layers from 1."""

    def forward(self, ids_BT, lengths_B, layers):
        states, final_BTD = super().forward(ids_BT, lengths_B, layers)
        return {layer: states[layer + 1] for layer in layers}, final_BTD


class WithoutNorm(LayerByLayer):
    """Gives the last layer as `final`, as many an engine does."""

    def forward(self, ids_BT, lengths_B, layers):
        states, _ = super().forward(ids_BT, lengths_B, layers)
        return states, states[len(self.model.model.layers) - 1]


@pytest.fixture
def use(monkeypatch):
    """Return a function that has captures use another engine, and returns the list of those made."""

    def used(kind):
        made = []
        monkeypatch.setitem(ENGINES, "transformers", lambda settings, target: made.append(kind(target)) or made[-1])
        return made

    return used


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The bundled target, but no state is finite from a `~` on."""
    folder = shutil.copytree(DATA / "tiny-qwen3", tmp_path_factory.mktemp("target") / "tiny-qwen3")
    model = load_target(str(folder))
    model.config.tie_word_embeddings = False  # so that the logits stay finite
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.clone())
    with torch.no_grad():
        model.model.embed_tokens.weight[AutoTokenizer.from_pretrained(folder).encode(NOT_FINITE)] = float("nan")
    model.save_pretrained(folder)
    return folder


def some_chats(path, count):
    """Write the first of the bundled chats, one of them with a `~`; return the file."""
    with (DATA / "chats.jsonl").open() as file:
        chats = [json.loads(line) for line in islice(file, count)]
    chats[3]["messages"][-1]["content"] += NOT_FINITE
    return write_jsonl(path, chats)


def files_and_facts(cache):
    """Return the cache's files without its manifests, and the manifests without what an engine states about itself."""
    files = contents(cache)
    paths = [path for path in files if fnmatch(path, "shards/*/*.json") and path.count("/") == 2]
    manifests = {path: read_canonical(cache / path) for path in paths}
    stated = {"engine", "device", "attention", "transformers", "torch"}
    for path, manifest in manifests.items():
        del files[path], manifest["hash"]
        manifest["facts"] = {name: fact for name, fact in manifest["facts"].items() if name not in stated}
    return files, manifests


def test_another_engine_captures_the_same_bytes(target, tmp_path, use):
    """In every codec, and with a sample that is refused."""
    corpus = some_chats(tmp_path / "chats.jsonl", 80)  # of fewer, int8 does not learn how far `final` varies
    codecs = "aux.-1=raw,aux.1=zstd,aux.3=int8,final=int8"
    options = CaptureOptions(layers="-1,1,3", codec=codecs, device="cpu", batch_tokens=512)
    by_hf = run(str(target), str(corpus), tmp_path / "hf", options=options)
    made = use(LayerByLayer)
    by_other = run(str(target), str(corpus), tmp_path / "other", options=options)

    assert by_other == by_hf and by_hf.refused == 1
    files, manifests = files_and_facts(tmp_path / "other")
    assert (files, manifests) == files_and_facts(tmp_path / "hf")
    assert len(manifests) == 4 * by_hf.shards and len(files) > 3 * len(manifests)
    facts = read_canonical(tmp_path / "other/shards/000000/final.json")["facts"]
    assert (facts["engine"], facts["device"]) == ("layer by layer", "cpu") and "transformers" not in facts
    assert [engine.closed for engine in made] == [1]


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (OneLayerLate, r"stored as layer 1 .*layer 2 fits better"),
        (WithoutNorm, r"stored as `final` .*the last norm is missing"),
    ],
)
def test_a_wrong_engine_commits_nothing(tiny_target, tiny_corpus, tmp_path, use, kind, found):
    made = use(kind)
    options = CaptureOptions(layers="1,3", max_length=256)
    with pytest.raises(ProofError, match=found) as error:
        run(str(tiny_target), str(tiny_corpus), tmp_path / "cache", options=options)
    assert error.value.code == 1 and [engine.closed for engine in made] == [1]
    assert not list(tmp_path.glob("cache/shards/*/*.json")) and not list(tmp_path.glob("cache/tmp-*"))


def test_the_time_of_a_capture_is_estimated_by_its_engine(tiny_target, tiny_corpus, tmp_path, use):
    made = use(LayerByLayer)
    options = CaptureOptions(layers="1,3", max_length=256)
    report = plan(str(tiny_target), str(tiny_corpus), tmp_path / "cache", options=options, probe=True)
    assert report["time"]["tokens_s"] > 0 and [engine.closed for engine in made] == [1]
