"""Damage of every kind to every file: `verify` names it, and nobody reads a value that is not what was captured.

`pytest tests/cache/test_damage.py --flips 1000` flips that many bits; the suite, fewer.
"""

import json
import re
import shutil
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_maker import COLUMNS, contents, flip, make_cache, random_samples

from pipeline.cache import HiddenCache
from pipeline.cache.catalog import Catalog
from pipeline.cache.layout import IDENTITY, INDEX, INDEX_MANIFEST, PLAN, shard_folder
from pipeline.cache.verify import verify
from pipeline.errors import PipelineError

PARTS = 64
# Wide enough that int8 has escapes. Of int8 that is four arrays and a calibration beside.
IN_CODECS = [
    replace(spec, codec=codec, width=128) for spec, codec in zip(COLUMNS, ("int8", "raw", "zstd"), strict=True)
]
NO_PROMISE = ("capture.log",)  # the record: it saves time, and nothing of the cache is read from it


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of few shards, a column in every codec, with samples of one block and of two, some refused."""
    samples = sorted(random_samples(5, longest=12) + random_samples(3, longest=400, seed=3), key=lambda s: len(s.ids))
    cache = make_cache(tmp_path_factory.mktemp("damage") / "cache", samples, IN_CODECS, refused={0: "not finite"})
    groups = [json.loads(path.read_bytes()) for path in cache.glob("shards/*/aux.1.int8/zarr.json")]
    assert any(group["attributes"]["escapes"] for group in groups)
    return cache


@pytest.fixture(scope="module", params=["random states", "captured"])
def cache(request, made, tiny_cache, tmp_path_factory):
    """A copy to damage and to put right again: made of random states, or captured from a target."""
    whole = made if request.param == "random states" else tiny_cache
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("damaged") / "cache"))


@pytest.fixture(scope="module")
def truth(cache):
    return read_all(cache)


def read_all(cache: Path) -> list:
    """Everything training reads of a cache, in order: the layers that a draft asks for are there, or it is told."""
    opened = HiddenCache.open(cache)
    table = opened.samples
    layers = (1, 10) if opened.hidden_size == 128 else (1, 3, 4)  # of the cache of random states, and of the captured
    read = [opened.identity, opened.digest, opened.tokens, opened.target_config]
    read += [table.ok.tolist(), table.domain, table.split, table.supervised.tolist(), table.sample_id.tolist()]
    if len(layers) == 3:
        head = opened.head()
        read += [head.head_VD, head.embed_VD]
    for i in np.flatnonzero(table.ok):
        read += astuple(opened.read(int(i), layers=layers, final=True))
    return read


def same(one: list, other: list) -> bool:
    def equal(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return len(one) == len(other) and all(map(equal, one, other))


def check_found(cache: Path, file: Path, truth: list, what: str) -> None:
    """Damage to `file` is named by `verify`, and the reader refuses or gives the very values."""
    name = file.relative_to(cache).as_posix()
    report = verify(cache)
    found = {finding.file for finding in report.damaged + report.missing}
    stem = name.removesuffix(".json")
    assert name in NO_PROMISE or any(stem.startswith(one.removesuffix(".json")) for one in found), (name, what, found)
    try:
        read = read_all(cache)
    except PipelineError as error:
        assert str(cache) in str(error) and "\n" not in str(error), (name, what, error)
        return
    assert same(read, truth), f"{name}, {what}: other values were read, and nobody said so"


def kinds(cache: Path) -> list[Path]:
    """One file of each kind: the same name in another shard is no other kind."""
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    by_kind = {re.sub(r"^shards/\d+/", "", file.relative_to(cache).as_posix()): file for file in files}
    return sorted(by_kind.values())


def test_every_flipped_bit_is_found_before_a_value_is_used(cache, truth, request):
    flips, rng = request.config.getoption("--flips"), np.random.default_rng(7)
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    sizes = np.array([file.stat().st_size for file in files])
    for trial in range(flips):
        # half of them anywhere in the cache's bytes, half in any file: manifests are small and matter most
        at = rng.choice(len(files), p=sizes / sizes.sum() if trial % 2 else None)
        bit = int(rng.integers(8 * sizes[at]))
        flip(files[at], bit)
        check_found(cache, files[at], truth, f"bit {bit}")
        flip(files[at], bit)
    assert not verify(cache).damaged and same(read_all(cache), truth)


@pytest.mark.parametrize("cache", ["random states"], indirect=True)
def test_every_file_cut_at_every_64th_is_found(cache, truth, request):
    every = 1 if request.config.getoption("--flips") >= 1000 else 32
    for turn, file in enumerate(kinds(cache)):
        data = file.read_bytes()
        for part in range(turn % every, PARTS, every):
            if len(data) * part // PARTS < len(data):
                file.write_bytes(data[: len(data) * part // PARTS])
                check_found(cache, file, truth, f"cut at {part}/{PARTS}")
        file.write_bytes(data)
    assert same(read_all(cache), truth)


def test_every_deleted_file_is_found(cache, truth):
    for file in kinds(cache):
        data = file.read_bytes()
        file.unlink()
        if file.name != "capture.log":
            check_found(cache, file, truth, "deleted")
        file.write_bytes(data)


@pytest.mark.parametrize("cache", ["random states"], indirect=True)
def test_a_manifest_in_the_place_of_another_is_found(cache, truth):
    """Each is sound by itself: stale ones, of another shard, of another kind."""
    folders = [shard_folder(cache, number) for number in (0, 1)]
    manifests = [cache / IDENTITY, cache / INDEX_MANIFEST, cache / PLAN / "000000.json", cache / "target/manifest.json"]
    manifests += [folder / "final.json" for folder in folders]
    for file in manifests:
        data = file.read_bytes()
        for other in manifests:
            if other != file:
                file.write_bytes(other.read_bytes())
                check_found_anywhere(cache, truth, f"{other} as {file}")
        file.write_bytes(data)
    assert same(read_all(cache), truth)


def check_found_anywhere(cache: Path, truth: list, what: str) -> None:
    report = verify(cache)
    assert report.damaged or report.missing, what
    try:
        read = read_all(cache)
    except PipelineError:
        return
    assert same(read, truth), what


@pytest.mark.parametrize("cache", ["random states"], indirect=True)
def test_files_that_changed_places_are_found(cache, truth):
    """Shards, and files of the same kind in two shards, each pair swapped and swapped back."""
    first, second = shard_folder(cache, 0), shard_folder(cache, 1)
    pairs = [(first, second)]
    for name in ("samples.arrow", "aux.1.int8", "aux.1.int8.arrow", "aux.1.json", "aux.10", "final.zstd", "final.json"):
        pairs.append((first / name, second / name))
    for one, other in pairs:
        swap(one, other)
        check_found_anywhere(cache, truth, f"{one.name} of two shards swapped")
        swap(one, other)
    assert same(read_all(cache), truth)


def swap(one: Path, other: Path) -> None:
    aside = one.parent / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_a_plan_that_was_appended_to_and_put_back_is_found(made, tmp_path):
    """A stale plan: the segment that was added is lost, its shards are there; and an index of the other plan."""
    from cache_maker import capture

    from pipeline.cache.file_writer import rebuild_derived
    from pipeline.cache.plan import load_plan
    from pipeline.cache.plan_writer import write_segment

    cache = Path(shutil.copytree(made, tmp_path / "cache"))
    old = contents(cache)
    write_segment(cache, random_samples(6, seed=5), row_bytes=48, sources=[{"file": "more.jsonl", "size": 1}])
    for shard in load_plan(cache).shards[load_plan(made).shards[-1].number + 1 :]:
        capture(cache, shard, IN_CODECS)
    rebuild_derived(Catalog(cache))
    truth = read_all(cache)

    for name in (INDEX, INDEX_MANIFEST):
        (cache / name).write_bytes(old[name])
    assert {finding.file for finding in verify(cache).missing} == {INDEX} and not verify(cache).damaged
    assert same(read_all(cache), truth), "an index of another plan is not used"
    (cache / PLAN / "000001.json").unlink()
    assert all("not in the plan" in finding.what for finding in verify(cache).damaged) and verify(cache).damaged
