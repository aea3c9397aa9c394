"""`pipeline recipe show`: what a recipe becomes, and where each value comes from."""

import json
import tomllib

import pytest
from runs.test_recipe import QWEN3_8B, QWEN3_TOKENS, cache_of, write

from pipeline.cli import main
from pipeline.drafts import DRAFTS
from pipeline.runs.recipe import load_recipe, make_recipe, resolve
from pipeline.runs.recipe_origins import of_the_cache, without_cache

SMALL = QWEN3_8B | {"hidden_size": 128, "num_hidden_layers": 6, "head_dim": 32, "vocab_size": 1280}
SMALL_TOKENS = QWEN3_TOKENS | {"pad": 0, "eos": [1], "length": 1271}
SETS = [(), ("train.steps=40",), ("draft.weighting=dpace",), ("draft.objective=kl",), ("draft.block_size=8",)]


def shown(capsys, *words) -> str:
    main(["recipe", "show", *map(str, words)])
    return capsys.readouterr().out


@pytest.mark.parametrize("method", DRAFTS)
@pytest.mark.parametrize("sets", SETS, ids=" ".join)
def test_what_is_known_without_a_cache_is_so_with_every_cache_and_the_rest_is_named(method, sets):
    recipe = load_recipe(None, (f"draft.method={method}", *sets))
    known, still_open = without_cache(recipe).model_dump(exclude_none=True), of_the_cache(recipe)
    for cache in (cache_of(), cache_of(SMALL, SMALL_TOKENS, layers=(1, 3))):
        completed = resolve(recipe, cache).with_steps(800).recipe.model_dump(exclude_none=True)
        for section, fields in completed.items():
            epochs = {"epochs"} if section == "train" else set()  # they become steps
            assert {
                name: known[section][name] for name in fields.keys() & known[section].keys()
            }.items() <= fields.items()
            assert fields.keys() - known[section].keys() == set(still_open[section])
            assert known[section].keys() - fields.keys() <= epochs


def test_each_value_says_where_it_comes_from(capsys, tmp_path):
    path = write(tmp_path, "[draft]\nblock_size = 8\n[train]\nanchors = 8\nlr = 1e-3\n")
    found = json.loads(shown(capsys, path, "--set", "train.lr=2e-3", "--json"))
    assert found["draft"]["block_size"] == {"value": 8, "from": "recipe"}
    assert found["train"]["lr"] == {"value": 2e-3, "from": "--set"}
    assert found["train"]["clip"] == {"value": 1.0, "from": "default"}
    assert "layers" in found["decided_by_cache"]["draft"] and "steps" in found["decided_by_cache"]["train"]
    text = shown(capsys, path)
    assert make_recipe(tomllib.loads(text), (), "it").digest() == without_cache(load_recipe(path)).digest()
    assert any(line.split() == ["#", "steps", "#", "the", "cache", "decides"] for line in text.splitlines())


def test_a_bundled_recipe_goes_by_its_name_and_a_file_of_that_name_goes_first(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = json.loads(shown(capsys, "dspark", "--json"))
    assert found["draft"]["method"]["value"] == "dspark" and found["train"]["batch"]["from"] == "recipe"
    with pytest.raises(SystemExit):
        main(["recipe", "show", "configs/dspark.toml"])  # a path means that file alone
    assert "bundled: demo, dflash, domino, dspark, sweep" in capsys.readouterr().err
    (tmp_path / "dspark").write_text("[draft]\nblock_size = 8\n")
    assert json.loads(shown(capsys, "dspark", "--json"))["draft"]["block_size"]["from"] == "recipe"


def test_with_a_cache_it_shows_the_recipe_that_a_training_writes_into_its_run(capsys, tmp_path, tiny_cache):
    sets = [f"--set={entry}" for entry in ("train.steps=1", "train.batch=4", "train.anchors=4", "draft.method=dflash")]
    words = [*sets, "--cache", str(tiny_cache)]
    text = shown(capsys, *words)
    main(["train-draft", *words, "--device", "cpu", "--out", str(tmp_path / "run")])
    assert load_recipe(tmp_path / "run/recipe.toml") == make_recipe(tomllib.loads(text), (), "it")
    capsys.readouterr()
    found = json.loads(shown(capsys, *words, "--json"))
    assert found["draft"]["layers"] == {"value": [1, 3, 4], "from": "cache"} and "decided_by_cache" not in found
    assert found["cache"] == str(tiny_cache)


@pytest.mark.parametrize("entry", ["draft.method=eagle", "draft.markov_rank=8", "train.stepps=3"])
def test_a_recipe_that_cannot_be_trained_is_refused_without_a_cache_too(capsys, entry):
    with pytest.raises(SystemExit) as stop:
        main(["recipe", "show", "--set", entry])
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err
