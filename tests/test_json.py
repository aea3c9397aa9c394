"""With --json a command prints its figures as JSON, and nothing else on standard output."""

import json
import shutil

import click
import pytest
from foreign_maker import compute, write_specforge
from reports import evaluation

from pipeline.cache import HiddenCache
from pipeline.cli import commands, main
from pipeline.evaluation.reports import load_report

WITHOUT_FIGURES = {"completion", "schema"}  # a script, and what is JSON already


def figures(capfd, *words) -> dict:
    capfd.readouterr()
    main([*map(str, words), "--json"])
    return json.loads(capfd.readouterr().out)


def test_every_command_that_prints_figures_has_the_option():
    todo = dict(commands.commands)
    while todo:
        name, command = todo.popitem()
        if isinstance(command, click.Group):
            todo |= command.commands
        elif name not in WITHOUT_FIGURES:
            assert "--json" in {option for each in command.params for option in each.opts}, name


def test_a_capture(capfd, tiny_target, tiny_corpus, tmp_path):
    words = ("cache-hidden", "--model", tiny_target, "--corpus", tiny_corpus, "--out", tmp_path / "c", "--layers", "1")
    first, again = figures(capfd, *words), figures(capfd, *words)
    assert first["new_shards"] == first["shards"] > 0 == again["new_shards"] and first["left"] == 0
    assert first["samples"] == again["samples"] > 0 and first["cache"] == str(tmp_path / "c")


def test_a_recode(capfd, tiny_cache, tmp_path):
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")
    done = figures(capfd, "recode", cache, "--codec", "zstd")
    assert done["columns"] > 0 and 0 < done["bytes_after"] < done["bytes_before"]
    assert figures(capfd, "recode", cache, "--codec", "zstd")["columns"] == 0


def test_an_import(capfd, tiny_target, tmp_path):
    write_specforge(tmp_path / "states", compute(tiny_target, 4), [1, 3])
    words = ("import-cache", tmp_path / "states", "--model", tiny_target, "--layers", "1,3", "--out", tmp_path / "c")
    done = figures(capfd, *words)
    assert done == {"cache": str(tmp_path / "c"), "samples": 4, "shards": 4, "new_shards": 4, "refused": 0}


def test_a_training_and_its_export(capfd, greedy_cache, tmp_path):
    cache = HiddenCache.open(greedy_cache)
    said = {int(token) for number in range(len(cache)) for token in cache.tokens_of(number)[0]}
    unused = max(set(range(cache.target_config["vocab_size"])) - said)
    entries = ("train.steps=1", "train.batch=4", "train.anchors=4", "draft.method=dflash")
    sets = [f"--set={entry}" for entry in (*entries, f"draft.mask_token_id={unused}")]
    words = ("train-draft", "--cache", greedy_cache, "--device", "cpu", *sets, "--out", tmp_path / "run")
    first, again = figures(capfd, *words), figures(capfd, *words)
    assert first == again and first["run"] == str(tmp_path / "run") and first["steps"] == 1
    assert first["interval"][0] <= first["accept_len"] <= first["interval"][1] and first["calls"] > 0
    done = figures(capfd, "export", "--draft", tmp_path / "run", "--out", tmp_path / "draft")
    assert done["parameters"] == first["parameters"] and done["folder"] == str(tmp_path / "draft")


def test_reports_are_the_numbers_of_their_table(capfd, tmp_path):
    base = [evaluation(tmp_path / f"base{seed}.json", "dflash", seed, 600, [("sql", [2, 2])]) for seed in (0, 1)]
    better = [evaluation(tmp_path / f"new{seed}.json", "domino", seed, 600, [("sql", [4, 4])]) for seed in (0, 1)]
    alone = figures(capfd, "report", *better)
    (draft,) = alone["drafts"]
    assert draft["seeds"] == [0, 1] and draft["greedy"]["accept_length"] == 4.0
    assert draft["greedy"]["domains"]["sql"] == {"accept_length": 4.0, "interval": [4.0, 4.0]}
    assert "against" not in alone and alone["target"] == load_report(better[0]).target
    (draft,) = figures(capfd, "report", *better, "--against", base[0], "--against", base[1])["drafts"]
    assert draft["greedy"]["ratio"] == {"value": 2.0, "interval": [2.0, 2.0], "by_seed": [2.0, 2.0]}


def test_what_only_tables_have_is_refused_beside_it(capfd, tmp_path):
    report = evaluation(tmp_path / "a.json", "dflash", 0, 600, [("sql", [2, 2])])
    with pytest.raises(SystemExit) as stop:
        main(["report", str(report), "--json", "--markdown"])
    assert stop.value.code == 2
