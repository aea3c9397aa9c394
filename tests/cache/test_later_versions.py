"""What a later version of the program may add within format 1, and what this one does with it: README, "What may
change"."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from cache_maker import COLUMNS, contents, make_cache, random_samples
from format_schemas import STORED, schemas
from safetensors.torch import save_file
from toy_codec import Fixed16

from pipeline.cache import HiddenCache
from pipeline.cache.catalog import Catalog
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.zarr_file import Grid, ShardFileWriter
from pipeline.cache.file_writer import create_identity, rebuild_derived
from pipeline.cache.layout import IDENTITY, SAMPLES, shard_folder
from pipeline.cache.manifest import FileFact, read_canonical, write_canonical
from pipeline.cache.samples import SCHEMA, batch_bytes, read_batch
from pipeline.cache.verify import verify
from pipeline.cache.writer import ShardWriter
from pipeline.errors import UsageError, VersionError
from pipeline.target.head import FACTS, TargetHead
from stages.cache_hidden.repair import repair
from stages.recode.run import run as recode


@pytest.fixture
def cache(tmp_path):
    """A whole cache of two shards, with a list of refused samples."""
    return make_cache(tmp_path / "cache", random_samples(2, longest=9), refused={0: "odd"})


def rewrite(path, **facts) -> None:
    """Write a manifest again with these facts."""
    held = {name: value for name, value in read_canonical(path).items() if name != "hash"}
    write_canonical(path, {**held, **facts})


def test_no_field_of_format_1_changes_by_accident():
    changed = "format 1 is frozen: read `What may change` in pipeline/cache/README.md, then tests/format_schemas.py"
    assert schemas() == json.loads(STORED.read_text()), changed


def test_a_column_in_an_unknown_codec_is_refused_by_name_and_never_replaced(tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        later.setitem(CODECS, "fixed16", Fixed16())
        columns = [COLUMNS[0], replace(COLUMNS[1], codec="fixed16"), COLUMNS[2]]
        cache = make_cache(tmp_path / "cache", random_samples(2, longest=9), columns)
        assert not verify(cache).damaged
    before, unknown = contents(cache), "aux.10.json: codec 'fixed16' is unknown to this version; upgrade draft-pipeline"
    plan = Catalog(cache).plan
    for use in (
        lambda: HiddenCache.open(cache).read(0),
        lambda: verify(cache),
        lambda: repair(cache, "a-target", "cpu"),
        lambda: recode(cache, "zstd"),
        lambda: Catalog(cache).missing(COLUMNS),
        lambda: rebuild_derived(Catalog(cache)),
    ):
        with pytest.raises(VersionError, match=unknown):
            use()
    with ShardWriter(Catalog(cache), plan.shards[0], COLUMNS[1:2]) as writer:
        writer.write("aux.10", np.zeros((plan.shards[0].rows, 8), np.uint16))
        writer.seal()
        with pytest.raises(VersionError, match=unknown):
            writer.commit({})
    assert contents(cache) == before


def test_a_target_of_a_later_format_is_not_stored_again(cache):
    path = cache / "target/manifest.json"
    rewrite(path, format="2")
    before = contents(cache)
    for use in (lambda: verify(cache), lambda: repair(cache, "a-target", "cpu")):
        with pytest.raises(VersionError, match=r"manifest.json: format version '2' is unknown to this version"):
            use()
    assert contents(cache) == before


def test_unknown_keys_of_manifests_are_passed_over(cache):
    expected = HiddenCache.open(cache).read(1, final=True)
    manifests = [path for path in sorted(cache.rglob("*.json")) if path.parent.name != "target"]
    for path in (*manifests, cache / "target/manifest.json"):
        if path.name not in (IDENTITY, "zarr.json", "samples.json"):
            rewrite(path, later={"format": [1]})
    for path in cache.glob("shards/*/*.json"):
        rewrite(path, facts={**read_canonical(path)["facts"], "kernel": "x"})
    report = verify(cache)
    assert not report.damaged and not report.foreign and not report.missing
    found = HiddenCache.open(cache).read(1, final=True)
    assert torch.equal(found.aux, expected.aux) and torch.equal(found.final, expected.final)


def test_an_engine_of_a_later_version_is_read_and_what_it_says_in_the_identity_is_compared(tmp_path):
    identity = {"capture": {"engine": "vllm", "dtype": "bfloat16", "prefix_caching": False}}
    create_identity(tmp_path / "cache", identity)
    cache = make_cache_of(tmp_path / "cache", identity)
    held = HiddenCache.open(cache)
    assert held.identity.capture.engine == "vllm" and held.identity.as_dict() == identity and not verify(cache).damaged
    create_identity(cache, identity)
    with pytest.raises(UsageError, match=r"capture.prefix_caching = False, this command asks for None"):
        create_identity(cache, {"capture": {"engine": "vllm", "dtype": "bfloat16"}})


def make_cache_of(cache, identity: dict):
    """A cache with this identity."""
    import cache_maker

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_maker, "IDENTITY", identity)
        return make_cache(cache, random_samples(2, longest=9))


def test_a_column_of_another_name_is_passed_over(cache):
    expected = HiddenCache.open(cache).read(1).aux
    folder = shard_folder(cache, 0)
    shutil.copytree(folder / "aux.1", folder / "attention.1")
    write_canonical(folder / "attention.1.json", {"anything": 1})
    (cache / "vocabulary").mkdir()
    write_canonical(cache / "vocabulary/manifest.json", {"anything": 1}, "2")
    report = verify(cache)
    assert not report.damaged and not report.incomplete and [*report.columns] == [spec.name for spec in COLUMNS]
    assert report.foreign == [
        "shards/000000/attention.1.json",
        "shards/000000/attention.1/zarr.json",
        "shards/000000/attention.1/c/0/0",
        "vocabulary/manifest.json",
    ]
    assert torch.equal(HiddenCache.open(cache).read(1).aux, expected)


def test_a_further_file_of_the_plan_is_passed_over_and_verified(cache):
    path, manifest = cache / "plan/000000.turns.arrow", cache / "plan/000000.json"
    path.write_bytes(b"of a later version")
    rewrite(manifest, files={**read_canonical(manifest)["files"], path.name: FileFact.of_file(path).as_dict()})
    rebuild_derived(Catalog(cache))
    report = verify(cache)
    assert not report.damaged and not report.foreign and len(HiddenCache.open(cache)) == 2
    path.write_bytes(b"of a later versiom")
    (finding,) = verify(cache).damaged
    assert finding.file == "plan/000000.turns.arrow"


def test_an_unknown_column_of_an_arrow_file_is_refused_by_name(tmp_path, cache):
    batch = read_batch(shard_folder(cache, 0) / SAMPLES)
    weight = pa.field("weight", pa.float32(), nullable=False)
    for at in (0, 3, len(SCHEMA)):
        schema = SCHEMA.insert(at, weight)
        columns = [*batch.columns[:at], pa.array([1.0] * len(batch), pa.float32()), *batch.columns[at:]]
        (tmp_path / SAMPLES).write_bytes(batch_bytes(pa.RecordBatch.from_arrays(columns, schema=schema)))
        with pytest.raises(VersionError, match="its column 'weight' is unknown to this version; upgrade"):
            read_batch(tmp_path / SAMPLES)


@pytest.mark.parametrize("more", ["logit_scale", "lm_head.bias"])
def test_a_head_that_says_more_is_refused_by_name(tmp_path, more):
    facts = {"embed_scale": 1.0, "logit_softcap": None, "tied": True, **({more: 2.0} if more == "logit_scale" else {})}
    tensors = {"embed_tokens.weight": torch.ones(3, 2), **({} if more == "logit_scale" else {more: torch.ones(3)})}
    save_file(tensors, tmp_path / "head.safetensors", metadata={FACTS: json.dumps(facts)})
    with pytest.raises(VersionError, match=f"head.safetensors: its '{more}' is unknown to this version; upgrade"):
        TargetHead.load(tmp_path / "head.safetensors")


def test_arrays_of_int8_are_read_in_whatever_chunks_their_zarr_json_states(tmp_path):
    spec = replace(COLUMNS[0], codec="int8", width=192)
    cache = make_cache(tmp_path / "cache", random_samples(1, longest=600, seed=2), [spec])
    expected, folder = HiddenCache.open(cache).read(0).aux, shard_folder(cache, 0)
    manifest = read_canonical(folder / "aux.1.json")
    for name, width, kind in (("values", 192, "i1"), ("scale", 2, "<u2")):
        place, rows = folder / "aux.1.int8" / name, manifest["rows"]
        held = np.fromfile(place / "c/0/0", kind, rows * width).reshape(rows, width)
        shutil.rmtree(place)
        writer = ShardFileWriter(place, Grid(rows, width, np.dtype(kind), 100))
        writer.write(held)
        writer.finish()
        manifest["files"] |= {f"aux.1.int8/{name}/{file}": fact for file, fact in writer.facts().items()}
    rewrite(folder / "aux.1.json", files=manifest["files"])
    assert not verify(cache).damaged and torch.equal(HiddenCache.open(cache).read(0).aux, expected)
