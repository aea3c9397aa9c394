"""What the cache returns is what was written, or an error: never other values."""

import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest
import torch
from cache_maker import COLUMNS, capture, flip, make_cache, random_samples, states
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import HiddenCache, opened, zarr_shard
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.layout import INDEX, INDEX_MANIFEST, SAMPLES, shard_folder
from pipeline.cache.manifest import FileFact, canonical, create_identity, read_canonical
from pipeline.cache.plan import load_plan, write_segment
from pipeline.cache.target_folder import HEAD, new_target
from pipeline.cache.zarr_shard import SHARD_FILE
from pipeline.capture import final_rows
from pipeline.errors import CacheError, DataError, UsageError
from pipeline.target_head import TargetHead


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("reader") / "cache")


def truth(path, i, column):
    """Rows of sample `i` as they were written."""
    held, plan = HiddenCache.open(path), load_plan(path)
    shard, row = plan.shards[held.samples.shard[i]], held.samples.row[i]
    bounds = column.bounds(shard)
    return states(shard, column)[bounds[row] : bounds[row + 1]]


def bits(tensor):
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def test_a_sample_comes_back_as_it_was_written(cache):
    held = HiddenCache.open(cache)

    assert (len(held), held.layers, held.has_final) == (24, (1, 10), True)
    assert (held.dtype, held.hidden_size, held.missing) == (torch.bfloat16, 8, [])
    for i in range(len(held)):
        sample = held.read(i, final=True)
        ids, mask = held.tokens_of(i)
        assert sample.aux.shape == (2, held.samples.length[i], 8) and sample.aux.dtype == torch.bfloat16
        for k, column in enumerate(COLUMNS[:2]):
            assert np.array_equal(bits(sample.aux[k]), truth(cache, i, column))
        assert np.array_equal(bits(sample.final), truth(cache, i, COLUMNS[2]))
        assert sample.final_rows.tolist() == np.flatnonzero(final_rows(mask)).tolist()
        assert sample.ids.tolist() == ids.tolist() and sample.mask.tolist() == mask.tolist()
        assert held.samples.supervised[i] == mask.sum()


def test_layers_come_in_the_order_asked_for_and_nothing_else_is_read(cache):
    held = HiddenCache.open(cache)

    swapped = held.read(3, layers=[10, 1])

    assert np.array_equal(bits(swapped.aux[0]), truth(cache, 3, COLUMNS[1]))
    assert np.array_equal(bits(swapped.aux[1]), truth(cache, 3, COLUMNS[0]))
    assert swapped.final is None and swapped.final_rows is None
    assert held.read(3, layers=[]).aux.shape == (0, held.samples.length[3], 8)


def test_the_table_names_each_sample_as_the_corpus_does(cache):
    table = HiddenCache.open(cache).samples
    plan = load_plan(cache)

    rows = [(shard, row) for shard in plan.shards for row in range(len(shard))]
    names = [shard.batch.column("sample_id")[row].as_py() for shard, row in rows]
    assert [table.hex(i) for i in range(24)] == [name.hex() for name in names]
    assert table.low64.tolist() == [int.from_bytes(name[8:], "big") for name in names]
    assert np.lexsort((table.sample_id[:, 1], table.sample_id[:, 0])).tolist() == np.argsort(names).tolist()
    assert table.domain == [shard.text("domain")[row] for shard, row in rows]
    assert table.split == [shard.text("split")[row] for shard, row in rows]
    assert table.length.tolist() == [int(shard.lengths[row]) for shard, row in rows]
    assert table.ok.all()


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    keeps=st.sampled_from(["all", "needed"]),
    chunk_bytes=st.sampled_from([2000, 3 << 20]),
    seed=st.integers(0, 999),
)
def test_any_lengths_dtype_and_chunks_come_back(tmp_path_factory, lengths, dtype, keeps, chunk_bytes, seed):
    path = tmp_path_factory.mktemp("any") / "cache"
    samples = [random_samples(1, seed=seed + n)[0] for n in range(len(lengths))]
    cut = [type(s)(np.resize(s.ids, T), np.resize(s.mask, T)) for s, T in zip(samples, lengths, strict=True)]
    columns = [ColumnSpec("aux.-1", dtype, 3), ColumnSpec("final", dtype, 3, keeps=keeps)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr_shard, "CHUNK_BYTES", chunk_bytes)
        make_cache(path, cut, columns)
        held = HiddenCache.open(path)
        for i in range(len(held)):
            sample = held.read(i, final=True)
            assert np.array_equal(bits(sample.aux[0]), truth(path, i, columns[0]))
            assert np.array_equal(bits(sample.final), truth(path, i, columns[1]))
            if keeps == "all":
                assert sample.final_rows.tolist() == list(range(len(sample.ids)))


def test_many_threads_and_few_open_files_read_right_values(cache, monkeypatch):
    monkeypatch.setattr(opened, "OPEN_FILES", 2)
    held = HiddenCache.open(cache)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    expected = [truth(cache, i, COLUMNS[0]) for i in range(24)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: bits(held.read(i % 24, layers=[1]).aux[0]), range(240)))

    assert all(np.array_equal(values, expected[i % 24]) for i, values in enumerate(found))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_flipped_bit_is_an_error_or_is_not_read(tmp_path):
    path = make_cache(tmp_path / "cache", random_samples(5, longest=400), COLUMNS[:1])
    right = [HiddenCache.open(path).read(i) for i in range(5)]
    rng = np.random.default_rng(1)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "config.json")
    found = 0
    for _ in range(150):
        file = files[rng.integers(len(files))]
        bit = int(rng.integers(8 * file.stat().st_size))
        flip(file, bit)
        try:
            held = HiddenCache.open(path)
            for i in range(5):
                sample = held.read(i)
                assert torch.equal(sample.ids, right[i].ids) and torch.equal(sample.mask, right[i].mask), (file, bit)
                assert np.array_equal(bits(sample.aux), bits(right[i].aux)), (file, bit)
        except CacheError:
            found += 1
        flip(file, bit)
    assert found > 60


def test_damage_names_shard_column_and_sample(tmp_path):
    path = make_cache(tmp_path / "cache", random_samples(3, longest=2000, seed=3), COLUMNS[:1])
    held = HiddenCache.open(path)
    i = int(np.flatnonzero(held.samples.length > 600)[0])
    shard = int(held.samples.shard[i])
    flip(shard_folder(path, shard) / "aux.1" / SHARD_FILE, 8 * 16 * 300)

    says = f"shard {shard:06d}, column aux.1, sample 0 of the shard: rows from 256 .*run `pipeline verify`"
    with pytest.raises(CacheError, match=says):
        held.read(i)
    assert held.tokens_of(i)[0].size  # the tokens are whole


def test_a_shard_file_that_is_cut_short_or_missing_is_named(tmp_path):
    path = make_cache(tmp_path / "cache", random_samples(2))
    file = shard_folder(path, 0) / "aux.1" / SHARD_FILE
    os.truncate(file, file.stat().st_size - 1)

    with pytest.raises(CacheError, match=r"aux.1/c/0/0: \d+ bytes, its manifest says \d+; run `pipeline verify`"):
        HiddenCache.open(path).read(0)
    file.unlink()
    with pytest.raises(CacheError, match=r"aux\.1/c/0/0: missing"):
        HiddenCache.open(path).read(0)


def test_other_tokens_than_the_manifest_names_are_refused(tmp_path):
    path = make_cache(tmp_path / "cache", random_samples(2))
    flip(shard_folder(path, 0) / SAMPLES, 8 * 1000)

    with pytest.raises(CacheError, match=r"samples\.arrow: damaged"):
        HiddenCache.open(path).tokens_of(0)


def test_chunks_in_another_order_are_read_right(tmp_path, monkeypatch):
    monkeypatch.setattr(zarr_shard, "CHUNK_BYTES", 1000)
    path = make_cache(tmp_path / "cache", random_samples(1, seed=5), COLUMNS[:1])
    right = bits(HiddenCache.open(path).read(0).aux)
    folder = shard_folder(path, 0)
    file, manifest = folder / "aux.1" / SHARD_FILE, read_canonical(folder / "aux.1.json")
    data = file.read_bytes()
    grid = zarr_shard.Grid.of(manifest["rows"], 8, np.dtype("<u2"))
    assert grid.chunks > 3
    order = np.random.default_rng(0).permutation(grid.chunks)
    moved = b"".join(data[n * grid.chunk_bytes : (n + 1) * grid.chunk_bytes] for n in order)
    pairs = b"".join(
        struct.pack("<QQ", int(np.argsort(order)[n]) * grid.chunk_bytes, grid.chunk_bytes) for n in range(grid.chunks)
    )
    file.write_bytes(moved + pairs + struct.pack("<I", google_crc32c.value(pairs)))
    manifest["files"][f"aux.1/{SHARD_FILE}"] = FileFact.of_file(file).as_dict()
    manifest.pop("hash")
    (folder / "aux.1.json").write_bytes(canonical(manifest))

    assert np.array_equal(bits(HiddenCache.open(path).read(0).aux), right)


def test_a_column_of_an_unfinished_capture_is_not_whole(tmp_path):
    create_identity(tmp_path, {})
    plan = write_segment(tmp_path, random_samples(24), row_bytes=48, sources=[])
    for shard in plan.shards[:-1]:
        capture(tmp_path, shard, COLUMNS)
    capture(tmp_path, plan.shards[-1], COLUMNS[:1])

    held = HiddenCache.open(tmp_path)

    last = plan.shards[-1].number
    assert held.layers == (1,) and not held.has_final
    assert held.missing == [(last, "aux.10"), (last, "final")]
    with pytest.raises(UsageError, match=r"holds layers \[1\] whole, \[10\] are wanted too.*--layers 1,10"):
        held.read(0, layers=[1, 10])
    with pytest.raises(UsageError, match="holds no `final`"):
        held.read(0, final=True)


def test_a_refused_sample_is_not_ok_and_cannot_be_read(tmp_path):
    path = make_cache(tmp_path / "cache", random_samples(48), refused={1: "not finite"})
    held = HiddenCache.open(path)

    assert held.samples.ok.tolist() == [i != 1 for i in range(48)]
    with pytest.raises(DataError, match="sample 1 was refused"):
        held.read(1)


def test_a_cache_with_a_plan_only_knows_its_samples(tmp_path):
    create_identity(tmp_path, {})
    write_segment(tmp_path, random_samples(5), row_bytes=48, sources=[])

    held = HiddenCache.open(tmp_path)

    assert len(held) == 5 and held.layers == () and len(held.tokens_of(4)[0]) == held.samples.length[4]
    with pytest.raises(UsageError, match="nothing is captured yet"):
        held.read(0)


def test_a_folder_without_a_cache_and_another_version_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no cache there"):
        HiddenCache.open(tmp_path)
    path = make_cache(tmp_path / "cache", random_samples(1))
    (path / "cache.json").write_bytes(canonical({}).replace(b"1-rc", b"7"))
    with pytest.raises(CacheError, match="format version '7', this program reads '1-rc'"):
        HiddenCache.open(path)


def test_the_index_is_made_again_when_it_is_lost_or_damaged(tmp_path):
    path = make_cache(tmp_path / "cache", random_samples(6))
    right = HiddenCache.open(path)
    flip(path / INDEX, 4000)
    damaged = HiddenCache.open(path)
    (path / INDEX_MANIFEST).unlink()
    lost = HiddenCache.open(path)

    for held in (damaged, lost):
        assert held.digest == right.digest and held.samples.domain == right.samples.domain
        for name in ("sample_id", "shard", "row", "offset", "length", "final_offset", "final_length", "supervised"):
            assert np.array_equal(getattr(held.samples, name), getattr(right.samples, name)), name


def test_a_column_of_another_cache_is_refused(tmp_path):
    path = make_cache(tmp_path / "cache", random_samples(2), COLUMNS[:1])
    manifest = read_canonical(shard_folder(path, 0) / "aux.1.json")
    manifest.pop("hash")
    (shard_folder(path, 0) / "aux.1.json").write_bytes(canonical({**manifest, "cache": "0" * 32}))

    held = HiddenCache.open(path)
    for touch in (lambda: held.layers, lambda: held.read(0), lambda: held.samples.usable([1])):
        with pytest.raises(CacheError, match="belongs to another cache"):
            touch()


def test_the_digest_tells_corpora_apart(tmp_path):
    first, same, other = (
        HiddenCache.open(make_cache(tmp_path / name, random_samples(2, seed=seed)))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.digest == same.digest != other.digest and first.identity == other.identity


def test_the_head_comes_back_and_is_checked(tmp_path):
    create_identity(tmp_path, {})
    write_segment(tmp_path, random_samples(1), row_bytes=48, sources=[])
    head = TargetHead(torch.randn(11, 8), torch.randn(11, 8))
    with new_target(tmp_path) as folder:
        head.save(folder / HEAD)
        (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))
        (folder / "tokens.json").write_text(json.dumps({"mask": 3}))
    with new_target(tmp_path) as folder:  # the first one stays
        (folder / "config.json").write_text("other")

    held = HiddenCache.open(tmp_path)

    assert torch.equal(held.head().head_VD, head.head_VD) and held.head().embed_VD.dtype == torch.float32
    assert held.head(dtype=torch.bfloat16).embed_VD.dtype == torch.bfloat16
    assert held.target_config == {"hidden_size": 8} and held.tokens == {"mask": 3}
    flip(tmp_path / "target" / HEAD, 3000)
    with pytest.raises(CacheError, match=r"head.safetensors: damaged"):
        HiddenCache.open(tmp_path).head()


def test_opening_a_cache_imports_no_torch_and_no_pandas(cache):
    code = "import sys; from pipeline.cache import HiddenCache; HiddenCache.open(sys.argv[1]).tokens_of(0); "
    code += "assert not {'torch', 'zarr', 'transformers', 'pandas'} & {*sys.modules}"

    subprocess.run([sys.executable, "-c", code, str(cache)], check=True)
