"""Appending a corpus to a cache: existing samples stay, new ones are captured once, and training notices."""

import shlex
import shutil

import pytest
from kill_capture import contents
from tiny import conversations, write_jsonl

from pipeline.cache import HiddenCache
from pipeline.cache.plan import load_plan
from pipeline.cache.verify import verify
from pipeline.cli import main
from pipeline.errors import UsageError
from stages.cache_hidden.run import plan, run
from stages.cache_hidden.settings import CaptureOptions

MORE = conversations(24) + conversations(20, seed=1)  # the first 24 are there already


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("more") / "more.jsonl", MORE)


@pytest.fixture(scope="module")
def appended(tiny_cache, tiny_target, more, tmp_path_factory):
    """The tiny cache with more corpus added to it, named without its layers. Read-only."""
    cache = shutil.copytree(tiny_cache, tmp_path_factory.mktemp("appended") / "cache")
    run(str(tiny_target), str(more), cache, options=CaptureOptions(max_length=256, append=True))
    return cache


@pytest.fixture
def cache(appended, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(appended, tmp_path / "cache")


def derived(name: str) -> bool:
    return name.startswith("index.")


def test_what_is_there_stays_and_only_new_samples_come(tiny_cache, appended):
    before, after = contents(tiny_cache), contents(appended)
    assert all(after[name] == data for name, data in before.items() if not derived(name))

    plan, first = load_plan(appended), load_plan(tiny_cache)
    assert (plan.samples, plan.duplicates, len(plan.manifests)) == (44, 24, 2)
    assert plan.notes["rows"] == 24 + 44, "what planning noted is added up"
    assert len(HiddenCache.open(appended)) == 44
    ids = [HiddenCache.open(appended).samples.hex(i) for i in range(44)]
    assert len(set(ids)) == 44 and ids[:24] == [HiddenCache.open(tiny_cache).samples.hex(i) for i in range(24)]
    assert {shard.number for shard in plan.shards} == set(range(len(plan.shards))) > {s.number for s in first.shards}


def test_the_new_samples_have_every_column_the_cache_has(appended):
    """The command named no layers: by rule they are 1 and 3, and layer 4 would have been lost to training."""
    opened = HiddenCache.open(appended)
    assert opened.layers == (1, 3, 4) and opened.has_final
    assert opened.read(43, final=True).aux.shape[0] == 3
    report = verify(appended)
    assert not report.damaged and not report.missing and not report.foreign


def test_the_digest_changes_and_the_cache_knows_what_it_was(tiny_cache, appended):
    before, after = HiddenCache.open(tiny_cache), HiddenCache.open(appended)
    assert after.digest != before.digest
    assert (before.earlier_digests, after.earlier_digests) == ([], [before.digest])


def test_a_training_run_of_the_smaller_cache_is_refused_with_the_reason(tiny_cache, appended, tmp_path):
    from pipeline.runs.folder import create_or_check
    from pipeline.runs.recipe import load_recipe, resolve
    from pipeline.runs.training_data import split_samples

    for cache in (tiny_cache, appended):
        opened = HiddenCache.open(cache)
        resolved = resolve(load_recipe(None), opened).with_steps(20)
        split = split_samples(opened, resolved.draft.mask_token_id, 0.1)
        if cache is tiny_cache:
            create_or_check(tmp_path / "run", resolved, opened, split, {})
            continue
        with pytest.raises(UsageError, match=r"has grown by an append since\); .*another --out"):
            create_or_check(tmp_path / "run", resolved, opened, split, {})


@pytest.mark.parametrize("append", [True, False])
def test_a_rerun_of_either_corpus_has_nothing_to_do(tiny_target, tiny_corpus, more, cache, append, capsys):
    before = contents(cache)
    for corpus in (tiny_corpus, more, tiny_corpus):
        options = CaptureOptions(layers="1,3,4", max_length=256, append=append)
        assert run(str(tiny_target), str(corpus), cache, options=options).new_shards == 0
    assert capsys.readouterr().out.count("nothing to do") == 3
    assert contents(cache) == before


def test_a_corpus_of_known_samples_adds_none(tiny_target, cache, tmp_path, capsys):
    before = contents(cache)
    part = write_jsonl(tmp_path / "part.jsonl", MORE[20:30])
    done = run(str(tiny_target), str(part), cache, options=CaptureOptions(max_length=256, append=True))
    assert (done.new_shards, done.samples) == (0, 44)
    assert "part.jsonl adds none, all are among the 44 there" in capsys.readouterr().err
    assert contents(cache) == before


def test_the_command_printed_for_an_append_works_though_it_adds_nothing(tiny_target, cache, tmp_path, capsys):
    part = write_jsonl(tmp_path / "part.jsonl", MORE[20:30])
    planned = plan(str(tiny_target), str(part), cache, options=CaptureOptions(max_length=256, append=True))
    main(shlex.split(planned["command"])[1:])
    assert "nothing to do" in capsys.readouterr().out


def test_another_corpus_is_not_added_without_append(tiny_target, cache, tmp_path):
    before, other = contents(cache), write_jsonl(tmp_path / "other.jsonl", conversations(5, seed=9))
    for options, says in [
        ({}, r"was planned from chats\.jsonl .* and from more\.jsonl .*, this command names other\.jsonl .*--append"),
        ({"append": True, "max_length": 200}, r"samples\.max_length = 256, this command asks for 200"),
        ({"append": True, "dtype": "bfloat16"}, r"capture\.dtype = 'float32', this command asks for 'bfloat16'"),
    ]:
        with pytest.raises(UsageError, match=says):
            run(str(tiny_target), str(other), cache, options=CaptureOptions(**{"max_length": 256, **options}))
    with pytest.raises(UsageError, match="name it with --corpus"):
        run(str(tiny_target), None, cache, options=CaptureOptions(append=True))
    with pytest.raises(UsageError, match="there is none at"):
        run(str(tiny_target), str(other), tmp_path / "no", options=CaptureOptions(append=True))
    assert contents(cache) == before and not (tmp_path / "no").exists()


def test_a_layer_added_to_an_appended_cache_is_one_pass_that_writes_only_it(tiny_target, more, cache):
    before = contents(cache)
    options = CaptureOptions(layers="2", max_length=256)
    done = run(str(tiny_target), str(more), cache, options=options)
    after = contents(cache)
    assert done.new_shards == done.shards == len(load_plan(cache).shards)
    assert {name: after[name] for name in before} == before
    assert all("/aux.2" in name for name in after.keys() - before.keys())
    assert HiddenCache.open(cache).layers == (1, 2, 3, 4)


def test_an_old_shard_captured_again_after_an_append_has_its_old_bytes(tiny_target, tiny_corpus, cache):
    """Whatever is drawn from the plan, such as the on-policy rows, is drawn from the segment that a shard is of."""
    before = contents(cache)
    shutil.rmtree(cache / "shards/000002")
    options = CaptureOptions(layers="1,3,4", max_length=256)
    assert run(str(tiny_target), str(tiny_corpus), cache, options=options).new_shards == 1
    assert contents(cache) == before


def test_more_of_the_same_corpus_is_an_append_too(tiny_target, tiny_corpus, tmp_path):
    out, options = tmp_path / "cache", {"layers": "1", "max_length": 256}
    assert run(str(tiny_target), str(tiny_corpus), out, options=CaptureOptions(max_samples=7, **options)).samples == 7
    done = run(str(tiny_target), str(tiny_corpus), out, options=CaptureOptions(append=True, **options))
    assert done.samples == 24 and len(load_plan(out).manifests) == 2
    for cap in (7, None):
        again = CaptureOptions(max_samples=cap, **options)
        assert run(str(tiny_target), str(tiny_corpus), out, options=again).new_shards == 0


def test_an_append_stopped_after_its_plan_continues_with_the_same_command(
    tiny_target, tiny_cache, more, appended, tmp_path, monkeypatch
):
    out = shutil.copytree(tiny_cache, tmp_path / "stopped")
    command = (str(tiny_target), str(more), out)
    options = CaptureOptions(max_length=256, append=True)

    def interrupt(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stages.cache_hidden.capture.capture_shards", interrupt)
        run(*command, options=options)
    assert not verify(out).damaged
    run(*command, options=options)
    assert contents(out) == contents(appended)
