"""Codecs give back what they promise, whatever the values; hostile chunks are refused; a recode loses nothing."""

import os
import shutil
import struct
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numcodecs.blosc
import numpy as np
import pytest
import torch
import zarr
from cache_maker import CAPTURE, COLUMNS, contents, make_cache, random_samples, states, without_record
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_codec import Fixed16

from pipeline.cache import HiddenCache
from pipeline.cache.catalog import Catalog
from pipeline.cache.codecs import CODECS, codec_of, parse_codecs
from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.codecs.error_certificate import calibrate, calibration_samples, largest_errors
from pipeline.cache.codecs.lossless import ZstdReader, ZstdWriter
from pipeline.cache.codecs.scaled_groups import OUTLIER_STDS
from pipeline.cache.codecs.zarr_file import SHARD_FILE, parse_chunk_index
from pipeline.cache.columns import Column, ColumnSpec, open_column
from pipeline.cache.layout import shard_folder
from pipeline.cache.manifest import read_canonical
from pipeline.cache.plan import load_plan
from pipeline.cache.schema import column_manifest
from pipeline.cache.verify import verify
from pipeline.cache.writer import read_calibration
from pipeline.errors import CacheError, ProofError, UsageError
from pipeline.tensors import as_states, as_stored
from stages.cache_hidden.run import run as capture
from stages.cache_hidden.settings import CaptureOptions

HERE = Path(__file__).parents[2]
ZSTD, INT8, INT6 = CODECS["zstd"], CODECS["int8"], CODECS["int6"]
SCALED = [INT8, INT6]
NAMES = [*CODECS, "fixed16"]  # with one that only tests have
DTYPES = ["bfloat16", "float32"]


@pytest.fixture(autouse=True, scope="module")
def fixed16():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CODECS, "fixed16", Fixed16())
        yield


def in_codec(codec: str, dtype: str = "bfloat16", width: int = 8) -> list[ColumnSpec]:
    return [replace(spec, codec=codec, dtype=dtype, width=width) for spec in COLUMNS]


def bits(states_RD: torch.Tensor) -> np.ndarray:
    """Bit patterns, so that NaN equals itself and -0 is not 0."""
    return as_stored(states_RD.contiguous()).view(np.uint16)


# Whole caches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", NAMES)
def test_a_cache_in_any_codec_reads_back_within_its_promise_and_verifies(tmp_path, codec, dtype):
    columns = in_codec(codec, dtype, 12)
    cache = make_cache(tmp_path / "cache", random_samples(5), columns, refused={0: "not finite"})
    assert not verify(cache).damaged and not verify(cache).missing and not verify(cache).foreign
    held, plan = HiddenCache.open(cache), load_plan(cache)
    for i in np.flatnonzero(held.samples.ok):
        shard, row = plan.shards[held.samples.shard[i]], int(held.samples.row[i])
        sample = held.read(int(i), final=True)
        for spec, found in zip(columns, [*sample.aux, sample.final], strict=True):
            bounds = spec.bounds(shard)
            truth = as_states(states(shard, spec)[bounds[row] : bounds[row + 1]])
            assert found.dtype == truth.dtype == held.dtype
            if CODECS[codec].lossy:
                bound = largest_errors(CODECS[codec], truth, read_calibration(Catalog(cache), spec.name, spec.width))
                assert ((found.float() - truth.float()).abs() <= bound).all()
            else:
                assert np.array_equal(bits(found), bits(truth))


@pytest.mark.parametrize("codec", NAMES)
def test_rows_from_any_block_on_are_those_of_the_whole(tmp_path, codec):
    cache = make_cache(tmp_path / "cache", random_samples(2, longest=1500, seed=4), in_codec(codec))
    shard = max(load_plan(cache).shards, key=lambda shard: shard.lengths[0])
    column = open_column(cache, column_manifest(cache, shard.number, "aux.1"), shard)
    whole, reader = column.read(0), column.open()
    assert len(whole) > 600
    for first, stop in ((0, 256), (256, 512), (512, len(whole)), (256, len(whole))):
        part = np.empty_like(whole[first:stop])
        column.read_into(reader, 0, memoryview(part).cast("B"), first)
        assert np.array_equal(part, whole[first:stop])
    assert np.array_equal(column.read(0, blocks=1), whole[:256])


def long_cache(path: Path, codec: str, T: int, width: int) -> Path:
    """One sample of T rows."""
    (sample,) = random_samples(1)
    long = replace(sample, ids=np.resize(sample.ids, T), mask=np.resize(sample.mask, T))
    return make_cache(path, [long], in_codec(codec, "bfloat16", width)[:1])


@pytest.mark.parametrize("codec", NAMES)
def test_any_window_is_the_slice_of_the_whole(tmp_path, codec):
    held = HiddenCache.open(long_cache(tmp_path / "cache", codec, 900, 8))
    whole = held.read(0).aux
    for first in (0, 1, 100, 255, 256, 700, 899, 900):
        for stop in (0, 1, 101, 256, 257, 512, 600, 768, 899, 900):
            if first <= stop:
                found = held.read(0, rows=(first, stop)).aux
                assert np.array_equal(bits(found), bits(whole[:, first:stop])), (first, stop)


@pytest.mark.parametrize("codec", ["zstd", "int8", "int6", "fixed16"])
def test_a_window_takes_no_memory_but_for_its_ends(tmp_path, codec):
    held = HiddenCache.open(long_cache(tmp_path / "cache", codec, 9000, 256))
    out = torch.empty(1, 8000, 256, dtype=torch.bfloat16)
    held.fill(out, [(0, 500, 8500)], [1])
    tracemalloc.start()
    held.fill(out, [(0, 500, 8500)], [1])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 << 20 < out.nbytes / 1.9


@pytest.mark.parametrize("codec", NAMES)
def test_checking_a_long_sample_takes_little_memory(tmp_path, codec):
    cache = long_cache(tmp_path / "cache", codec, 12_000, 256)
    column = open_column(cache, column_manifest(cache, 0, "aux.1"), load_plan(cache).shards[0])
    reader = column.open()
    tracemalloc.start()
    assert column.damaged_samples(reader) == []
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5 << 20 < column.spec.row_bytes * 12_000


@pytest.mark.parametrize("codec", NAMES)
def test_the_bytes_do_not_depend_on_the_pieces_rows_come_in(tmp_path, codec, monkeypatch):
    columns, samples = in_codec(codec), random_samples(3)
    whole = contents(make_cache(tmp_path / "a", samples, columns))
    import cache_maker

    monkeypatch.setattr(cache_maker, "range", lambda first, stop, step: range(first, stop, 100), raising=False)
    assert contents(make_cache(tmp_path / "b", samples, columns)) == whole


@pytest.mark.parametrize("codec", ["zstd", "int8", "int6", "fixed16"])
def test_a_flipped_bit_of_any_file_is_found_or_changes_nothing_read(tmp_path, codec):
    cache = make_cache(tmp_path / "cache", random_samples(1, longest=300), in_codec(codec)[:1])
    right = bits(HiddenCache.open(cache).read(0).aux)
    rng = np.random.default_rng(0)
    for name, data in contents(cache).items():
        if f"aux.1.{codec}" not in name:
            continue
        for at in rng.choice(8 * len(data), min(6, 8 * len(data)), replace=False).tolist():
            flipped = bytearray(data)
            flipped[at // 8] ^= 1 << at % 8
            (cache / name).write_bytes(flipped)
            assert verify(cache).damaged, (name, at)
            try:
                found = bits(HiddenCache.open(cache).read(0).aux)
            except CacheError:
                continue
            assert np.array_equal(found, right), (name, at)
        (cache / name).write_bytes(data)


# zstd


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3000),
    width=st.integers(1, 700),
    dtype=st.sampled_from(["<u2", "<f4"]),
    noise=st.booleans(),
    seed=st.integers(0, 99),
)
def test_zarr_python_reads_what_zstd_wrote(tmp_path_factory, rows, width, dtype, noise, seed):
    folder, rng = tmp_path_factory.mktemp("zstd"), np.random.default_rng(seed)
    values = (rng.standard_normal((rows, width)) * (1e4 if noise else 0)).astype(dtype)
    writer = ZstdWriter(folder / "a", ZSTD.grid(rows, width, np.dtype(dtype)))
    for part in np.array_split(values, 3):
        writer.write(part)
    writer.finish()
    assert np.array_equal(zarr.open_array(folder / "a", mode="r")[:rows], values)
    reader, found = ZstdReader(folder / "a", ZSTD.grid(rows, width, np.dtype(dtype))), np.empty_like(values)
    reader.read_into(0, memoryview(found).cast("B"))
    assert np.array_equal(found, values)


@pytest.mark.parametrize(
    ("width", "dtype", "rows"),
    [
        (4096, "<u2", 64),
        (5120, "<u2", 76),
        (2560, "<u2", 102),
        (1024, "<u2", 128),
        (256, "<u2", 512),
        (256, "<f4", 512),
        (4096, "<f4", 64),
        (1 << 20, "<u2", 1),
    ],
)
def test_a_chunk_has_whole_blocks_of_zstd_for_each_byte_and_few_rows(width, dtype, rows):
    grid = ZSTD.grid(70_000, width, np.dtype(dtype))
    assert grid.chunk_rows == rows and (grid.chunk_bytes <= 1 << 20 or rows == 1)
    assert [ZSTD.grid(few, width, np.dtype(dtype)).chunk_rows for few in (0, 1, 5)] == [1, 1, min(5, rows)]


@pytest.fixture
def zstd_file(tmp_path):
    """A compressed array of two chunks, and its path."""
    values = np.random.default_rng(0).standard_normal((600, 512)).astype("<f4")
    writer = ZstdWriter(tmp_path / "a", ZSTD.grid(600, 512, np.dtype("<f4")))
    writer.write(values)
    writer.finish()
    return tmp_path / "a"


def read_all(folder: Path) -> None:
    values = np.empty((600, 512), "<f4")
    ZstdReader(folder, ZSTD.grid(600, 512, np.dtype("<f4"))).read_into(0, memoryview(values).cast("B"))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (4, struct.pack("<I", 1 << 30)),  # decodes to 1 GiB, it says
        (4, struct.pack("<I", 4)),
        (8, struct.pack("<I", 0)),
        (8, struct.pack("<I", 0xFFFFFFFF)),
        (12, struct.pack("<I", 16)),
        (12, struct.pack("<I", 0xFFFFFFFF)),
        (2, b"\x00"),  # another inner format: blosclz
        (2, b"\x85"),
        (3, b"\x01"),
    ],
)
def test_a_chunk_that_claims_another_size_or_form_is_refused_before_it_is_decoded(zstd_file, monkeypatch, place, value):
    file = zstd_file / SHARD_FILE
    data = bytearray(file.read_bytes())
    data[place : place + len(value)] = value
    file.write_bytes(data)
    monkeypatch.setattr(numcodecs.blosc, "decompress", None)
    with pytest.raises(CacheError, match="chunk 0 is damaged or claims another size"):
        read_all(zstd_file)


def test_damaged_chunks_give_typed_errors_or_other_values(zstd_file):
    file, rng = zstd_file / SHARD_FILE, np.random.default_rng(1)
    whole, refused = file.read_bytes(), 0
    for _ in range(200):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 3):
            data[at] ^= int(rng.integers(1, 256))
        file.write_bytes(data)
        try:
            read_all(zstd_file)
        except CacheError:
            refused += 1
    assert refused


def test_an_index_that_points_outside_is_refused():
    from pipeline.cache.codecs.zarr_file import chunk_index

    good = chunk_index(np.array([100, 50]))
    assert parse_chunk_index(good, 150, Path("x"))[0].tolist() == [0, 100]
    for sizes in ([100, 51], [2**64 - 1, 2**64 - 1], [2**63, 2**63]):
        with pytest.raises(CacheError, match="hole"):
            parse_chunk_index(chunk_index(np.array(sizes, np.uint64)), 150, Path("x"))
    with pytest.raises(CacheError, match="crc32c"):
        parse_chunk_index(good[:-1] + b"\0", 150, Path("x"))


# int8 and int6


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, to even, as float32."""
    held = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((held + 0x7FFF + ((held >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def six_bits(stored: np.ndarray, width: int) -> np.ndarray:
    """The whole numbers that rows of int6 hold, bit by bit."""
    Q = -(-width // 4)
    places = np.unpackbits(stored.reshape(len(stored), 3, Q), axis=1, bitorder="little").reshape(len(stored), 3, 8, Q)
    weights = 1 << np.arange(6)
    first = np.einsum("rkbq,b->rkq", places[:, :, :6].astype(int), weights).reshape(len(stored), 3 * Q)
    last = np.einsum("rbq,b->rq", places[:, :, 6:].astype(int).reshape(len(stored), 6, Q), weights)
    return np.concatenate([first, last], axis=1)[:, :width] - 32


def decoded_by_numpy(held) -> np.ndarray:
    """The decoder as the format states it, each step rounded in float32."""
    q, scale = held.arrays
    rows, width = len(held), held.width
    if held.codec is INT6:
        q = six_bits(q, width).astype(np.float32)
        q = q * (q * q + 1024)
    scale = (scale.astype(np.uint32) << 16).view(np.float32)
    values = q.astype(np.float32).reshape(rows, -1, held.codec.group_of(width)) * scale[..., None]
    values = values.reshape(rows, width) * held.calibration.std + held.calibration.mean
    whole = held.dtype == "float32"
    found = values.view(np.uint32) if whole else (rounded(values).view(np.uint32) >> 16).astype(np.uint16)
    found[held.outliers[:, 0], held.outliers[:, 1]] = held.outliers[:, 2].astype(np.int64) & (
        2 ** (32 if whole else 16) - 1
    )
    return found


def made_states(seed: int, rows: int, width: int, kind: str) -> tuple[torch.Tensor, Calibration]:
    """States of one kind of trouble, with the calibration of ordinary ones."""
    rng = np.random.default_rng(seed)
    std, mean = np.exp(rng.standard_normal(width) * 2), rng.standard_normal(width) * 10
    values = rng.standard_normal((rows, width)) * std + mean
    usual = rng.standard_normal((300, width)) * std + mean
    if kind == "sinks":
        values[:: max(1, rows // 2), rng.integers(0, width, 2)] = 2000 * std.max()
    elif kind == "zero groups":
        values[rng.random(rows) < 0.5] = mean
        values[:, : width // 2] = mean[: width // 2]
    elif kind == "zeros":
        values[:] = 0
    elif kind == "subnormal":
        values, usual = values * 1e-40, usual * 1e-40
    elif kind == "constant channels":
        usual[:, ::2] = values[:, ::2] = 3.0
    elif kind == "heavy tails":
        values = rng.standard_cauchy((rows, width)) * std + mean
    elif kind == "huge":
        values, usual = values * 1e32, usual * 1e32
    usual = torch.from_numpy(usual.astype(np.float32)).bfloat16()
    return torch.from_numpy(values.astype(np.float32)), calibrate(as_stored(usual))


KINDS = ["ordinary", "sinks", "zero groups", "zeros", "subnormal", "constant channels", "heavy tails", "huge"]


@settings(max_examples=120, deadline=None)
@given(
    codec=st.sampled_from(SCALED),
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 40),
    width=st.sampled_from([1, 8, 96, 128, 130, 131, 256]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_every_entry_is_within_its_promise_and_numpy_decodes_the_same_bits(codec, kind, rows, width, dtype, seed):
    states_RD, calibration = made_states(seed, rows, width, kind)
    states_RD = states_RD.to(getattr(torch, dtype))
    before = states_RD.clone()
    held = codec.encode_to_host(states_RD, calibration)
    found_RD = held.decode()
    assert torch.equal(states_RD, before), "encoding left the caller's states alone"
    error_RD = (found_RD.double() - states_RD.double()).abs()
    assert (error_RD <= largest_errors(codec, states_RD, calibration).double()).all()
    assert np.array_equal(as_stored(found_RD).view(decoded_by_numpy(held).dtype), decoded_by_numpy(held))
    at = tuple(held.outliers[:, :2].T)
    assert np.array_equal(as_stored(found_RD)[at], as_stored(states_RD)[at]), "escapes are exact"


@pytest.mark.parametrize(("codec", "most"), [(INT8, 4), (INT6, 6)])
def test_what_escapes_is_what_lies_beyond_16_spreads_or_so_many_rms_of_its_row(codec, most):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((50, 256)).astype(np.float32)
    z[3, 7], z[4, 100], z[5] = 17, -1.4 * most, 30
    calibration = Calibration(np.zeros(256, np.float32), np.ones(256, np.float32))
    rms = np.sqrt(np.square(np.clip(z, -16, 16)).mean(axis=1, keepdims=True))
    expected = np.argwhere(np.abs(z) > np.minimum(OUTLIER_STDS, most * rms))
    found = codec.encode_to_host(torch.from_numpy(z), calibration).outliers
    assert found[:, :2].tolist() == expected.tolist() and [4, 100] in expected.tolist()
    assert np.array_equal(found[:, 2].astype(np.int32).view(np.float32), z[tuple(expected.T)])


@pytest.mark.parametrize("codec", SCALED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_comes_back_as_itself(dtype, codec):
    states_RD, calibration = made_states(0, 6, 128, "ordinary")
    states_RD[1, 3], states_RD[2, 5], states_RD[4, :] = float("nan"), float("-inf"), float("inf")
    states_RD = states_RD.to(getattr(torch, dtype))
    found_RD = codec.encode_to_host(states_RD, calibration).decode()
    bad_RD = ~states_RD.isfinite()
    assert np.array_equal(bits(found_RD[bad_RD]), bits(states_RD[bad_RD])) and found_RD[~bad_RD].isfinite().all()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux")
@pytest.mark.parametrize("codec", SCALED)
def test_decoding_in_a_thread_starts_no_others(codec):
    states_RD, calibration = made_states(0, 2048, 256, "ordinary")
    held = codec.encode_to_host(states_RD.bfloat16(), calibration)
    torch.set_num_threads(2)
    try:
        threads = []
        thread = threading.Thread(target=lambda: (held.decode(), threads.append(len(os.listdir("/proc/self/task")))))
        before = len(os.listdir("/proc/self/task"))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(1)
    assert threads == [before + 1], "torch's own threads, spinning for each of ours, took ten times the decoding"


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["int8", "int6", "fixed16"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_decodes_the_same_bits(kind, dtype, codec):
    states_RD, calibration = made_states(1, 300, 256, kind)
    held = CODECS[codec].encode_to_host(states_RD.to(getattr(torch, dtype)).cuda(), calibration)
    assert np.array_equal(bits(held.decode("cuda").cpu()), bits(held.decode()))


def test_a_zarr_reader_and_the_groups_own_words_are_enough_to_decode(tmp_path):
    spec = ColumnSpec("aux.1", "bfloat16", 256, "int8")
    cache = make_cache(tmp_path / "cache", random_samples(1, longest=600, seed=2), [spec])
    group = zarr.open_group(shard_folder(cache, 0) / "aux.1.int8", mode="r")
    rows, count = group.attrs["rows"], group.attrs["escapes"]
    mean, std = group["channels"][:]
    scale = (group["scale"][:rows].astype(np.uint32) << 16).view(np.float32).repeat(128, axis=1)
    values = rounded(group["values"][:rows].astype(np.float32) * scale * std + mean).view(np.uint32) >> 16
    outliers = group["escapes"][:count]
    values[outliers[:, 0], outliers[:, 1]] = outliers[:, 2] & 0xFFFF
    assert count and np.array_equal(values, bits(HiddenCache.open(cache).read(0).aux[0]))


def test_the_calibration_leaves_out_what_lies_at_either_end():
    values = np.random.default_rng(0).standard_normal((1000, 3)).astype(np.float32)
    values[:4, 0], values[4, 1], values[:, 2] = 1e6, np.nan, 5.0
    found = calibrate(values)
    inner = np.sort(values[np.isfinite(values).all(axis=1), 0].astype(np.float64))[4:-4]
    assert np.isclose(found.mean[0], inner.mean()) and np.isclose(found.std[0], inner.std())
    assert found.mean[2] == 5 and found.std[2] == np.float32(np.median(np.r_[found.std[:2], 0]) * 2.0**-20)


def test_a_calibration_looks_at_samples_in_an_order_of_their_own(tmp_path):
    plan = load_plan(make_cache(tmp_path / "cache", random_samples(9, longest=20), COLUMNS[:1]))
    order = [(shard.number, row) for shard, row in calibration_samples(plan.shards)]
    assert sorted(order) == [(shard.number, row) for shard in plan.shards for row in range(len(shard))]
    assert order != sorted(order)


def test_a_column_with_too_many_escapes_is_refused(tmp_path, monkeypatch):
    import cache_maker

    monkeypatch.setattr(cache_maker, "states", lambda shard, spec: states(shard, spec))
    cache = make_cache(tmp_path / "cache", random_samples(2, longest=100), in_codec("int8", "float32", 128)[:1])
    real = states
    for path in cache.glob("shards/*/aux.1*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(cache_maker, "states", lambda shard, spec: 100 * real(shard, spec))
    with pytest.raises(ProofError, match=r"aux\.1: more than \d+ values .* --codec aux\.1=zstd"):
        make_cache(cache, columns=in_codec("int8", "float32", 128)[:1])
    assert not list(cache.glob("shards/*/aux.1*"))


# Captures


def test_a_capture_in_int8_certifies_what_it_did(captured):
    raw, coarse = HiddenCache.open(captured("raw")), HiddenCache.open(captured("int8"))
    for i in range(len(raw)):
        right, found = raw.read(i, final=True), coarse.read(i, final=True)
        assert ((found.aux - right.aux).norm() / right.aux.norm()) < 0.008
    for shard in range(coarse.shards):
        for name, manifest in coarse.columns(shard).items():
            says = manifest.facts.certificate.as_dict()
            assert 0 < says["error"] <= says["worst_token"] < 0.012 and 0 < says["of_promise"] <= 1
            assert 0 < says["of_token"] < 0.0158 and 0 < says["of_channels"] < 0.03
            assert ("top1" in says) == ("kl" in says) == (name == "final")
    assert raw.digest == coarse.digest


def test_codecs_of_one_cache_may_differ_by_column(captured):
    columns = HiddenCache.open(captured("aux=int8,final=zstd")).columns(0)
    assert {name: manifest.spec.codec for name, manifest in columns.items()} == {
        "aux.1": "int8",
        "aux.3": "int8",
        "final": "zstd",
    }


def test_the_same_capture_in_int8_gives_the_same_bytes_also_when_it_goes_on(
    captured, tiny_target, tiny_corpus, tmp_path
):
    whole, again = captured("int8"), tmp_path / "again"
    shutil.copytree(whole, again)
    for path in again.glob("shards/000001/*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    capture(str(tiny_target), str(tiny_corpus), again, options=CaptureOptions(**CAPTURE))
    assert without_record(again) == without_record(whole), "without --codec, it is as it was"


def test_states_that_int8_would_spoil_are_refused_before_anything_is_written(
    tiny_target, tiny_corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(INT8, "max_of_token", 1e-4)
    options = CaptureOptions(codec="int8", **CAPTURE)
    with pytest.raises(ProofError, match=r"aux\.1 does not fit int8: a token .* --codec aux\.1=zstd"):
        capture(str(tiny_target), str(tiny_corpus), tmp_path / "cache", options=options)
    assert not list(tmp_path.glob("cache/shards/*")) and not list(tmp_path.glob("cache/calibration/*"))


def test_a_column_in_another_codec_is_named_with_the_remedy(captured, tiny_target, tiny_corpus):
    with pytest.raises(UsageError, match=r"holds aux.1 in raw, and zstd .*pipeline recode .* --codec aux.1=zstd"):
        capture(str(tiny_target), str(tiny_corpus), captured("raw"), options=CaptureOptions(codec="zstd", **CAPTURE))
    with pytest.raises(UsageError, match=r"holds aux.1 in int8, and raw .*another --out"):
        capture(str(tiny_target), str(tiny_corpus), captured("int8"), options=CaptureOptions(codec="raw", **CAPTURE))


# Names and prices


def test_a_codec_is_chosen_by_the_most_particular_name():
    chosen = parse_codecs("raw,aux=int8,aux.9=zstd")
    assert [codec_of(chosen, name) for name in ("aux.1", "aux.9", "aux.-1", "final")] == ["int8", "zstd", "int8", "raw"]
    assert codec_of(parse_codecs("aux=int8"), "final") is None
    for text in ("", "lz4", "aux=lz4", "raw,zstd", "aux=raw,aux=zstd", "aux.1.2=raw", "=raw=zstd"):
        with pytest.raises(UsageError, match="--codec"):
            parse_codecs(text)


@pytest.mark.parametrize("codec", ["raw", "int8", "int6", "fixed16"])
def test_the_bytes_stated_are_those_written(tmp_path, codec):
    spec = ColumnSpec("aux.1", "bfloat16", 512, codec)
    cache = make_cache(tmp_path / "cache", random_samples(1, longest=600, seed=2), [spec])
    files = read_canonical(cache / "shards/000000/aux.1.json")["files"]
    written = sum(fact["size"] for name, fact in files.items() if name.endswith(SHARD_FILE))
    stated = CODECS[codec].stored_bytes(load_plan(cache).shards[0].rows, 512, "bfloat16")
    assert abs(written - stated) < 0.02 * stated + 2000


def test_columns_of_one_shard_are_never_taken_for_anothers_codec(tmp_path):
    cache = make_cache(tmp_path / "cache", random_samples(1, longest=20), in_codec("zstd")[:1])
    folder, spec = shard_folder(cache, 0), in_codec("int8")[0]
    shutil.copy(folder / "aux.1.zstd.arrow", folder / "aux.1.int8.arrow")
    with pytest.raises(CacheError, match="missing"):
        Column(folder, spec, load_plan(cache).shards[0].bounds, "here").open()
