"""Verify finds every changed byte and names it; inspect says what is there; derive makes again what can be."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_maker import COLUMNS, capture, contents, flip, make_cache, random_samples

from pipeline.cache.catalog import Catalog
from pipeline.cache.file_writer import create_identity, rebuild_derived
from pipeline.cache.inspect import describe, sample_view
from pipeline.cache.layout import INDEX, INDEX_MANIFEST, PLAN, SAMPLES, SHARDS, shard_folder
from pipeline.cache.manifest import FileFact, canonical, read_canonical
from pipeline.cache.plan import load_plan
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.verify import _Check, verify
from pipeline.cache.writer import ShardWriter
from pipeline.errors import UsageError

# Few tokens first, so that the first shard takes several samples.
SAMPLES_OF_ALL = sorted(
    random_samples(8, longest=12) + random_samples(3, longest=400, seed=3), key=lambda s: len(s.ids)
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole cache of three shards, two refused samples in the first."""
    return make_cache(tmp_path_factory.mktemp("verify") / "cache", SAMPLES_OF_ALL, refused={0: "not finite", 1: "odd"})


@pytest.fixture
def cache(whole, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def named(report):
    return {finding.file for finding in report.damaged}


def test_a_whole_cache_has_no_findings(whole):
    report = verify(whole)

    assert not report.damaged and not report.missing and not report.foreign
    files = contents(whole)
    assert (report.files, report.bytes) == (len(files), sum(map(len, files.values())))


def test_every_flipped_bit_is_found_and_its_file_named(whole):
    rng = np.random.default_rng(4)
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    by_name = {}
    for file in files:  # one file of each kind, so that the flips go to all kinds
        by_name.setdefault(file.relative_to(file.parents[1]).as_posix().lstrip("0123456789"), file)
    kinds = sorted(by_name.values())
    assert len(kinds) > 15
    for trial in range(300):
        file = kinds[trial % len(kinds)]
        bit = int(rng.integers(8 * file.stat().st_size))
        flip(file, bit)
        assert file.relative_to(whole).as_posix() in named(verify(whole)), (file, bit)
        flip(file, bit)
    assert not verify(whole).damaged


def test_every_file_cut_short_is_found_and_named(cache):
    for file in sorted(path for path in cache.rglob("*") if path.is_file()):
        data = file.read_bytes()
        file.write_bytes(data[:-1])
        assert file.relative_to(cache).as_posix() in named(verify(cache)), file
        file.write_bytes(data)


def test_every_deleted_file_is_found(cache):
    """A column without its manifest was never captured; without another file it is damaged."""
    for file in sorted(path for path in cache.rglob("*") if path.is_file()):
        data = file.read_bytes()
        file.unlink()
        report = verify(cache)
        name = file.relative_to(cache).as_posix()
        column_manifest = name.startswith(SHARDS) and name.endswith(".json") and not name.endswith("zarr.json")
        if column_manifest or name.startswith((f"{PLAN}/000000.json", INDEX_MANIFEST, "quarantine/")):
            assert any(name.startswith(finding.file.removesuffix(".json")) for finding in report.missing), name
        else:
            assert any(name.startswith(found.removesuffix(".json")) for found in named(report)), name
        file.write_bytes(data)


def test_damage_says_shard_column_and_sample(cache):
    flip(shard_folder(cache, 2) / "aux.10" / "c/0/0", 5)

    (finding,) = verify(cache).damaged

    assert (finding.shard, finding.column) == (2, "aux.10")
    assert finding.what == "the values of samples 0 of the shard"


def test_shards_that_changed_places_are_found(cache):
    first, second = shard_folder(cache, 0), shard_folder(cache, 1)
    first.rename(cache / "aside")
    second.rename(first)
    (cache / "aside").rename(second)

    shards = {finding.shard for finding in verify(cache).damaged}

    assert shards == {0, 1}


def test_columns_that_changed_places_are_found(cache):
    folder = shard_folder(cache, 0)
    for suffix in (".json", ".arrow", ""):
        (folder / f"aux.1{suffix}").rename(folder / "aside")
        (folder / f"aux.10{suffix}").rename(folder / f"aux.1{suffix}")
        (folder / "aside").rename(folder / f"aux.10{suffix}")

    assert {finding.column for finding in verify(cache).damaged} == {"aux.1", "aux.10"}


def test_a_shard_of_another_cache_is_found(cache, tmp_path):
    other = tmp_path / "other"
    create_identity(other, {"target": {"name": "another"}})
    write_segment(other, SAMPLES_OF_ALL, row_bytes=48, sources=[])
    for shard in load_plan(other).shards[:1]:
        capture(other, shard, COLUMNS)
    shutil.rmtree(shard_folder(cache, 0))
    shutil.copytree(shard_folder(other, 0), shard_folder(cache, 0))

    assert {finding.what for finding in verify(cache).damaged} == {"belongs to another cache"}


def test_values_that_match_a_manifest_but_not_their_checksums_are_found(cache):
    """As a writer with a bug would leave them: only the blocks can tell."""
    folder = shard_folder(cache, 1)
    flip(folder / "aux.1" / "c/0/0", 9)
    manifest = read_canonical(folder / "aux.1.json")
    manifest.pop("hash")
    manifest["files"]["aux.1/c/0/0"] = FileFact.of_file(folder / "aux.1" / "c/0/0").as_dict()
    (folder / "aux.1.json").write_bytes(canonical(manifest))

    assert [finding.what for finding in verify(cache).damaged] == ["the values of samples 0 of the shard"]


def test_files_of_others_are_foreign_and_scratch_is_none(cache):
    (cache / "notes.txt").write_text("mine")
    (shard_folder(cache, 0) / "aux.1" / "extra").write_text("mine")
    (cache / "tmp-000001-abc").mkdir()
    (cache / "tmp-000001-abc" / "half").write_text("x")
    (cache / "capture.log").write_text("{}")

    report = verify(cache)

    assert report.foreign == ["notes.txt", "shards/000000/aux.1/extra"] and not report.damaged


def test_a_link_out_of_the_cache_is_damage(cache, tmp_path):
    (shard_folder(cache, 0) / "aux.1").rename(tmp_path / "elsewhere")
    (shard_folder(cache, 0) / "aux.1").symlink_to(tmp_path / "elsewhere")

    assert any("leads out" in finding.what for finding in verify(cache).damaged)


def test_what_is_not_captured_yet_is_no_damage(tmp_path):
    create_identity(tmp_path, {})
    plan = write_segment(tmp_path, random_samples(30), row_bytes=48, sources=[])
    assert [finding.what for finding in verify(tmp_path).missing] == ["not captured yet"] * (len(plan.shards) + 1)
    with pytest.raises(UsageError, match="no cache there"):
        verify(tmp_path / "nothing")

    capture(tmp_path, plan.shards[0], COLUMNS)
    capture(tmp_path, plan.shards[1], COLUMNS[:1])
    report = verify(tmp_path)

    assert named(report) == {"target/manifest.json"}  # written before the first shard, so now it is lost
    missing = {(finding.shard, finding.column) for finding in report.missing}
    assert {(1, "aux.10"), (1, "final"), (2, None)} <= missing and (0, None) not in missing


def test_a_column_committed_while_values_are_read_leaves_the_cache_complete(cache, monkeypatch):
    manifest = shard_folder(cache, 0) / "aux.1.json"
    held, check_shard = manifest.read_bytes(), _Check.shard
    manifest.unlink()

    def check_and_commit(check, number, planned):
        found = check_shard(check, number, planned)
        if number == 2:  # the last one, long after the first was listed
            manifest.write_bytes(held)
        return found

    monkeypatch.setattr(_Check, "shard", check_and_commit)
    report = verify(cache)
    assert report.columns["aux.1"] == 3 and not report.incomplete and not report.damaged


def test_derive_makes_again_what_is_lost(cache):
    before = contents(cache)
    (cache / INDEX).unlink()
    (shard_folder(cache, 1) / SAMPLES).unlink()
    flip(shard_folder(cache, 2) / SAMPLES, 1000)
    shutil.rmtree(cache / "quarantine")

    assert sorted(rebuild_derived(Catalog(cache))) == [
        INDEX,
        "quarantine/samples.json",
        f"shards/000001/{SAMPLES}",
        f"shards/000002/{SAMPLES}",
    ]

    assert contents(cache) == before and rebuild_derived(Catalog(cache)) == []
    (cache / INDEX_MANIFEST).unlink()
    assert rebuild_derived(Catalog(cache)) == [INDEX] and contents(cache) == before


def test_describe_counts_what_is_there(whole):
    facts, plan = describe(whole), load_plan(whole)

    assert facts["identity"] == {"target": {"name": "tiny", "digest": "00ff"}, "samples": {"max_length": 600}}
    assert facts["plan"]["samples"] == 11 and facts["plan"]["tokens"] == plan.tokens
    assert facts["shards"] == {"planned": len(plan.shards), "whole": len(plan.shards)}
    assert [column["name"] for column in facts["columns"]] == ["aux.1", "aux.10", "final"]
    kept = sum(shard.final_count for shard in plan.shards)
    assert [column["rows"] for column in facts["columns"]] == [plan.tokens, plan.tokens, kept]
    assert facts["columns"][0]["probe"] == 0.25  # the worst of the shards
    assert facts["bytes"]["total"] == sum(map(len, contents(whole).values()))
    assert 16 <= facts["columns"][0]["token_bytes"] < 30
    assert sum(entry["samples"] for entry in facts["domains"]) == 11
    assert sum(entry["supervised"] for entry in facts["domains"]) == plan.supervised
    assert [(entry["row"], entry["reason"]) for entry in facts["refused"]] == [(0, "not finite"), (1, "odd")]
    assert facts["refused"][0]["columns"] == ["aux.1", "aux.10", "final"]
    assert facts["gauge"] is None


def test_the_gauge_is_pooled_over_shards(tmp_path):
    create_identity(tmp_path, {})
    plan = write_segment(tmp_path, random_samples(8), row_bytes=48, sources=[])
    for shard, gauge in zip(plan.shards, [(10, 9, -2.0), (30, 3, -6.0)], strict=False):
        with ShardWriter(Catalog(tmp_path), shard, COLUMNS[:1]) as writer:
            writer.write("aux.1", np.zeros((shard.rows, 8), np.uint16))
            writer.seal()
            writer.commit({"aux.1": {"gauge": dict(zip(("rows", "agree", "logprob"), gauge, strict=True))}})

    assert describe(tmp_path)["gauge"] == {"rows": 40, "agreement": 0.3, "logprob": -0.2}


def test_one_sample_can_be_looked_at(whole):
    view = sample_view(whole, 9)

    origin = next(sample for sample in SAMPLES_OF_ALL if len(sample.ids) == view["length"])
    assert view["ids"] == origin.ids.tolist() and view["mask"] == origin.mask.tolist()
    assert (view["domain"], view["split"], view["source"]) == (origin.domain, origin.split, origin.file)
    assert view["supervised"] == origin.mask.sum() and view["ok"]
    with pytest.raises(UsageError, match="samples 0 to 10"):
        sample_view(whole, 11)
