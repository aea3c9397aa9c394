"""Little memory, few rights, long paths: each has its own line, and none of them is called damage."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from cache_maker import make_cache, random_samples

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import REMEDIES, write_errors
from pipeline.cache.checksums import SCHEMA
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.layout import path_inside
from pipeline.cache.samples import parse_batches
from pipeline.cache.verify import verify
from pipeline.errors import LIMITS, CacheError, RoomError, UsageError, limit_error, read_error

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20


@pytest.mark.parametrize(
    ("number", "kind", "says"),
    [
        (errno.ENOMEM, RoomError, "Cannot allocate memory; free memory.*no file is damaged"),
        (errno.EMFILE, RoomError, "Too many open files; raise `ulimit -n`"),
        (errno.ENFILE, RoomError, "Too many open files in system; raise `ulimit -n`"),
        (errno.ENAMETOOLONG, UsageError, "File name too long; .*move the folder to a shorter one"),
        (errno.ELOOP, UsageError, "Too many levels of symbolic links; links on the way to it lead in a circle"),
        (errno.EACCES, UsageError, "Permission denied; ask its owner"),
        (errno.EPERM, UsageError, "Operation not permitted; ask its owner"),
        (errno.EROFS, RoomError, "Read-only file system; it lies on a disk that is read-only"),
        (errno.ENOSPC, RoomError, "No space left on device; free space there"),
        (errno.EDQUOT, RoomError, "Disk quota exceeded; free space there"),
        (errno.ENOENT, CacheError, "missing"),
        (errno.EIO, CacheError, "the disk or the way to it is failing"),
        (errno.ETIMEDOUT, CacheError, "the disk or the way to it is failing"),
    ],
)
def test_each_error_of_the_system_has_its_own_line(number, kind, says):
    found = read_error(Path("file"), OSError(number, os.strerror(number)))
    assert type(found) is kind
    with pytest.raises(kind, match=f"^file: .*{says}"):
        raise found
    damage = "damaged" in str(found).replace("no file is damaged", "") or "--repair" in str(found)
    assert not damage and (number == errno.ENOENT) == ("pipeline verify" in str(found))


@pytest.mark.parametrize("number", sorted(LIMITS))
def test_each_limit_has_a_line_for_whoever_writes(number, tmp_path):
    assert number in REMEDIES
    with pytest.raises(RoomError, match=os.strerror(number)), write_errors(tmp_path, "a file"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        pa.ArrowMemoryError("malloc of size 64 failed"),
        OSError("Memory mapping file failed: [errno 12] Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 1 bytes."),
        RuntimeError("Error while deserializing header: Cannot allocate memory (os error 12)"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_little_memory_is_known_in_all_its_words(error):
    assert isinstance(limit_error("here", error), RoomError)


def test_an_error_of_the_content_is_no_limit():
    for error in (ValueError("bad magic"), OSError(errno.EISDIR, "a folder"), RuntimeError("invalid header")):
        assert limit_error("here", error) is None


def test_arrow_without_memory_is_not_called_damage(monkeypatch, tmp_path):
    def failing(message, schema):
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([], schema=SCHEMA))
    monkeypatch.setattr(pa.ipc, "read_record_batch", failing)
    with pytest.raises(RoomError, match="Cannot allocate memory"):
        parse_batches(sink.getvalue(), SCHEMA, tmp_path / "x.arrow")


@contextmanager
def little_memory(more: int):
    """Let this process map only so many bytes more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is mapped")
@pytest.mark.parametrize("codec", ["raw", "zstd", "int8"])
def test_a_cache_is_read_or_there_is_too_little_memory(tmp_path, monkeypatch, codec):
    """In one thread: Python waits for ever for a thread that ends for want of memory before it can say it began."""
    monkeypatch.setattr("pipeline.cache.columns.INLINE_BYTES", 1 << 30)
    columns = [ColumnSpec(name, "bfloat16", 2048, codec) for name in ("aux.1", "aux.3")]
    cache, outcomes = make_cache(tmp_path / "cache", random_samples(8, longest=900), columns), set()
    HiddenCache.open(cache).read(0)  # what is imported late is now
    for more in (0, 1, 2, 4, 8, 16, 32, 64, 512):
        try:
            with little_memory(more * MIB):
                held = HiddenCache.open(cache)
                for i in range(len(held)):
                    held.read(i)
            outcomes.add("read")
        except (RoomError, MemoryError, RuntimeError) as error:
            met = limit_error("cache", error) if not isinstance(error, RoomError) else error
            assert isinstance(met, RoomError), error
            assert "verify" not in str(met)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_path_that_is_too_long_is_neither_damage_nor_a_bug(tmp_path, capfd):
    from pipeline.cli import main

    long = tmp_path / ("x" * 300)
    of_plan = ["plan", "--model", "data/tiny-qwen3", "--out", tmp_path / "cache", "--corpus"]
    for command in (
        ["verify", long],
        ["inspect", long],
        ["train-draft", "--cache", long],
        ["plan", "--model", long],
        [*of_plan, long],
    ):
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in command])
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert left.value.code in (2, 5) and "File name too long" in line, line
        assert "bug:" not in line and "damaged" not in line


def test_a_cache_moved_to_a_path_too_long_for_the_names_in_it_is_not_damaged(tmp_path):
    """Every name is fine, and all of them together are more than the system takes."""
    root = tmp_path
    while len(str(root)) < 3800:
        root = root / ("d" * 200)
    root = Path(str(root) + "/" + "e" * (4090 - len(str(root))))
    with pytest.raises(UsageError, match="File name too long; the path is longer"):
        path_inside(root, "shards/000000/aux.1/c/0/0")
    with pytest.raises(CacheError, match="which no file can be called"):
        path_inside(tmp_path, "x" * 300)


def test_links_in_a_circle_on_the_way_are_said_to_be_that(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "verify", str(tmp_path / "one" / "cache")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and "bug:" not in done.stderr, done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read_it_is_not_damage(tmp_path):
    cache = make_cache(tmp_path / "cache")
    path = next(cache.glob("shards/*/aux.1.json"))
    path.chmod(0)
    with pytest.raises(UsageError, match="Permission denied"):
        verify(cache)


def test_verify_without_memory_says_so_and_counts_nothing_as_damaged(tmp_path, monkeypatch):
    from pipeline.cache import manifest

    cache = make_cache(tmp_path / "cache")

    def failing(path, *_, **__):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path))

    monkeypatch.setattr(manifest, "open", failing, raising=False)
    with pytest.raises(RoomError, match="Cannot allocate memory"):
        verify(shutil.copytree(cache, tmp_path / "copy"))


def test_a_command_without_memory_ends_with_5_in_one_line(tmp_path, monkeypatch, capfd):
    from pipeline.cache import verify as module
    from pipeline.cli import main

    cache = make_cache(tmp_path / "cache")
    for error in (MemoryError("Unable to allocate 9 GiB"), OSError(errno.ENOMEM, "Cannot allocate memory")):

        def failing(*_, error=error):
            raise error

        monkeypatch.setattr(module._Check, "plan", failing)
        with pytest.raises(SystemExit) as left:
            main(["verify", str(cache)])
        lines = capfd.readouterr().err.strip().splitlines()
        assert left.value.code == 5 and len(lines) == 1
        assert "Cannot allocate memory; free memory" in lines[0] and "bug:" not in lines[0]
