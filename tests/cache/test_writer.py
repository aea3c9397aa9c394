"""Shards exist whole or not at all, whoever is killed, whoever else writes, and whatever the disk says."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import killed_writer
import numpy as np
import pytest
import zarr
from cache_maker import COLUMNS, capture, contents, make_cache, random_samples, states
from disks import mounted
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import HiddenCache
from pipeline.cache import atomic as disk
from pipeline.cache.atomic import Scratch, clean_scratch
from pipeline.cache.catalog import Catalog, has_target
from pipeline.cache.codecs import zarr_file as zarr_shard
from pipeline.cache.codecs.zarr_file import SHARD_FILE, Grid, ShardFileWriter
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.file_writer import create_identity, new_target
from pipeline.cache.layout import shard_folder
from pipeline.cache.plan import load_plan
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.verify import verify
from pipeline.cache.writer import ShardWriter
from pipeline.errors import CacheError, RoomError

HERE = Path(__file__).parents[1]
AUX = COLUMNS[0]


@pytest.fixture
def planned(tmp_path):
    """A cache with a plan of a few shards and nothing captured."""
    create_identity(tmp_path / "cache", {"target": {"name": "tiny"}})
    write_segment(tmp_path / "cache", random_samples(48), row_bytes=48, sources=[])
    return tmp_path / "cache"


def test_a_file_in_the_place_of_a_shard_is_named_with_what_to_do(planned):
    folder = shard_folder(planned, 0)
    folder.parent.mkdir()
    folder.write_text("mine")
    with pytest.raises(CacheError, match=r"shards/000000: a file, where a shard's folder belongs; move it out"):
        capture(planned, load_plan(planned).shards[0], COLUMNS)
    assert folder.read_text() == "mine"


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 60),
    width=st.integers(1, 9),
    dtype=st.sampled_from(["<u2", "<f4"]),
    chunk_bytes=st.sampled_from([40, 300, 3 << 20]),
    seed=st.integers(0, 99),
)
def test_zarr_python_would_have_written_the_same_shard_file(tmp_path_factory, rows, width, dtype, chunk_bytes, seed):
    folder = tmp_path_factory.mktemp("zarr")
    values = np.random.default_rng(seed).integers(0, 2**16, (rows, width)).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr_shard, "CHUNK_BYTES", chunk_bytes)
        grid = Grid.of(rows, width, np.dtype(dtype))
    writer = ShardFileWriter(folder / "ours", grid)
    for piece in np.array_split(values, 3):
        writer.write(np.ascontiguousarray(piece))
    writer.finish()

    theirs = zarr.create_array(
        folder / "theirs",
        shape=grid.shape,
        chunks=(grid.chunk_rows, width),
        shards=grid.shape,
        dtype=dtype,
        compressors=None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    theirs[:rows] = values
    theirs[rows:] = 0
    if not rows:
        theirs[:] = 0

    assert (folder / "ours" / SHARD_FILE).read_bytes() == (folder / "theirs" / SHARD_FILE).read_bytes()
    assert np.array_equal(zarr.open_array(folder / "ours", mode="r")[:rows], values)
    assert (
        grid.shape[0] - rows <= grid.chunks
        and grid.data_bytes + grid.index_bytes == (folder / "ours" / SHARD_FILE).stat().st_size
    )


def test_every_byte_is_sent_on_its_way_once(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(zarr_shard, "start_writeback", lambda _, start, size: sent.append((start, size)))
    monkeypatch.setattr(zarr_shard, "WRITE_BACK", 64)
    writer, rows = ShardFileWriter(tmp_path / "array", Grid(20, 4, np.dtype("<u2"), 20)), np.ones((5, 4), "<u2")
    for _ in range(4):
        writer.write(rows)
    writer.finish()

    assert sent == [(0, 80), (80, 80)]  # the index is synced at once
    assert (tmp_path / "array" / SHARD_FILE).read_bytes()[:160] == rows.tobytes() * 4


def test_chunks_of_a_large_array_take_two_to_four_mebibytes():
    for rows in (1000, 1023, 5000, 100_000, 523_456):
        grid = Grid.of(rows, 4096, np.dtype("<u2"))
        assert 2 << 20 <= grid.chunk_bytes <= 4 << 20, rows


def test_the_columns_of_a_shard_open_in_zarr_python(planned):
    shard = load_plan(planned).shards[0]
    specs = [*COLUMNS, ColumnSpec("aux.-1", "float32", 5)]

    assert capture(planned, shard, specs) == {spec.name: True for spec in specs}

    for spec in specs:
        array = zarr.open_array(shard_folder(planned, 0) / spec.name, mode="r")
        values = states(shard, spec)
        assert array.dtype == values.dtype and np.array_equal(array[: len(values)], values)


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_the_bytes_do_not_depend_on_the_pieces_rows_come_in(tmp_path_factory, cuts):
    cache = tmp_path_factory.mktemp("pieces")
    create_identity(cache / "a", {})
    create_identity(cache / "b", {})
    for name in ("a", "b"):
        write_segment(cache / name, random_samples(3), row_bytes=16, sources=[])
    shard = load_plan(cache / "a").shards[0]
    capture(cache / "a", shard, [AUX])
    values = states(shard, AUX)
    with ShardWriter(Catalog(cache / "b"), shard, [AUX]) as writer:
        first = 0
        while first < len(values):
            count = cuts[first % len(cuts)]
            writer.write("aux.1", values[first : first + count])
            first += count
        writer.seal()
        writer.commit({"aux.1": {"probe": {"error": 0.25}}})

    assert contents(cache / "a") == contents(cache / "b")


def test_what_is_sealed_can_be_read_back_before_it_is_committed(planned):
    shard = load_plan(planned).shards[0]
    with ShardWriter(Catalog(planned), shard, [AUX]) as writer:
        writer.write("aux.1", states(shard, AUX))
        writer.seal()
        for row in range(len(shard)):
            expected = states(shard, AUX)[shard.bounds[row] : shard.bounds[row + 1]]
            assert np.array_equal(writer.read("aux.1", row), expected)

    assert not Catalog(planned).captured(0, "aux.1")
    assert not list(planned.glob("tmp-*"))


def test_a_refused_sample_leaves_zeros_and_is_not_ok(planned):
    shard = load_plan(planned).shards[0]
    values = states(shard, AUX)
    with ShardWriter(Catalog(planned), shard, [AUX]) as writer:
        writer.write("aux.1", values[: shard.bounds[1]])
        writer.refuse(1, "not finite")
        for first in range(int(shard.bounds[1]), len(values), 7):
            writer.write("aux.1", values[first : first + 7])
        writer.seal()
        writer.commit({})

    held = zarr.open_array(shard_folder(planned, 0) / "aux.1", mode="r")[: len(values)]
    hole = slice(shard.bounds[1], shard.bounds[2])
    assert not held[hole].any() and values[hole].any()
    held[hole] = values[hole]
    assert np.array_equal(held, values)
    assert Catalog(planned).captured(0, "aux.1").refused == {"1": "not finite"}
    assert HiddenCache.open(planned).samples.ok.tolist() == [i != 1 for i in range(48)]


def test_a_sample_cannot_be_refused_once_its_rows_are_written(planned):
    shard = load_plan(planned).shards[0]
    with ShardWriter(Catalog(planned), shard, [AUX]) as writer:
        writer.write("aux.1", states(shard, AUX)[:1])
        with pytest.raises(AssertionError, match="already written"):
            writer.refuse(0, "late")


def test_who_finds_the_column_there_discards_its_own(planned):
    shard = load_plan(planned).shards[0]
    with ShardWriter(Catalog(planned), shard, [AUX]) as slow:
        slow.write("aux.1", np.zeros((shard.rows, 8), np.uint16))
        slow.seal()
        capture(planned, shard, [AUX])
        before = contents(planned)

        assert slow.commit({}) == {"aux.1": False}

    assert contents(planned) == before and not list(planned.glob("tmp-*"))


def test_what_has_no_valid_manifest_is_replaced(planned, tmp_path):
    shard = load_plan(planned).shards[0]
    capture(planned, shard, COLUMNS)
    whole, folder = contents(planned), shard_folder(planned, 0)
    (folder / "aux.1.json").unlink()
    (folder / "aux.1" / "c" / "0" / "0").write_bytes(b"half")
    (folder / "aux.10.json").write_text("{")
    (folder / "aux.10.arrow").unlink()
    (folder / "final" / "c" / "0" / "0").unlink()

    assert [bool(Catalog(planned).captured(0, spec.name)) for spec in COLUMNS] == [False, False, False]
    assert all(capture(planned, shard, COLUMNS).values())

    assert contents(planned) == whole


def test_columns_can_be_added_later(planned):
    shard = load_plan(planned).shards[0]
    capture(planned, shard, COLUMNS[:1])
    before = contents(planned)

    assert capture(planned, shard, COLUMNS) == {"aux.1": False, "aux.10": True, "final": True}

    after = contents(planned)
    assert {name: after[name] for name in before} == before


def test_the_cleaner_leaves_what_a_living_writer_holds(planned):
    shard = load_plan(planned).shards[0]
    dead = planned / "tmp-000003-dead"
    (dead / "aux.1").mkdir(parents=True)
    (planned / "plan" / "tmp-dead").write_bytes(b"half")
    with ShardWriter(Catalog(planned), shard, [AUX]) as writer, Scratch(planned, "plan") as scratch:
        assert sorted(clean_scratch(planned)) == ["plan/tmp-dead", "tmp-000003-dead"]

        assert scratch.path.is_dir()
        writer.write("aux.1", states(shard, AUX))
        writer.seal()
        assert writer.commit({}) == {"aux.1": True}
    assert clean_scratch(planned) == []


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, r"No space left.*free at least .* or pass --out on another disk.*goes on where this stopped"),
        (errno.EDQUOT, "Disk quota exceeded.*--out"),
        (errno.EROFS, "Read-only.*another --out"),
        (errno.EMFILE, "Too many open files.*ulimit -n"),
        (errno.EIO, "Input/output error; the disk or the way to it is failing: see the system's log.*goes on where"),
    ],
)
def test_a_disk_that_refuses_is_a_room_error_and_leaves_no_scratch(planned, monkeypatch, number, says):
    shard = load_plan(planned).shards[0]
    real, written = os.write, 0

    def failing(fd, data):
        nonlocal written
        written += len(data)
        if written > 3000:
            raise OSError(number, os.strerror(number))
        return real(fd, data)

    with pytest.raises(RoomError, match=says), ShardWriter(Catalog(planned), shard, [AUX]) as writer:
        monkeypatch.setattr(os, "write", failing)
        writer.write("aux.1", states(shard, AUX)[:50])
        writer.write("aux.1", states(shard, AUX)[50:])
        writer.seal()
        writer.commit({})

    monkeypatch.undo()
    assert not list(planned.glob("tmp-*")) and not Catalog(planned).captured(0, "aux.1")
    assert capture(planned, shard, [AUX]) == {"aux.1": True}


def test_a_shard_that_cannot_fit_is_refused_before_the_work(planned, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda where: 1000)

    with pytest.raises(RoomError, match=r"shard 000000, which needs .* where 1.0 KiB are free"):
        ShardWriter(Catalog(planned), load_plan(planned).shards[0], [AUX])
    assert not list(planned.glob("tmp-*"))


def test_a_target_that_was_put_there_while_we_were_stopped_stays(planned, monkeypatch):
    """Between our look and our rename: only possible where somebody removed our lock."""
    place, exists, looks = planned / "target", Path.exists, []

    def put(tokens):
        with new_target(Catalog(planned)) as folder:
            (folder / "tokens.json").write_text(tokens)

    def blind(path):
        if path == place and looks:
            for lock in planned.glob("tmp-*.lock"):
                lock.unlink()
            monkeypatch.undo()
            put('{"mask": 3}')
            return False
        looks.extend([1] * (path == place))
        return exists(path)

    monkeypatch.setattr(Path, "exists", blind)
    put('{"mask": 3}')
    assert has_target(Catalog(planned)) and (place / "tokens.json").read_text() == '{"mask": 3}'


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        yield disk


def test_a_full_disk_stops_the_capture_and_more_room_lets_it_go_on(small_disk, monkeypatch):
    samples = random_samples(24, longest=40)
    make_cache(small_disk / "cache", samples, COLUMNS[:1])
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(1024))

    # as when others fill the disk meanwhile
    monkeypatch.setattr("pipeline.cache.writer.check_free_space", lambda *_: None)
    with pytest.raises(RoomError, match="No space left"):
        make_cache(small_disk / "cache", samples, COLUMNS)
    ballast.unlink()
    make_cache(small_disk / "cache", samples, COLUMNS)

    report = verify(small_disk / "cache")
    assert not report.damaged and not report.missing and not report.foreign


def test_a_read_only_disk_is_a_room_error_for_writers_and_none_for_readers(small_disk):
    cache = make_cache(small_disk / "cache", random_samples(6, longest=20), COLUMNS[:2])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    with pytest.raises(RoomError, match=r"Read-only file system; make it writable or pass another --out"):
        make_cache(cache, columns=COLUMNS)
    assert len(HiddenCache.open(cache)) == 6
    assert not verify(cache).damaged


STRIDES = {"make": 61, "append": 53, "repair": 19, "recode": 19}  # primes: other steps of each commit


@pytest.mark.parametrize("job", STRIDES)
def test_a_fault_at_any_step_leaves_a_cache_that_goes_on_to_the_same_bytes(tmp_path, monkeypatch, request, job):
    """Killed, stopped and overtaken, or on a disk that fails from there on: making a cache, appending to one, repairing
    one, recoding one. What was committed before stays whole all the time. `--flips 1000`: at every step."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a killed process loses no page that it wrote
    stride = "1" if request.config.getoption("--flips") >= 1000 else str(STRIDES[job])
    faults = [fault for fault in killed_writer.FAULTS if fault != "eio" or killed_writer.CAN_FAIL]
    script = [sys.executable, str(HERE / "killed_writer.py"), job, str(tmp_path / "cache"), stride, *faults]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line]
    says = "Input/output error; the disk or the way to it is failing"
    assert bool(told) == ("eio" in faults) and all(re.search(says, line) for line in told)
    killed_writer.prepared(job, tmp_path / "whole")
    damaged = {finding.file for finding in verify(tmp_path / "whole").damaged} if job == "repair" else set()
    assert bool(damaged) == (job == "repair")
    killed_writer.JOBS[job](tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert not verify(tmp_path / "whole").damaged and not verify(tmp_path / "whole").missing

    left = sorted(tmp_path.glob("cache-*.*"))
    assert len(left) > 3 * len(faults)
    for cache in left:
        if (cache / "cache.json").exists():
            assert {finding.file for finding in verify(cache).damaged} <= damaged, cache
        killed_writer.JOBS[job](cache)
        clean_scratch(cache)
        assert contents(cache) == whole, cache
        assert not list(cache.rglob("tmp-*")), cache
