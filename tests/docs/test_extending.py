"""The code on the pages docs/extending-*.md works as it stands there."""

import json
import shlex
import shutil

import pytest
import torch
from cache_maker import contents
from documented_lines import ROOT
from documented_runs import add_part, ended, newest

from pipeline.cache import HiddenCache
from pipeline.cache.manifest import read_canonical

SMALL = (
    "--set train.steps=4 --set train.batch=8 --set train.anchors=4 --set train.eval_samples=2 --set train.log_every=1"
)


@pytest.fixture
def cache(made, tmp_path, monkeypatch):
    """A copy of the documentation's cache of the bundled target, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    shutil.copy(made / "few.jsonl", tmp_path)
    return shutil.copytree(made / "hs_cache", tmp_path / "hs_cache")


def test_the_pages_method_is_trained_evaluated_exported_and_checked(cache, monkeypatch):
    add_part("docs/extending-method.md", monkeypatch)
    ended(f"train-draft --set draft.method=bigram --set draft.rank=8 {SMALL}")
    run = newest("runs/bigram-")
    ended(f"evaluate --draft {shlex.quote(run)} --count 2 --max-new 8 --out report.json")
    ended(f"export --draft {shlex.quote(run)} --out out")
    ended("check-export out")
    assert json.loads((cache.parent / "report.json").read_text())["draft"]["method"] == "bigram"


def test_the_pages_codec_stores_within_its_promise(cache, monkeypatch):
    before = HiddenCache.open(cache)
    states = [before.read(index, final=True) for index in range(3)]
    add_part("docs/extending-codec.md", monkeypatch)
    ended("recode hs_cache --codec fixed16")
    ended("verify hs_cache --complete")
    after = HiddenCache.open(cache)
    for index, wanted in enumerate(states):
        found = after.read(index, final=True)
        for a, b in ((wanted.aux, found.aux), (wanted.final, found.final)):
            assert 0 < (a - b).norm() < 1e-3 * a.norm()


def test_the_pages_objective_is_learned_from(cache, monkeypatch):
    add_part("docs/extending-objective.md", monkeypatch)
    ended(f"train-draft --set draft.method=dflash --set draft.objective=shared {SMALL.replace('steps=4', 'steps=12')}")
    (log,) = cache.parent.glob("runs/dflash-*/metrics.jsonl")
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines() if "loss" in json.loads(line)]
    assert 0 < losses[-1] < 0.9 * losses[0]


def test_the_pages_engine_captures_the_bytes_of_the_built_in_one(cache, monkeypatch):
    add_part("docs/extending-engine.md", monkeypatch)
    torch.manual_seed(0)
    ended("cache-hidden --model data/tiny-qwen3 --corpus few.jsonl --out other")
    facts = read_canonical(cache.parent / "other/shards/000000/final.json")["facts"]
    assert facts["engine"] == "layer by layer"
    found, wanted = (
        {name: data for name, data in contents(each).items() if "/c/" in name}
        for each in (cache.parent / "other", cache)
    )
    assert found == wanted and len(found) > 10
