"""A capture with nothing to do: it opens each JSON file of the cache once, and nothing that it does not need."""

import shutil
from dataclasses import replace

import pytest
from file_reads import counted_opens

from stages.cache_hidden.run import run
from stages.cache_hidden.settings import CaptureOptions

OPTIONS = CaptureOptions(layers="1,3,4", max_length=256)


@pytest.fixture
def rerun(tiny_target, tiny_corpus, tiny_cache, tmp_path):
    """Return a function that runs the capture of `tiny_cache` again, on a copy, with these options."""
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")

    def done(options):
        with counted_opens(cache) as opened:
            summary = run(str(tiny_target), str(tiny_corpus), cache, options=options)
        return cache, summary, opened

    return done


def manifests_of(cache) -> list[str]:
    """Every manifest of the cache, in none of which are `zarr.json` and the target's own files."""
    files = sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*.json") if path.name != "zarr.json")
    return [file for file in files if not file.startswith("target/") or file == "target/manifest.json"]


def test_a_rerun_with_nothing_to_do_opens_no_manifest_twice(rerun):
    cache, summary, opened = rerun(OPTIONS)
    assert summary.new_shards == summary.left == 0
    read = {file: count for file, count in opened.items() if file.endswith(".json")}
    assert read == dict.fromkeys(manifests_of(cache), 1)
    assert opened["capture.log"] == opened["plan/000000.arrow"] == 1
    assert {file.split("/")[-1] for file in opened if not file.endswith(".json")} == {
        "capture.log",
        "000000.arrow",
        "samples.arrow",
    }


def test_another_command_with_nothing_to_do_opens_no_columns_manifest_twice(rerun):
    """It is not the one that the log has, so its settings are resolved from target and cache again."""
    cache, summary, opened = rerun(replace(OPTIONS, batch_tokens=4096))
    assert summary.new_shards == summary.left == 0
    columns = [file for file in manifests_of(cache) if file.startswith("shards/")]
    assert {file: opened[file] for file in columns} == dict.fromkeys(columns, 1)
