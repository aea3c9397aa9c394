"""Runs a job on a cache in children that meet a fault at their n-th step on disk, n = 1, 1 + STRIDE, ... until one ends
before it comes to that. A step is a sync, a rename, a write and the like. Faults:

    kill   SIGKILL
    eio    from there on the kernel answers every write, sync, rename and mkdir with EIO; the child says what it raised
    stop   SIGSTOP; another process does the whole job meanwhile, then this one wakes up

Usage: killed_writer.py make|append|repair|recode CACHE STRIDE [FAULT ...]; CACHE-FAULT.<n> is what the n-th child left.
A script of its own, because a fork wants a process without threads.
"""

import ctypes
import errno
import io
import os
import platform
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from cache_maker import COLUMNS, capture, contents, flip, make_cache, random_samples

import stages.recode.run
from pipeline.cache.atomic import clean_scratch
from pipeline.cache.catalog import Catalog
from pipeline.cache.file_writer import rebuild_derived, restore_segments
from pipeline.cache.layout import SAMPLES, shard_folder
from pipeline.cache.plan import load_plan, segment_numbers
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.schema import column_manifest
from pipeline.errors import PipelineError

PAIR = [replace(COLUMNS[1], codec="int8"), COLUMNS[2]]  # a column of one file, and one of four and a calibration
CAN_FAIL = sys.platform == "linux" and platform.machine() == "x86_64"  # what `fail` knows the numbers of
WRITES = {1: "write", 18: "pwrite64", 20: "writev", 74: "fsync", 75: "fdatasync"}
NAMES = {82: "rename", 83: "mkdir", 258: "mkdirat", 264: "renameat", 316: "renameat2"}
READS = {0: "read", 17: "pread64", 19: "readv", 295: "preadv", 327: "preadv2"}


def make(cache: Path) -> None:
    """A cache of two samples."""
    make_cache(cache, random_samples(2, longest=8), PAIR)


def append(cache: Path) -> None:
    """Two samples more, of which one is new, on a cache that `make` made."""
    clean_scratch(cache)
    if len(segment_numbers(cache)) == 1:
        more = [*random_samples(1, longest=8), *random_samples(1, longest=8, seed=1)]
        write_segment(cache, more, row_bytes=48, sources=[{"file": "more.jsonl", "size": 1}])
    for shard in load_plan(cache).shards:
        capture(cache, shard, PAIR)
    rebuild_derived(Catalog(cache))


def spoil(cache: Path) -> None:
    """Damage a cache that `make` made: values, samples, a segment of the plan."""
    folder = shard_folder(cache, 0)
    flip(folder / "aux.10.int8" / "values/c/0/0", 5)
    (folder / SAMPLES).unlink()
    flip(shard_folder(cache, 1) / SAMPLES, 1000)


def repair(cache: Path) -> None:
    """What `pipeline verify --repair` does after it found what `spoil` did, random states in the target's place."""
    clean_scratch(cache)
    restore_segments(Catalog(cache))
    rebuild_derived(Catalog(cache))
    shard = load_plan(cache).shards[0]
    known = (shard_folder(cache, 0) / "aux.10.json").exists()
    capture(cache, shard, PAIR[:1], lost={"aux.10": column_manifest(cache, 0, "aux.10") if known else None})
    rebuild_derived(Catalog(cache))


def recode(cache: Path) -> None:
    """The lossless column of a cache that `make` made, in another codec."""
    stages.recode.run.run(cache, "final=zstd")


JOBS = {"make": make, "append": append, "repair": repair, "recode": recode}


def prepared(job: str, cache: Path) -> None:
    """What a job starts from."""
    if job != "make":
        make(cache)
    if job == "repair":
        spoil(cache)


def fail(calls: dict[int, str]) -> None:
    """From now on the kernel itself fails these calls with EIO in this process (seccomp); not writes to stderr."""
    load, equal, answer = 0x20, 0x15, 0x06  # a word of the call, compare and jump, say what becomes of it
    last = len(calls)
    rules = [(load, 0, 0, 0), (equal, 0, 2, 1), (load, 0, 0, 16), (equal, last + 1, 0, 2), (load, 0, 0, 0)]
    rules += [(equal, last - at, 0, number) for at, number in enumerate(calls)]
    rules += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050000 | errno.EIO)]  # let through; fail
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *rule) for rule in rules))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("rules", ctypes.c_void_p))

    libc = ctypes.CDLL(None, use_errno=True)
    told = Filter(len(rules), ctypes.addressof(program))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(told), 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp here")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def eio() -> None:
    fail(WRITES | NAMES)


FAULTS = {"kill": kill, "eio": eio, "stop": stop}


def meet_at(step: int, fault: Callable[[], None]) -> None:
    """From now on, count the calls that change the disk, and let the fault happen before the n-th."""
    steps, sync, met = count(1), os.fsync, []

    def meeting(call):
        def before(*arguments, **named):
            if next(steps) == step:
                met.append(1)
                fault()
            return call(*arguments, **named)

        return before

    os.fsync = lambda fd: sync(fd) if met else None  # a killed process loses no page that it wrote
    for name in ("fsync", "rename", "replace", "write", "mkdir", "unlink", "rmdir"):
        setattr(os, name, meeting(getattr(os, name)))


def child(job: str, cache: Path, step: int = 0, fault: Callable[[], None] = kill) -> int:
    """Start a job in a process of its own, with a fault at a step, and return its id. It ends with 0 when it got
    through, with 5 and a line on stderr after a typed error of room, with anything else for a bug."""
    if started := os.fork():
        return started
    sys.stdout = io.StringIO()  # what a job prints is not looked at, and a failing process cannot write it
    meet_at(step, fault)
    try:
        JOBS[job](cache)
    except PipelineError as error:
        os.write(2, f"{error}\n".encode())
        os._exit(error.code)
    os._exit(0)


def taken_over(job: str, cache: Path, stopped: int, patient: bool) -> int:
    """Let another process do the job while one is stopped, wake that one, and return how it ends. Where it holds a
    lock, the other waits for it, or, if not `patient`, does as if somebody had removed the lock's file."""
    locks = list(cache.glob("tmp-*.lock"))
    if not patient:
        for path in locks:
            path.unlink()
    other = child(job, cache)
    if not (patient and locks):
        assert os.waitpid(other, 0)[1] == 0, "the other process failed"
        done = contents(cache)
        os.kill(stopped, signal.SIGCONT)
        ended = os.waitpid(stopped, 0)[1]
        assert contents(cache) == done, "the one that woke up changed what the other had finished"
        return ended
    time.sleep(0.3)  # it waits, unless it has nothing to do that needs the lock
    os.kill(stopped, signal.SIGCONT)
    assert os.waitpid(other, 0)[1] == 0, "the other process failed"
    return os.waitpid(stopped, 0)[1]


def meet(job: str, cache: Path, stride: int, fault: str) -> None:
    start = Path(f"{cache}-start")
    for step in range(1, 1_000_000, stride):
        place = Path(f"{cache}-{fault}.{step}")
        if start.exists():
            shutil.copytree(start, place)
        started = child(job, place, step, FAULTS[fault])
        status = os.waitpid(started, os.WUNTRACED)[1]
        if os.WIFSTOPPED(status):
            assert taken_over(job, place, started, patient=step % 2 == 0) == 0, f"step {step}: it did not wake up well"
        elif status == 0:
            return
        elif os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 5, f"step {step}: ended with {os.WEXITSTATUS(status)}"


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork wants none
    prepared(sys.argv[1], Path(f"{sys.argv[2]}-start"))
    for fault in sys.argv[4:] or ["kill"]:
        meet(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), fault)
