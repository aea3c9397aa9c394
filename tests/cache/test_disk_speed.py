"""How fast a disk is, measured with a file of which nothing is left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cache import disk_speed as module
from pipeline.cache.disk_speed import disk_speed, write_speed
from pipeline.errors import RoomError

ROOT = Path(__file__).parents[2]


def test_a_disk_is_probed_with_whole_blocks(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(module, "write_all", lambda fd, block: written.append(len(block)))
    assert write_speed(tmp_path, size=20 << 20) > 0
    assert sum(written) == 16 << 20
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_read_again(tmp_path):
    written, read = disk_speed(tmp_path, size=20 << 20, reads=True)
    assert written > 0 and read > 0
    assert not list(tmp_path.iterdir())


def test_a_slow_disk_ends_the_probe_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "write_all", lambda fd, block: time.sleep(0.1))
    began = time.perf_counter()
    disk_speed(tmp_path, size=1 << 30, seconds=0.15, reads=True)
    assert time.perf_counter() - began < 2


def test_a_full_disk_is_an_error_of_its_own(tmp_path, monkeypatch):
    def full(fd, block):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "write_all", full)
    with pytest.raises(RoomError, match="a probe of the disk"):
        write_speed(tmp_path, size=8 << 20)


def test_nothing_is_left_of_a_probe_that_is_killed(tmp_path):
    code = (
        "import sys, os; from pathlib import Path; from pipeline.cache import disk_speed as d\n"
        "d.os.fsync = lambda fd: os.kill(os.getpid(), 9)\n"
        "d.write_speed(Path(sys.argv[1]), 8 << 20)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -9
    assert not list(tmp_path.iterdir())
