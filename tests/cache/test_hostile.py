"""A cache from anyone: it is read right or refused with a typed error, touches nothing outside of its folder, and takes
no more memory than its files account for.

Whoever forges a cache can compute every digest in it, so in most of these all of them fit (`fit`).
"""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
import torch
from cache_maker import COLUMNS, make_cache, random_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import clean_scratch
from pipeline.cache.inspect import describe, sample_view
from pipeline.cache.layout import FOLDERS, HEAD, SAMPLES, SHARDS, TARGET, shard_folder
from pipeline.cache.manifest import FileFact, canonical
from pipeline.cache.verify import verify
from pipeline.errors import CacheError, PipelineError, UsageError
from pipeline.target.head import TargetHead
from stages.cache_hidden.repair import repair
from stages.recode.run import run as recode

CODECS = ("raw", "int8", "zstd")  # of aux.1, aux.10 and final: the parsers of all three
PLAIN_JSON = ("config.json", "tokens.json", "zarr.json")  # no manifests


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A cache of two shards with a column in every codec and a head; in shard 0 a sample of two blocks, two small
    ones, and of these the last refused."""
    cache = tmp_path_factory.mktemp("hostile") / "cache"
    columns = [replace(spec, codec=codec) for spec, codec in zip(COLUMNS, CODECS, strict=True)]
    first, last = random_samples(2, longest=9), random_samples(1, longest=9, seed=1)
    make_cache(cache, [*first, *random_samples(1, longest=600, seed=8), *last], columns, refused={2: "not finite"})
    TargetHead(torch.ones(5, 8), torch.zeros(5, 8)).save(cache / TARGET / HEAD)
    manifest = json.loads((cache / TARGET / "manifest.json").read_bytes())
    manifest["files"][HEAD] = {}
    write_manifest(cache / TARGET / "manifest.json", manifest)
    fit(cache)
    assert not verify(cache).damaged and not verify(cache).missing
    return cache


@pytest.fixture
def cache(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def write_manifest(path: Path, facts: dict) -> None:
    path.write_bytes(canonical({key: value for key, value in facts.items() if key not in ("format", "hash")}))


def fit(cache: Path) -> None:
    """Give every manifest the sizes and digests of the files as they are now."""
    manifests = sorted(path for path in cache.rglob("*.json") if path.name not in PLAIN_JSON)
    for path in sorted(manifests, key=lambda path: path.name == "index.json"):
        facts = json.loads(path.read_bytes())
        for name in facts.get("files", {}):
            if (path.parent / name).is_file():
                facts["files"][name] = FileFact.of_file(path.parent / name).as_dict()
        if "segments" in facts:
            facts["segments"] = [json.loads(part.read_bytes())["files"] for part in sorted(cache.glob("plan/*.json"))]
        write_manifest(path, facts)


def read_all(cache: Path) -> None:
    held = HiddenCache.open(cache)
    assert isinstance(held.tokens, dict) and isinstance(held.target_config, dict) and held.head()
    for i in np.flatnonzero(held.samples.usable(held.layers, held.has_final)):
        held.read(int(i), final=held.has_final)


USES = {
    "verify": verify,
    "inspect": describe,
    "one sample": lambda cache: sample_view(cache, 0),
    "read": read_all,
}


def use(cache: Path) -> dict[str, PipelineError]:
    """Do with a cache what reads it; returns the typed errors. Any other ends the test."""
    refused = {}
    for name, used in USES.items():
        try:
            used(cache)
        except PipelineError as error:
            assert "\n" not in str(error), error
            refused[name] = error
    return refused


def places(value, path=()):
    """Every place in a JSON value, as keys to follow."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


NASTY = [None, True, -1, 1.5, 2**40, 2**62, 10**30, "", "../x", "/etc/passwd", "a" * 5000, [], {}, [[]], "aux.1", "x\0"]
JSON = st.sampled_from(NASTY) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=4,
)
EXAMPLES = settings.default.max_examples * 3 // 10  # 30, or 3,000 with --hypothesis-profile long
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def changed(facts: dict, draw) -> dict:
    """A JSON value with one place of it removed or replaced."""
    found = draw(st.sampled_from(sorted(places(facts), key=str)))
    inner = facts
    for key in found[:-1]:
        inner = inner[key]
    if draw(st.booleans()):
        inner[found[-1]] = draw(JSON)
    else:
        del inner[found[-1]]
    return facts


def use_and_restore(whole: Path, cache: Path, *files: Path) -> None:
    try:
        use(cache)
    finally:
        for file in [*files, *cache.rglob("*.json")]:
            shutil.copyfile(whole / file.relative_to(cache), file)


@FUZZ
@given(data=st.data())
def test_a_manifest_with_anything_in_it_gives_typed_errors(whole, cache, data):
    kinds = ["cache.json", "index.json", "plan/000000.json", "target/manifest.json", "calibration/aux.10.json"]
    kinds += [f"{SHARDS}/000000/{spec.name}.json" for spec in COLUMNS] + ["quarantine/samples.json"]
    file = cache / data.draw(st.sampled_from(kinds))
    facts = json.loads(file.read_bytes())
    facts.pop("hash")
    write_manifest(file, changed(facts, data.draw))
    use_and_restore(whole, cache, file)


@FUZZ
@given(data=st.data())
def test_json_of_others_with_anything_in_it_gives_typed_errors(whole, cache, data):
    """`zarr.json` of the three codecs, and the target's own files."""
    folder = f"{SHARDS}/000000"
    arrays = ["aux.1", "aux.10.int8/values", "aux.10.int8/escapes", "aux.10.int8", "final.zstd"]
    kinds = [f"{folder}/{array}/zarr.json" for array in arrays] + ["target/config.json", "target/tokens.json"]
    file = cache / data.draw(st.sampled_from(kinds))
    facts = changed(json.loads(file.read_bytes()), data.draw)
    file.write_text(json.dumps(data.draw(JSON) if data.draw(st.integers(0, 9)) == 9 else facts))
    fit(cache)
    use_and_restore(whole, cache)


@settings(FUZZ, max_examples=2 * EXAMPLES)
@given(data=st.data())
def test_files_with_any_bytes_in_them_give_typed_errors(whole, cache, data):
    """Arrow, zarr's shard files and safetensors: bytes changed anywhere, or cut off, or added, and all digests fit."""
    files = sorted(file for file in cache.rglob("*") if file.is_file() and file.suffix != ".json")
    file = data.draw(st.sampled_from(files), label="file")
    held = bytearray(file.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(held) - 1), max_size=4), label="at"):
        held[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    end = data.draw(st.sampled_from([len(held)] * 3 + [0, len(held) // 2, len(held) - 1]))
    file.write_bytes(held[:end] + b"\0" * data.draw(st.sampled_from([0, 0, 0, 8])))
    fit(cache)
    use_and_restore(whole, cache, file)


# Sizes that are claimed


@pytest.mark.parametrize(
    "file", ["plan/000000.arrow", "index.arrow", f"shards/000000/{SAMPLES}", "shards/000000/aux.1.arrow"]
)
def test_an_arrow_file_that_would_unpack_is_refused_before_it_does(cache, file):
    """64 MiB of zeros take a few kilobytes in a compressed column."""
    batch = pa.ipc.open_file(cache / file).get_batch(0)
    wide = [
        pa.array(["x" * (64 << 20)] + [""] * (len(batch) - 1)) if str(column.type) == "string" else column
        for column in batch.columns
    ]
    with pa.OSFile(str(cache / file), "wb") as sink:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(wide, schema=batch.schema))
    del wide
    assert (cache / file).stat().st_size < 1 << 20
    fit(cache)
    pa.default_memory_pool().release_unused()
    before = pa.default_memory_pool().max_memory()

    refused = use(cache)

    assert pa.default_memory_pool().max_memory() - before < 1 << 20
    if file != "index.arrow":  # which is made again from the plan, as the plan is read only without it
        says = refused["inspect" if file.startswith("plan") else "read"]
        assert "something else than plain record batches" in str(says)
    assert verify(cache).damaged


def rewrite(file: Path, **columns) -> None:
    """Write an Arrow file anew with other columns in it."""
    batch = pa.ipc.open_file(file).get_batch(0)
    arrays = [
        pa.array(columns.get(field.name, batch.column(field.name).to_pylist()), field.type) for field in batch.schema
    ]
    data = pa.RecordBatch.from_arrays(arrays, schema=batch.schema)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, data.schema) as writer:
        writer.write_batch(data)


LIES = {
    "lengths": lambda n: {"length": [2**31 - 1] * n},
    "offsets": lambda n: {"offset": [2**60] * n},
    "negative offsets": lambda n: {"offset": [-(2**40)] * n},
    "offsets of final": lambda n: {"final_offset": [-5] * n},
    "tokens": lambda n: {"input_ids": [[]] * n},
    "masks": lambda n: {"loss_mask": [[True]] * n},
}


@pytest.mark.parametrize("lie", LIES)
def test_samples_that_are_not_where_it_is_said_are_refused(cache, lie):
    for file in (cache / "shards/000000" / SAMPLES, cache / "plan/000000.arrow"):
        data = file.read_bytes()
        count = pa.ipc.open_file(cache / file).get_batch(0).num_rows
        if file.name == SAMPLES:
            rewrite(file, **LIES[lie](count))
        else:
            batches = [pa.ipc.open_file(file).get_batch(n) for n in range(pa.ipc.open_file(file).num_record_batches)]
            at = {name: batches[0].schema.get_field_index(name) for name in LIES[lie](count)}
            for name, values in LIES[lie](count).items():
                field = batches[0].schema.field(name)
                batches[0] = batches[0].set_column(at[name], field, pa.array(values, field.type))
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batches[0].schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            (cache / "index.json").unlink()
        fit(cache)
        refused = use(cache)
        assert isinstance(refused["read"], CacheError) and "run `pipeline verify`" in str(refused["read"])
        assert verify(cache).damaged
        file.write_bytes(data)


def forge(cache: Path, name: str, change) -> None:
    facts = json.loads((cache / name).read_bytes())
    change(facts)
    write_manifest(cache / name, facts)


@pytest.mark.parametrize("width", [2**40, 2**17, 9])
@pytest.mark.parametrize("column", ["aux.1", "aux.10", "final"])
def test_a_width_that_its_files_do_not_have_takes_no_memory(cache, monkeypatch, column, width):
    for path in cache.glob(f"{SHARDS}/*/*.json"):
        if path.name == f"{column}.json":
            forge(cache, str(path.relative_to(cache)), lambda facts: facts["spec"].update(width=width))
        else:
            path.unlink()
    taken, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **named: taken.append(np.prod(shape)) or empty(*shape, **named))

    held = HiddenCache.open(cache)
    with pytest.raises(CacheError, match=column.replace(".", r"\.")):
        held.read(1, final=column == "final")

    assert max(taken, default=0) < 1 << 16
    assert verify(cache).damaged


def test_a_plan_of_more_shards_than_samples_takes_no_memory(cache):
    """The index that is there fits the plan's manifest, so that the plan itself would not be looked at."""
    forge(cache, "plan/000000.json", lambda facts: facts.update(shards=2**40))
    fit(cache)
    with pytest.raises(CacheError, match="not the shards its manifest counts"):
        HiddenCache.open(cache)


@pytest.mark.parametrize("chunk_rows", [1.0, 10**30, True, 0, -1, "1"])
def test_chunks_of_impossible_sizes_are_refused(cache, chunk_rows):
    file = cache / "shards/000000/aux.1/zarr.json"
    facts = json.loads(file.read_bytes())
    facts["codecs"][0]["configuration"]["chunk_shape"][0] = chunk_rows
    facts["shape"][0] = facts["chunk_grid"]["configuration"]["chunk_shape"][0] = chunk_rows
    file.write_text(json.dumps(facts))
    fit(cache)
    assert isinstance(use(cache)["read"], CacheError)


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "pickle", "numcodecs.zlib", "numcodecs.json2"])
def test_a_codec_that_could_run_code_or_unpack_to_any_size_is_refused(cache, codec):
    file = cache / "shards/000000/aux.1/zarr.json"
    facts = json.loads(file.read_bytes())
    facts["codecs"][0]["configuration"]["codecs"].append({"name": codec, "configuration": {}})
    file.write_text(json.dumps(facts))
    fit(cache)
    assert isinstance(use(cache)["read"], CacheError)


ESCAPES = {
    "a row that is not there": [10**9, 0, 0],
    "a row before": [-1, 0, 0],
    "a channel that is not there": [0, 8, 0],
    "a channel before": [0, -1, 0],
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_escapes_that_lie_elsewhere_are_written_nowhere(tmp_path, escape):
    from pipeline.cache.codecs import CODECS

    columns = [replace(COLUMNS[0], codec="int8", width=128)]
    cache = make_cache(tmp_path / "cache", random_samples(1, longest=600, seed=8), columns)
    folder = shard_folder(cache, 0)
    file = folder / "aux.1.int8/escapes/c/0/0"
    data = bytearray(file.read_bytes())
    data[:12] = np.array(ESCAPES[escape], "<i4").tobytes()
    file.write_bytes(data)
    fit(cache)
    with pytest.raises(CacheError, match=r"damaged"):
        HiddenCache.open(cache).read(0)
    rows = int(HiddenCache.open(cache).samples.length[0])
    reader = CODECS["int8"].reader(folder / "aux.1.int8", rows, 128, "bfloat16")
    try:
        held = reader.encoded(0, reader.outliers(range(0, 1)), reader.buffers(4))
        assert ((held.outliers[:, 0] >= 0) & (held.outliers[:, 0] < 4)).all()
        assert ((held.outliers[:, 1] >= 0) & (held.outliers[:, 1] < 128)).all()
    except CacheError:
        pass
    assert verify(cache).damaged


HEADS = {
    "of other shapes": {"embed_tokens.weight": torch.ones(5, 8), "lm_head.weight": torch.ones(4, 8)},
    "of numbers": {"embed_tokens.weight": torch.ones(5, 8, dtype=torch.int32), "lm_head.weight": torch.ones(5, 8)},
    "a vector": {"embed_tokens.weight": torch.ones(5), "lm_head.weight": torch.ones(5)},
    "without a head": {"embed_tokens.weight": torch.ones(5, 8)},
}
FACTS = ["[]", "3", "{}", '{"tied": false, "embed_scale": "x", "logit_softcap": null}', "[" * 9999]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_is_none_is_refused(cache, head):
    from safetensors.torch import save_file

    right = json.dumps({"tied": False, "embed_scale": 1.0, "logit_softcap": None})
    for facts in [right] if head != "without a head" else [right, *FACTS]:
        save_file(HEADS[head], cache / TARGET / HEAD, metadata={"target_head": facts})
        fit(cache)
        with pytest.raises(CacheError, match="not a target's embedding and head"):
            HiddenCache.open(cache).head()


def test_a_header_that_declares_terabytes_is_refused(cache):
    file = cache / TARGET / HEAD
    for header in (b"{}", b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'):
        for size in (len(header), 2**62, 2**64 - 1):
            file.write_bytes(size.to_bytes(8, "little") + header)
            fit(cache)
            with pytest.raises(CacheError, match="not a target's embedding and head"):
                HiddenCache.open(cache).head()


def test_json_nested_without_end_is_refused(cache):
    for name in ("cache.json", "plan/000000.json", "target/config.json", "shards/000000/aux.1/zarr.json"):
        data = (cache / name).read_bytes()
        (cache / name).write_text("[" * 200_000)
        fit_or_not = cache / name
        if fit_or_not.name in PLAIN_JSON:
            fit(cache)
        assert use(cache)["read"]
        (cache / name).write_bytes(data)
        fit(cache)


# What is no file, and what lies outside


def test_a_pipe_with_the_name_of_a_file_keeps_nobody_waiting(cache):
    """Reading one waits for a writer, who never comes."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    for file in sorted(file for file in cache.rglob("*") if file.is_file()):
        if "shards/000001" in str(file):
            continue
        data = file.read_bytes()
        fact = FileFact.of_bytes(b"").as_dict()
        file.unlink()
        os.mkfifo(file)
        owners = [path for path in (*cache.glob("*/*.json"), *cache.glob("shards/*/*.json")) if path.is_file()]
        before = {owner: owner.read_bytes() for owner in owners}
        for owner in owners:
            facts = json.loads(before[owner])
            name = file.relative_to(owner.parent).as_posix() if file.is_relative_to(owner.parent) else None
            if name in facts.get("files", {}):
                facts["files"][name] = fact
                write_manifest(owner, facts)
        signal.alarm(10)
        use(cache)
        signal.alarm(0)
        file.unlink()
        file.write_bytes(data)
        for owner, held in before.items():
            owner.write_bytes(held)
    assert not use(cache)


NAMES = ["../victim", "/etc/passwd", "a/../../../victim", "x" * 300, "aux.1/" * 2000 + "x", "loop/x", "nul\0", ".", ""]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_that_no_file_of_a_cache_has_is_refused(cache, name):
    (cache / "shards/000000/loop").symlink_to("loop")
    (cache / TARGET / "loop").symlink_to("loop")
    fact = FileFact.of_bytes(b"").as_dict()
    forge(cache, "shards/000000/aux.1.json", lambda facts: facts["files"].update({name: fact}))
    forge(cache, "target/manifest.json", lambda facts: facts["files"].update({name: fact}))
    assert isinstance(use(cache)["read"], CacheError)
    assert {finding.file.split("/")[0] for finding in verify(cache).damaged} == {SHARDS, TARGET}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def write_to(cache: Path) -> list[PipelineError]:
    """Do with a cache what writes to it; returns the typed errors."""
    refused = []
    mend, other = lambda cache: repair(cache, None, None), lambda cache: recode(cache, "aux.1=zstd")
    for write in (clean_scratch, mend, other, make_cache):
        try:
            write(cache)
        except PipelineError as error:
            refused.append(error)
    return refused


@pytest.mark.parametrize("name", [*FOLDERS, f"{SHARDS}/000000", f"{SHARDS}/000001"])
def test_a_folder_that_is_a_link_is_not_written_through(cache, tmp_path, name):
    outside = tmp_path / "outside"
    (cache / name).rename(outside)
    (outside / "tmp-mine").write_text("precious")
    (outside / "samples.json").write_text("precious")
    (cache / name).symlink_to(outside)
    before = tree(outside)

    refused = write_to(cache)

    assert tree(outside) == before
    assert len(refused) == 4 and all("a link" in str(error) for error in refused)


def test_scratch_that_leads_out_is_not_followed(cache, tmp_path):
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "tmp-mine").write_text("precious")
    (cache / "mine").symlink_to(outside)
    (cache / "tmp-one").symlink_to(outside)
    (cache / "tmp-two").symlink_to(outside / "tmp-mine")
    (cache / "tmp-three").mkdir()
    (cache / "tmp-three/lock").symlink_to(outside / "new")
    before = tree(outside)

    with pytest.raises(CacheError, match=r"tmp-three/lock: a link or a folder, where a lock is a file; remove it"):
        clean_scratch(cache)
    (cache / "tmp-three/lock").unlink()
    clean_scratch(cache)

    assert tree(outside) == before and not list(cache.glob("tmp-*"))
    for held in ("commit", "plan"):
        (cache / f"tmp-{held}.lock").symlink_to(outside / "new")
    write_to(cache)
    assert tree(outside) == before


def test_repair_removes_nothing_that_a_manifest_names_outside(cache, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    fact = FileFact.of_bytes(b"").as_dict()
    forge(cache, "target/manifest.json", lambda facts: facts["files"].update({"../../victim": fact, str(victim): fact}))
    with pytest.raises((CacheError, UsageError)):
        repair(cache, None, None)
    assert victim.read_text() == "precious"


def test_a_link_to_everything_is_not_walked(cache):
    for name in ("aux.1.json", "aux.1.arrow"):
        (cache / "shards/000000" / name).unlink()
    shutil.rmtree(cache / "shards/000000/aux.1")
    (cache / "shards/000000/aux.1").symlink_to("/")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it walks"))
    signal.alarm(20)
    verify(cache)
    signal.alarm(0)
