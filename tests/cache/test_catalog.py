"""The catalog: what a cache has, read once, and what other processes do to it meanwhile."""

import gc
import weakref

import pytest
from cache_maker import COLUMNS, capture, make_cache, random_samples
from file_reads import counted_opens

from pipeline.cache.catalog import Catalog
from pipeline.cache.file_writer import create_identity
from pipeline.cache.inspect import describe
from pipeline.cache.layout import SHARDS, shard_folder
from pipeline.cache.plan_writer import write_segment
from pipeline.errors import CacheError, UsageError

NAMES = [spec.name for spec in COLUMNS]


@pytest.fixture
def cache(tmp_path):
    """A whole cache of two shards."""
    return make_cache(tmp_path / "cache", random_samples(2, longest=9))


def captured(catalog: Catalog) -> dict[int, list[str]]:
    return {shard: [name for name in NAMES if catalog.captured(shard, name)] for shard in range(catalog.shards)}


def test_a_manifest_is_read_once_whoever_asks(cache):
    catalog = Catalog(cache)
    with counted_opens(cache) as opened:
        for _ in range(2):
            assert captured(catalog) == {0: NAMES, 1: NAMES}
            assert [*catalog.whole] == [*catalog.columns(1)] == [*catalog.captured_columns(0)] == NAMES
            catalog.refresh()
    columns = [f"{SHARDS}/00000{shard}/{name}.json" for shard in (0, 1) for name in NAMES]
    assert {file: opened[file] for file in columns} == dict.fromkeys(columns, 1)
    assert opened["cache.json"] == 1


def test_what_others_commit_shows_after_a_refresh_and_only_that_is_read(cache):
    ours, folder = Catalog(cache), shard_folder(cache, 1)
    (folder / "aux.10.json").unlink()
    assert captured(ours) == {0: NAMES, 1: ["aux.1", "final"]}
    assert [(shard.number, specs) for shard, specs in ours.missing(COLUMNS)] == [(1, [COLUMNS[1]])]
    capture(cache, ours.plan.shards[1], COLUMNS)  # by a catalog of its own
    assert captured(ours)[1] == ["aux.1", "final"]

    ours.refresh(1)
    with counted_opens(cache) as opened:
        assert captured(ours) == {0: NAMES, 1: NAMES} and ours.missing(COLUMNS) == []
    assert dict(opened) == {f"{SHARDS}/000001/aux.10.json": 1}


class Cyclic:
    """An object that only the cyclic collector frees."""

    def __init__(self):
        self.itself = self


def test_cycles_of_the_caller_are_still_collected_after_the_work_is_listed(cache):
    lost = weakref.ref(Cyclic())
    assert Catalog(cache).missing(COLUMNS) == []
    gc.collect()
    assert lost() is None and gc.isenabled() and gc.get_freeze_count() == 0


def test_a_manifest_that_was_replaced_is_read_again(cache):
    catalog, file = Catalog(cache), shard_folder(cache, 0) / "aux.1.json"
    assert catalog.captured(0, "aux.1") and catalog.manifest(0, "aux.1")
    file.write_bytes(file.read_bytes()[:-9])
    catalog.refresh(0)
    assert catalog.captured(0, "aux.1") is None
    with pytest.raises(CacheError, match="damaged"):
        catalog.manifest(0, "aux.1")


def test_a_file_of_another_size_is_not_captured_and_still_a_column(cache):
    values = shard_folder(cache, 0) / "final.arrow"
    values.write_bytes(values.read_bytes() + b"x")
    catalog = Catalog(cache)
    assert captured(catalog)[0] == NAMES[:2] and catalog.names == [NAMES, NAMES]


def test_shards_without_their_samples_have_columns_to_rebuild_them_from(cache):
    (shard_folder(cache, 0) / "samples.arrow").unlink()
    catalog = Catalog(cache)
    assert captured(catalog)[0] == [] and [*catalog.captured_columns(0)] == NAMES


def test_a_plan_made_meanwhile_shows_after_a_refresh(tmp_path):
    catalog = Catalog(tmp_path)
    assert not catalog.exists and not catalog.planned
    with pytest.raises(UsageError, match="has no plan yet"):
        _ = catalog.segments
    create_identity(tmp_path, {})
    write_segment(tmp_path, random_samples(3), row_bytes=16, sources=[])
    assert catalog.exists and catalog.planned and catalog.plan.samples == 3
    planned = catalog.shards
    write_segment(tmp_path, random_samples(5), row_bytes=16, sources=[])
    assert catalog.shards == planned
    catalog.refresh()
    assert catalog.shards == len(catalog.plan.shards) > planned and catalog.plan.samples == len(catalog.samples) == 5


def test_a_folder_that_cannot_be_listed_is_an_error_for_readers_and_nothing_captured(cache):
    folder = shard_folder(cache, 0)
    folder.rename(cache / "moved")
    folder.write_text("no folder")
    catalog = Catalog(cache)
    assert captured(catalog)[0] == []
    for read in (lambda: catalog.names, lambda: catalog.columns(0), lambda: describe(cache)):
        with pytest.raises(CacheError, match="missing"):
            read()
