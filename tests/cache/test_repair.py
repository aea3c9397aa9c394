"""`verify --repair`: exactly what is damaged is made again, with the bytes that were lost, else nothing is touched."""

import os
import shutil
import threading

import pytest
from cache_maker import flip
from kill_capture import contents
from tiny import conversations, other_weights, write_jsonl

import pipeline.cache.atomic as disk
from pipeline.cache.catalog import Catalog
from pipeline.cache.layout import IDENTITY, INDEX, PLAN, SAMPLES
from pipeline.cache.manifest import canonical, read_canonical
from pipeline.cache.verify import verify
from pipeline.errors import CacheError, UsageError
from stages.cache_hidden.repair import _recapture_settings as repair_settings
from stages.cache_hidden.repair import check_model, repair, verify_and_repair
from stages.cache_hidden.run import run
from stages.cache_hidden.settings import CaptureOptions

VALUES = "shards/000003/aux.3/c/0/0"


@pytest.fixture
def cache(tiny_cache, tmp_path):
    return shutil.copytree(tiny_cache, tmp_path / "cache")


@pytest.fixture
def captured(monkeypatch):
    """The (shard, column)s that were captured again, as they are written."""
    from pipeline.cache.writer import ShardWriter

    seen, right = set(), ShardWriter.commit

    def noted(self, *arguments):
        seen.update((self.shard.number, name) for name in self._streams)
        return right(self, *arguments)

    monkeypatch.setattr(ShardWriter, "commit", noted)
    return seen


def stamps(cache) -> dict:
    files = (path for path in cache.rglob("*") if path.is_file())
    return {path.relative_to(cache).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


DAMAGE = {
    "a flipped bit of the values": (lambda cache: flip(cache / VALUES, 777), {(3, "aux.3")}),
    "values cut short": (lambda cache: os.truncate(cache / VALUES, 100), {(3, "aux.3")}),
    "values deleted": (lambda cache: shutil.rmtree(cache / "shards/000003/aux.3"), {(3, "aux.3")}),
    "the array's metadata": (lambda cache: flip(cache / "shards/000002/final/zarr.json", 9), {(2, "final")}),
    "checksums": (lambda cache: flip(cache / "shards/000003/aux.1.arrow", 3001), {(3, "aux.1")}),
    "a manifest": (lambda cache: flip(cache / "shards/000003/final.json", 900), {(3, "final")}),
    "a manifest deleted": (lambda cache: (cache / "shards/000003/aux.4.json").unlink(), {(3, "aux.4")}),
    "two columns of two shards": (
        lambda cache: (flip(cache / VALUES, 5), (cache / "shards/000005/aux.1.json").unlink()),
        {(3, "aux.3"), (5, "aux.1")},
    ),
    "a whole shard": (
        lambda cache: shutil.rmtree(cache / "shards/000004"),
        {(4, "aux.1"), (4, "aux.3"), (4, "aux.4"), (4, "final")},
    ),
    "samples": (lambda cache: flip(cache / f"shards/000001/{SAMPLES}", 4000), set()),
    "samples deleted": (lambda cache: (cache / f"shards/000001/{SAMPLES}").unlink(), set()),
    "the index": (lambda cache: flip(cache / INDEX, 4000), set()),
    "the plan": (lambda cache: flip(cache / PLAN / "000000.arrow", 40_000), set()),
    "the plan deleted, and values": (
        lambda cache: ((cache / PLAN / "000000.arrow").unlink(), flip(cache / VALUES, 1)),
        {(3, "aux.3")},
    ),
    "the head": (lambda cache: flip(cache / "target/head.safetensors", 40_000), set()),
    "a file of the tokenizer": (lambda cache: (cache / "target/tokenizer.json").unlink(), set()),
    "the target's manifest": (lambda cache: flip(cache / "target/manifest.json", 80), set()),
    "cache.json": (lambda cache: flip(cache / IDENTITY, 80), set()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_comes_back_as_it_was_and_the_rest_is_not_touched(tiny_target, cache, captured, damage):
    whole, before = contents(cache), stamps(cache)
    spoil, lost = DAMAGE[damage]
    spoil(cache)
    spoilt = stamps(cache)
    changed = {name for name, stamp in before.items() if spoilt.get(name) != stamp}

    report = repair(cache, str(tiny_target), "cpu")

    assert not report.damaged and not report.missing
    assert contents(cache) == whole
    assert captured == lost
    after = stamps(cache)
    redone = {name for name, stamp in before.items() if after[name] != stamp} - changed - {"capture.log"}
    own = tuple(f"shards/{shard:06d}/{column}" for shard, column in lost)
    assert all(name.startswith(own) for name in redone), redone
    assert not list(cache.rglob("tmp-*"))


def test_swapped_shards_are_captured_again(tiny_target, cache):
    whole = contents(cache)
    (cache / "shards/000000").rename(cache / "aside")
    (cache / "shards/000001").rename(cache / "shards/000000")
    (cache / "aside").rename(cache / "shards/000001")

    assert not repair(cache, str(tiny_target), "cpu").damaged
    assert contents(cache) == whole


def test_a_column_of_another_cache_is_replaced(tiny_target, cache, capsys):
    """Left in `shards/` by a copy that went wrong: it has the right sizes, and counts neither as captured nor whole."""
    whole, folder = contents(cache), cache / "shards/000002"
    manifest = read_canonical(folder / "aux.1.json")
    manifest.pop("hash")
    (folder / "aux.1.json").write_bytes(canonical({**manifest, "cache": "0" * 32}))

    assert not repair(cache, str(tiny_target), "cpu").damaged
    assert contents(cache) == whole


def test_what_needs_no_target_asks_for_none_and_what_does_says_so(tiny_target, cache):
    whole = contents(cache)
    flip(cache / INDEX, 4000)
    assert not repair(cache, None, None).damaged and contents(cache) == whole
    assert not repair(cache, None, None).damaged, "and with nothing damaged nothing is done"
    flip(cache / VALUES, 777)
    with pytest.raises(
        UsageError, match=r"only the target can make again what .* has lost or lacks; .*--model .*tiny-random`"
    ):
        repair(cache, None, None)


def test_another_target_repairs_nothing(tiny_target, cache, tmp_path):
    other = shutil.copytree(tiny_target, tmp_path / "other")
    other_weights(other)
    flip(cache / VALUES, 777)
    spoilt = contents(cache)
    with pytest.raises(UsageError, match=r"target\.digest = "):
        repair(cache, str(other), "cpu")
    assert contents(cache) == spoilt


def test_a_plan_that_nothing_gives_any_more_says_what_to_do(tiny_target, cache):
    (cache / PLAN / "000000.json").unlink()
    assert any(finding.file == PLAN for finding in verify(cache).damaged)
    with pytest.raises(CacheError, match=r"same corpora in the same order"):
        repair(cache, str(tiny_target), "cpu")


def test_an_old_manifest_comes_back_whatever_versions_made_it(tiny_target, cache, capsys):
    """As long as the same values come out; else it is said that they are others."""
    folder = cache / "shards/000003"
    manifest = read_canonical(folder / "aux.3.json")
    manifest.pop("hash")
    manifest["facts"]["torch"] = "1.0"
    (folder / "aux.3.json").write_bytes(canonical(manifest))
    whole = contents(cache)
    flip(folder / "aux.3/c/0/0", 777)
    assert not repair(cache, str(tiny_target), "cpu").damaged
    assert contents(cache) == whole and "not the bytes" not in capsys.readouterr().err

    manifest["files"]["aux.3/c/0/0"]["xxh3"] = "0" * 32
    (folder / "aux.3.json").write_bytes(canonical(manifest))
    assert not repair(cache, str(tiny_target), "cpu").damaged
    assert "shard 000003, aux.3: right by the probe, but not the bytes that were lost" in capsys.readouterr().err


def test_who_waited_for_another_repair_does_not_make_it_all_again(tiny_target, cache, captured, tmp_path, monkeypatch):
    """Both saw the damage; were both to replace the columns, the first would end on files that the second removes."""
    whole, good = contents(cache), (cache / VALUES).read_bytes()
    flip(cache / VALUES, 777)
    waits, sleep = threading.Event(), disk.time.sleep
    monkeypatch.setattr(disk.time, "sleep", lambda seconds: (waits.set(), sleep(seconds)))
    found = []
    second = threading.Thread(target=lambda: found.append(repair(cache, str(tiny_target), "cpu")))
    with disk.process_lock(cache, "repair"):
        second.start()
        assert waits.wait(60)
        (cache / VALUES).write_bytes(good)
    second.join()

    assert captured == set() and contents(cache) == whole
    assert not found[0].damaged


def test_a_repair_says_what_it_makes(tiny_target, cache, capsys):
    (cache / "target/head.safetensors").unlink()
    assert not repair(cache, str(tiny_target), "cpu").damaged
    assert capsys.readouterr().err == "what the cache holds of the target is made again\n"


def test_a_repair_counts_the_files_it_looked_at_again(tiny_target, cache):
    flip(cache / VALUES, 777)
    report = repair(cache, str(tiny_target), "cpu")
    assert 15 < report.files < verify(cache).files and not report.foreign


def test_the_target_of_a_repair_is_of_the_revision_that_was_captured(tiny_target, cache, monkeypatch):
    """`verify` has no --revision: a hub name alone would give what the hub has today."""
    identity = {key: value for key, value in read_canonical(cache / IDENTITY).items() if key != "hash"}
    identity["target"]["revision"] = "abc"
    asked = []
    find = lambda model, revision=None: asked.append(revision) or tiny_target  # noqa: E731
    monkeypatch.setattr("stages.cache_hidden.settings.find_target", find)
    monkeypatch.setattr("stages.cache_hidden.repair.find_target", find)
    (cache / IDENTITY).write_bytes(canonical(identity))

    repair_settings(Catalog(cache), {}, "org/name")
    with pytest.raises(CacheError, match="belongs to another cache"):
        check_model(cache, "org/name")
    assert asked == ["abc", "abc"]


def test_an_appended_cache_is_repaired_to_its_bytes(tiny_target, cache, tmp_path):
    more = write_jsonl(tmp_path / "more.jsonl", conversations(12, seed=1))
    run(str(tiny_target), str(more), cache, options=CaptureOptions(max_length=256, append=True))
    whole = contents(cache)
    for name in ("plan/000000.arrow", "plan/000001.arrow", "shards/000002/final/c/0/0", "shards/000017/aux.1.arrow"):
        flip(cache / name, 777)
    assert not repair(cache, str(tiny_target), "cpu").damaged
    assert contents(cache) == whole


def test_deep_reads_every_byte_of_the_target(tiny_target, cache, tmp_path):
    assert not verify_and_repair(cache, False, True, str(tiny_target), None).damaged
    other = shutil.copytree(tiny_target, tmp_path / "other")
    other_weights(other)
    with pytest.raises(UsageError, match=r"model\.safetensors is not the file that .* was captured with"):
        verify_and_repair(cache, False, True, str(other), None)
    with pytest.raises(UsageError, match="--deep compares"):
        verify_and_repair(cache, False, True, None, None)
