"""A cache that is not all there is named as such: before training, by verify, and not while somebody captures it."""

import contextlib
import shutil

import pytest
from tiny import conversations, write_jsonl

from pipeline.cache.atomic import Scratch, in_use
from pipeline.cache.layout import PLAN, SHARDS
from pipeline.cache.verify import verify
from pipeline.cli import main
from pipeline.errors import CacheError, UsageError
from stages.cache_hidden.repair import repair
from stages.cache_hidden.run import run as capture
from stages.cache_hidden.settings import CaptureOptions
from stages.train_draft.run import run as train

FEW = ("train.steps=2", "draft.block_size=4", "draft.intermediate_size=48")


@pytest.fixture
def cache(tiny_cache, tmp_path):
    return shutil.copytree(tiny_cache, tmp_path / "cache")


@pytest.fixture
def ends(capfd):
    """Runs a command line; returns its exit code, its last line on stderr, and what it printed."""

    def run(*arguments):
        capfd.readouterr()
        with contextlib.suppress(ValueError):
            try:
                main([str(argument) for argument in arguments])
                code = 0
            except SystemExit as left:
                code = left.code or 0
        shown = capfd.readouterr()
        return code, (shown.err.strip().splitlines() or [""])[-1], shown.out

    return run


def marker(cache):
    (cache / SHARDS / "000004" / "aux.1.json").unlink()


def column(cache):
    marker(cache)
    (cache / SHARDS / "000004" / "aux.1.arrow").unlink()
    shutil.rmtree(cache / SHARDS / "000004" / "aux.1")


def last_states(cache):
    (cache / SHARDS / "000004" / "final.json").unlink()


def every_marker(cache):
    for path in cache.glob(f"{SHARDS}/*/aux.1.json"):
        path.unlink()


def shard(cache):
    shutil.rmtree(cache / SHARDS / "000004")


LOST = {
    marker: r"aux\.1 in 14 of 15 shards",
    column: r"aux\.1 in 14 of 15 shards",
    last_states: r"final in 14 of 15 shards",
    every_marker: r"aux\.1 in 0 of 15 shards",
    shard: r"aux\.1 in 14 of 15 shards, aux\.3 in 14 of 15 shards, .*final in 14 of 15 shards",
}


@pytest.mark.parametrize("lose", LOST)
def test_no_draft_is_trained_on_what_happens_to_be_left(cache, tmp_path, lose):
    lose(cache)
    with pytest.raises(CacheError, match=f"is incomplete, and nobody is capturing it: {LOST[lose]}; add them with"):
        train(cache, None, FEW, tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lose", LOST)
def test_verify_names_what_is_lacking_and_ends_with_4(cache, ends, lose):
    lose(cache)
    report = verify(cache)
    assert not report.damaged and report.incomplete
    code, line, shown = ends("verify", cache)
    assert code == 4 and "is incomplete, and nobody is capturing it: " in line and "--repair --model" in line
    assert "\nno damage\n" not in shown and "incomplete: " in shown


def test_stated_layers_are_trained_on_and_the_rest_is_named(cache, tmp_path, ends):
    marker(cache)
    sets = [part for text in (*FEW, "draft.layers=[3,4]") for part in ("--set", text)]
    code, _, shown = ends("train-draft", "--cache", cache, "--out", tmp_path / "run", "--device", "cpu", *sets)
    assert code == 0
    assert "the cache is incomplete: aux.1 in 14 of 15 shards; layers [3, 4] are read" in shown


def test_the_command_that_an_error_names_trains(cache, tmp_path, ends):
    marker(cache)
    code, line, _ = ends("train-draft", "--cache", cache)
    assert code == 4 and '--set "draft.layers=[3,4]"' in line


def test_a_sweep_is_refused_in_the_same_way(cache, tmp_path, ends):
    marker(cache)
    recipe = tmp_path / "sweep.toml"
    recipe.write_text("[sweep]\n'train.seed' = [0, 1]\n")
    code, line, _ = ends("sweep", recipe, "--cache", cache, "--out", tmp_path / "runs")
    assert code == 4 and "aux.1 in 14 of 15 shards" in line


def test_a_capture_in_progress_is_no_damage(cache, tmp_path, ends):
    marker(cache)
    with Scratch(cache, "working"):
        assert in_use(cache)
        assert ends("verify", cache)[0] == 0
        code, line, _ = ends("verify", cache, "--complete")
        assert code == 4 and "is still being captured: aux.1 in 14 of 15 shards; wait until it is done" in line
        with pytest.raises(UsageError, match=r"is being captured: aux\.1 in 14 of 15 shards; wait until it is done"):
            train(cache, None, FEW, tmp_path / "run", "cpu")
    assert not in_use(cache)


def test_what_a_killed_process_left_is_nobody_capturing(cache):
    (cache / "tmp-working-1").mkdir()
    (cache / "tmp-working-1" / "lock").touch()
    (cache / "tmp-commit.lock").touch()
    assert not in_use(cache)
    cache.chmod(0o555)
    assert not in_use(cache)
    cache.chmod(0o755)


def test_a_plan_alone_is_sound_and_not_complete(tiny_target, tiny_corpus, tmp_path, ends):
    arguments = ("--model", tiny_target, "--corpus", tiny_corpus, "--out", tmp_path / "c", "--max-length", 256)
    assert ends("plan", *arguments)[0] == 0
    assert ends("verify", tmp_path / "c")[0] == 0
    code, line, _ = ends("verify", tmp_path / "c", "--complete")
    assert code == 4 and "nothing is captured yet" in line
    code, line, _ = ends("train-draft", "--cache", tmp_path / "c", "--out", tmp_path / "run")
    assert code == 4 and "nothing is captured yet; run `pipeline cache-hidden --model" in line
    code, line, _ = ends("recode", tmp_path / "c", "--codec", "zstd")
    assert code == 2 and "nothing is captured yet" in line
    assert ends("cache-hidden", *arguments, "--layers", "1")[0] == 0
    assert ends("verify", tmp_path / "c", "--complete")[0] == 0


@pytest.mark.parametrize("lose", LOST)
def test_the_same_capture_makes_it_whole_again(tiny_target, tiny_corpus, cache, lose):
    whole = {path.relative_to(cache): path.read_bytes() for path in (cache / SHARDS).rglob("*") if path.is_file()}
    lose(cache)
    options = CaptureOptions(layers="1,3,4", max_length=256)
    if lose is marker:
        repair(cache, str(tiny_target), "cpu")
    else:
        capture(str(tiny_target), str(tiny_corpus), cache, options=options)
    held = {path.relative_to(cache): path.read_bytes() for path in (cache / SHARDS).rglob("*") if path.is_file()}
    assert held == whole and not verify(cache).incomplete


@pytest.fixture
def appended(cache, tiny_target, tmp_path):
    more = write_jsonl(tmp_path / "more.jsonl", [row for row in conversations(40)[24:]])
    capture(str(tiny_target), str(more), cache, options=CaptureOptions(append=True))
    return cache


def test_shards_whose_segment_is_lost_are_not_passed_over(appended, tmp_path, ends):
    for suffix in ("arrow", "json"):
        (appended / PLAN / f"000001.{suffix}").unlink()
    with pytest.raises(CacheError, match="shard 15 is in no segment of the plan, so one is lost"):
        train(appended, None, (*FEW, "draft.layers=[3,4]"), tmp_path / "run", "cpu")
    code, line, _ = ends("verify", appended)
    assert code == 4 and "not in the plan" in line


def test_nothing_is_added_as_the_cache_is_where_it_is_not_whole(cache, tiny_target, tmp_path):
    """The new samples would lack the column, and every draft after them."""
    marker(cache)
    more = write_jsonl(tmp_path / "more.jsonl", conversations(40)[24:])
    with pytest.raises(UsageError, match=r"incomplete, .*: aux\.1 in 14 of 15 shards; finish it with the command"):
        capture(str(tiny_target), str(more), cache, options=CaptureOptions(append=True))
    done = capture(str(tiny_target), str(more), cache, options=CaptureOptions(append=True, layers="1,3,4"))
    assert done.left == 0 and not verify(cache).incomplete
