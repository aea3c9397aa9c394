"""What the cache returns is what was written, or an error: never other values."""

import errno
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from cache_maker import COLUMNS, capture, flip, make_cache, random_samples, states
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import HiddenCache
from pipeline.cache import columns as opened
from pipeline.cache.catalog import Catalog
from pipeline.cache.codecs import lossless as direct
from pipeline.cache.codecs import zarr_file as zarr_shard
from pipeline.cache.codecs.codec import ForeignArray
from pipeline.cache.codecs.zarr_file import SHARD_FILE
from pipeline.cache.columns import ColumnSpec, open_column
from pipeline.cache.file_writer import create_identity, new_target
from pipeline.cache.layout import HEAD, INDEX, INDEX_MANIFEST, SAMPLES, shard_folder
from pipeline.cache.manifest import FileFact, canonical, read_canonical
from pipeline.cache.plan import load_plan
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.verify import verify
from pipeline.errors import CacheError, DataError, UsageError, VersionError
from pipeline.target.head import TargetHead
from pipeline.target.layers import final_rows
from stages.recode.run import run as recode


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
    assert (held.dtype, held.hidden_size, held.catalog.partial) == (torch.bfloat16, 8, {})
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


def long_cache(path, T=900, seed=3, columns=COLUMNS):
    """A cache whose first sample has T rows, four blocks and not a whole one more."""
    samples = random_samples(3, longest=300, seed=seed)
    ids, mask = np.resize(samples[0].ids, T), np.resize(samples[0].mask, T)
    return make_cache(path, [type(samples[0])(ids, mask), *samples[1:]], columns)


WINDOWS = [(0, 900), (0, 256), (256, 512), (100, 101), (250, 600), (700, 900), (768, 900), (1, 900), (5, 5), (0, 0)]


def test_a_window_is_the_slice_of_the_whole(tmp_path):
    path = long_cache(tmp_path / "cache")
    for first, stop in WINDOWS:
        held = HiddenCache.open(path)  # nothing of it is checked yet
        for _ in range(2):
            whole = HiddenCache.open(path).read(0, final=True)
            part = held.read(0, final=True, rows=(first, stop))
            assert torch.equal(part.ids, whole.ids[first:stop]) and torch.equal(part.mask, whole.mask[first:stop])
            assert np.array_equal(bits(part.aux.contiguous()), bits(whole.aux[:, first:stop].contiguous()))
            inside = (whole.final_rows >= first) & (whole.final_rows < stop)
            assert torch.equal(part.final_rows, whole.final_rows[inside] - first)
            assert np.array_equal(bits(part.final.contiguous()), bits(whole.final[inside]))


def test_a_window_reads_and_checks_its_own_blocks_only(tmp_path):
    path = long_cache(tmp_path / "cache", columns=COLUMNS[:1])
    flip(shard_folder(path, 0) / "aux.1" / SHARD_FILE, 8 * 16 * 300)  # row 300, of the second block
    held = HiddenCache.open(path)

    for rows in ((0, 256), (100, 200), (512, 900), (600, 601)):
        held.read(0, rows=rows)
    for rows in ((0, 257), (256, 300), (511, 512), (0, 900)):
        with pytest.raises(CacheError, match="rows from 256 are damaged"):
            held.read(0, rows=rows)


def test_a_block_is_hashed_once_while_its_file_stays_the_same(tmp_path, monkeypatch):
    path = long_cache(tmp_path / "cache", columns=COLUMNS[:1])
    file = shard_folder(path, 0) / "aux.1" / SHARD_FILE
    held, hashed = HiddenCache.open(path), []
    xxh3 = direct.xxhash.xxh3_64
    monkeypatch.setattr(direct.xxhash, "xxh3_64", lambda *data: hashed.append(1) or xxh3(*data))

    counts = []
    for rows in ((0, 256), (0, 600), (300, 310), (0, 900), (0, 900)):
        held.read(0, rows=rows)
        counts.append(len(hashed))
    assert counts == [1, 3, 3, 4, 4]
    os.utime(file)
    held.read(0)
    assert len(hashed) == 8, "the times of the file changed"
    with open(file, "r+b") as other:  # in place: the open file is the same
        other.seek(16 * 700)
        byte = other.read(1)[0]
        other.seek(16 * 700)
        other.write(bytes([byte ^ 1]))
    os.utime(file, ns=(1, 1))
    with pytest.raises(CacheError, match="rows from 512 are damaged"):
        held.read(0)


def on_disk(monkeypatch, refusal=errno.EAGAIN) -> list[str]:
    """Let a few bytes at a time be in the machine's memory, and then none; returns who read from the disk."""
    real, asked, waited = os.preadv, itertools.count(), []

    def preadv(fd, buffers, start, flags=0):
        if flags and next(asked) % 3:
            raise OSError(refusal, os.strerror(refusal))
        if not flags:
            waited.append(threading.current_thread().name)
        return real(fd, [buffers[0][:16]] if flags else buffers, start)

    monkeypatch.setattr(opened, "INLINE_BYTES", 0)
    monkeypatch.setattr(os, "preadv", preadv)
    return waited


@pytest.mark.parametrize("where", ["in memory", "on disk", "on a disk that cannot tell", "little"])
def test_parts_of_samples_fill_one_buffer_end_to_end(cache, monkeypatch, where):
    monkeypatch.setattr(opened, "INLINE_BYTES", 1 << 30 if where == "little" else 0)
    held = HiddenCache.open(cache)
    lengths = held.samples.length.tolist()
    parts = [(i, lengths[i] // 3, lengths[i] - lengths[i] // 4) for i in (7, 0, 23, 7, 11)] + [(5, 1, 1)]
    expected = torch.cat([held.read(i, [10, 1]).aux[:, first:stop] for i, first, stop in parts], dim=1)
    memory = torch.full((3, expected.shape[1] + 5, 8), torch.nan, dtype=torch.bfloat16)
    waited = []
    if "disk" in where:
        held = HiddenCache.open(cache)
        waited = on_disk(monkeypatch, errno.EAGAIN if where == "on disk" else errno.EOPNOTSUPP)

    for _ in range(2):  # the second time into memory that was used
        held.fill(memory[:2, : expected.shape[1]], parts, [10, 1])

        assert np.array_equal(bits(memory[:2, : expected.shape[1]].contiguous()), bits(expected))
        assert memory[2].isnan().all() and memory[:, expected.shape[1] :].isnan().all(), "nothing else is written to"
    assert any(name.startswith("read") for name in waited) == ("disk" in where)


def test_what_a_thread_finds_damaged_reaches_the_caller_when_all_are_done(tmp_path, monkeypatch):
    path = make_cache(tmp_path / "cache", random_samples(8), COLUMNS[:2])
    held = HiddenCache.open(path)
    file = shard_folder(path, int(held.samples.shard[3])) / "aux.10" / SHARD_FILE
    flip(file, 8 * 16 * int(held.samples.offset[3]))
    out = torch.empty(2, int(held.samples.length.sum()), 8, dtype=torch.bfloat16)
    on_disk(monkeypatch)

    with pytest.raises(CacheError, match=r"column aux\.10, sample \d+ of the shard: rows from 0"):
        held.fill(out, [(i, 0, int(T)) for i, T in enumerate(held.samples.length)], [1, 10])
    with pytest.raises(DataError, match="refused"):
        refusing = HiddenCache.open(make_cache(tmp_path / "other", random_samples(3), refused={0: "not finite"}))
        refusing.fill(torch.empty(1, 1, 8, dtype=torch.bfloat16), [(0, 0, 1)], [1])


def test_few_open_files_give_the_same_states(cache, monkeypatch):
    whole = HiddenCache.open(cache)
    expected = [whole.read(i, [10, 1], final=True) for i in range(len(whole))]
    monkeypatch.setattr(opened, "OPEN_FILES", 2)
    held = HiddenCache.open(cache)

    for i, sample in enumerate(expected):
        read = held.read(i, [10, 1], final=True)
        assert np.array_equal(bits(read.aux), bits(sample.aux)) and np.array_equal(bits(read.final), bits(sample.final))


def rewritten(path, name, shard=0, **form):
    """Write a column's array anew with zarr-python, in some other form, its manifest with it."""
    folder = shard_folder(path, shard)
    manifest = read_canonical(folder / f"{name}.json")
    manifest.pop("hash")
    values = zarr.open_array(folder / name, mode="r")[:]
    shutil.rmtree(folder / name)
    array = zarr.create_array(folder / name, shape=values.shape, dtype=form.pop("dtype", values.dtype), **form)
    array[:] = values
    files = {fact: size for fact, size in manifest["files"].items() if not fact.startswith(f"{name}/")}
    for file in (folder / name).rglob("*"):
        if file.is_file():
            files[file.relative_to(folder).as_posix()] = FileFact.of_file(file).as_dict()
    (folder / f"{name}.json").write_bytes(canonical({**manifest, "files": files}))


FORMS = {
    "one chunk, not compressed": {"chunks": (900, 8), "compressors": None},
    "many chunks, zstd": {"chunks": (100, 8)},
    "blosc": {"chunks": (64, 3), "compressors": zarr.codecs.BloscCodec(cname="lz4")},
    "big-endian": {"chunks": (128, 8), "compressors": None, "serializer": zarr.codecs.BytesCodec(endian="big")},
    "transposed": {"chunks": (128, 8), "filters": [zarr.codecs.TransposeCodec(order=(1, 0))]},
    "sharded in four": {"chunks": (50, 8), "shards": (250, 8), "compressors": None},
    "our form in other chunks": {"chunks": (100, 8), "shards": (900, 8), "compressors": None},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_arrays_in_a_form_of_others_give_the_same_values(tmp_path, form):
    path = make_cache(tmp_path / "cache", [next(iter(random_samples(1, longest=900, seed=8)))], COLUMNS[:1])
    right = HiddenCache.open(path).read(0)
    shape = zarr.open_array(shard_folder(path, 0) / "aux.1", mode="r").shape
    sizes = {key: (min(form[key][0], shape[0]), form[key][1]) for key in ("chunks",) if key in form}
    rewritten(path, "aux.1", **{**form, **sizes})

    held = HiddenCache.open(path)
    assert np.array_equal(bits(held.read(0).aux), bits(right.aux))
    T = len(right.ids)
    part = held.read(0, rows=(T // 3, T // 2)).aux
    assert np.array_equal(bits(part), bits(right.aux[:, T // 3 : T // 2].contiguous()))

    assert not verify(path).damaged
    chunk = next(file for file in (shard_folder(path, 0) / "aux.1" / "c").rglob("*") if file.is_file())
    flip(chunk, 8 * 100)
    assert {finding.column for finding in verify(path).damaged} == {"aux.1"}
    flip(chunk, 8 * 100)
    recode(path, "zstd")
    assert np.array_equal(bits(HiddenCache.open(path).read(0).aux), bits(right.aux)) and not verify(path).damaged


def test_threads_open_arrays_of_others_one_at_a_time(tmp_path, monkeypatch):
    path = make_cache(tmp_path / "cache", random_samples(8), COLUMNS[:1])
    for shard in range(HiddenCache.open(path).shards):
        rewritten(path, "aux.1", shard, chunks=(16, 8))
    inside, most, opening = [], [], zarr.open_array

    def slowly(*arguments, **named):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return opening(*arguments, **named)

    monkeypatch.setattr(zarr, "open_array", slowly)
    before = zarr.config.get("codecs.zstd")
    held = HiddenCache.open(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(held.read, range(8)))
    assert len(most) >= held.shards > 1 and max(most) == 1 and zarr.config.get("codecs.zstd") == before


def test_a_store_that_is_no_folder_gives_the_same_values(tmp_path):
    path = make_cache(tmp_path / "cache", random_samples(1, longest=900, seed=8), COLUMNS[:1])
    store = zarr.storage.MemoryStore()
    values = zarr.open_array(shard_folder(path, 0) / "aux.1", mode="r")[:]
    zarr.create_array(store, data=values, chunks=(64, 8))
    held = HiddenCache.open(path)
    T = int(held.samples.length[0])
    out = np.zeros((T, 8), np.uint16)

    column = open_column(path, held.columns(0)["aux.1"], load_plan(path).shards[0])
    column.read_into(ForeignArray(store, T, 8, "bfloat16", "elsewhere"), 0, memoryview(out).cast("B"))

    assert np.array_equal(out, bits(held.read(0).aux[0]))


@pytest.mark.parametrize("compressor", [zarr.codecs.ZstdCodec(), zarr.codecs.BloscCodec(cname="zstd")])
def test_a_small_chunk_that_decodes_to_much_is_refused_before_it_is_decoded(tmp_path, compressor):
    path = make_cache(tmp_path / "cache", random_samples(1, longest=900, seed=8), COLUMNS[:1])
    rewritten(path, "aux.1", chunks=(256, 8), compressors=compressor)
    bomb = zarr.storage.MemoryStore()
    zarr.create_array(bomb, data=np.ones((1 << 21, 8), np.uint16), chunks=(1 << 21, 8), compressors=compressor)
    chunk = zarr.core.sync.sync(bomb.get("c/0/0", zarr.core.buffer.default_buffer_prototype())).to_bytes()
    assert len(chunk) < 1 << 20
    folder = shard_folder(path, 0)
    (folder / "aux.1/c/0/0").write_bytes(chunk)
    manifest = read_canonical(folder / "aux.1.json")
    manifest.pop("hash")
    manifest["files"]["aux.1/c/0/0"] = FileFact.of_file(folder / "aux.1/c/0/0").as_dict()
    (folder / "aux.1.json").write_bytes(canonical(manifest))
    held = HiddenCache.open(path)
    held.tokens_of(0)

    tracemalloc.start()
    with pytest.raises(CacheError, match="says that it decodes to 33554432 bytes"):
        held.read(0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 16 << 20


def test_codecs_and_arrays_that_cannot_be_right_are_refused(tmp_path):
    path = make_cache(tmp_path / "cache", random_samples(1, longest=900, seed=8), COLUMNS[:1])
    rewritten(path, "aux.1", chunks=(256, 8), compressors=zarr.codecs.GzipCodec())
    with pytest.raises(CacheError, match="codec 'gzip' decodes to any size"):
        HiddenCache.open(path).read(0)
    rewritten(path, "aux.1", chunks=(256, 8), dtype=np.dtype("<u4"))
    with pytest.raises(CacheError, match=r"of uint32, wanted \(\d+, 8\) of uint16"):
        HiddenCache.open(path).read(0)
    (shard_folder(path, 0) / "aux.1/zarr.json").write_bytes(b"{}")
    with pytest.raises(CacheError, match=r"aux\.1"):
        HiddenCache.open(path).read(0)


def test_a_view_is_judged_by_its_own_columns(tmp_path):
    path = make_cache(tmp_path / "cache", random_samples(20), COLUMNS[:1])
    for shard in load_plan(path).shards:
        capture(path, shard, COLUMNS[1:], {0: "not finite"} if shard.number == 0 else None)
    held = HiddenCache.open(path)

    assert held.samples.usable([1]).all()
    refused = np.flatnonzero(~held.samples.usable([1, 10])).tolist()
    assert refused == [0] == np.flatnonzero(~held.samples.ok).tolist()
    assert np.flatnonzero(~held.samples.usable([1], final=True)).tolist() == [0]
    assert held.read(0, layers=[1]).aux.shape[0] == 1
    for layers, final in (([1, 10], False), ([1], True)):
        with pytest.raises(DataError, match="sample 0 was refused"):
            held.read(0, layers, final)


def test_each_shard_says_itself_which_rows_keep_final(tmp_path):
    path = make_cache(tmp_path / "cache", random_samples(6), COLUMNS[:1])
    every = replace(COLUMNS[2], keeps="all")
    for shard in load_plan(path).shards:
        capture(path, shard, [every if shard.number == 0 else COLUMNS[2]])
    held = HiddenCache.open(path)

    for i in range(6):
        column = every if held.samples.shard[i] == 0 else COLUMNS[2]
        sample = held.read(i, final=True)
        assert np.array_equal(bits(sample.final), truth(path, i, column)) and len(sample.final_rows) == len(
            sample.final
        )


def test_opening_reads_no_manifest_and_touching_a_column_does(tmp_path):
    path = make_cache(tmp_path / "cache", random_samples(24), COLUMNS[:2])
    right = HiddenCache.open(path)
    i = int(np.flatnonzero(right.samples.shard == 5)[0])
    flip(shard_folder(path, 5) / "aux.10.json", 800)
    held = HiddenCache.open(path)

    assert held.read(0).aux.shape[0] == 2 and held.samples.usable([1]).all()
    for touch in (lambda: held.read(i, [10]), lambda: held.samples.usable([10]), lambda: held.samples.ok):
        with pytest.raises(CacheError, match=r"aux\.10\.json: damaged"):
            touch()


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
    assert held.catalog.partial == {"aux.10": last, "final": last}
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
    (path / "cache.json").write_bytes(canonical({}, "7"))
    with pytest.raises(VersionError, match="format version '7' is unknown to this version"):
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
    with new_target(Catalog(tmp_path)) as folder:
        head.save(folder / HEAD)
        (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))
        (folder / "tokens.json").write_text(json.dumps({"mask": 3}))
    with new_target(Catalog(tmp_path)) as folder:  # the first one stays
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
