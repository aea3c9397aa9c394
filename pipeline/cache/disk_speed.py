"""How fast a disk writes and reads, measured with a file without a name, of which nothing is left after a kill."""

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.cache.atomic import write_all, write_errors

SIZE = 256 << 20  # bytes written and synced
BLOCK_BYTES = 8 << 20
AT_LEAST_S = 1e-9


def write_speed(folder: Path, size: int = SIZE) -> float:
    """Write about `size` bytes into a folder and sync them; return bytes a second. Raises RoomError."""
    return disk_speed(folder, size)[0]


def disk_speed(folder: Path, size: int = SIZE, seconds: float = 60.0, reads: bool = False) -> tuple[float, float]:
    """Return the bytes a second that a folder's disk writes, synced, and reads, past the system's page cache where it
    can be; 0 for reading unless `reads`. The folder has to be there.

    size: bytes of the file. seconds: after which no further block is written, nor read. Raises RoomError.
    """
    block = os.urandom(min(size, BLOCK_BYTES))  # incompressible
    with write_errors(folder, "a probe of the disk", size), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began, written = time.perf_counter(), 0
        for _ in range(max(1, size // len(block))):
            write_all(file.fileno(), block)
            written += len(block)
            if time.perf_counter() - began > seconds:
                break
        os.fsync(file.fileno())
        wrote = written / max(time.perf_counter() - began, AT_LEAST_S)
        return wrote, _read_speed(file.fileno(), seconds) if reads else 0.0


def read_speed(paths: Iterable[Path], size: int = SIZE, seconds: float = 60.0) -> float:
    """Read files until `size` bytes or `seconds` are over, past the page cache where it can be; return bytes a second,
    0 without any. Writes nothing."""
    done, taken = 0, 0.0
    for path in paths:
        if done >= size or taken >= seconds:
            break
        began = time.perf_counter()
        with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
            done += _read(file.fileno(), size - done, seconds - taken)
        taken += time.perf_counter() - began
    return done / max(taken, AT_LEAST_S)


def _read_speed(fd: int, seconds: float) -> float:
    """Read an open file from its beginning; return bytes a second."""
    began = time.perf_counter()
    return _read(fd, 1 << 62, seconds) / max(time.perf_counter() - began, AT_LEAST_S)


def _read(fd: int, size: int, seconds: float) -> int:
    """Read about `size` bytes of an open file from its beginning, for `seconds` at most; return how many."""
    direct, buffer = None, mmap.mmap(-1, BLOCK_BYTES)  # aligned, as O_DIRECT wants it
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError, AttributeError):  # no /proc, no O_DIRECT, or a file system without it
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
    try:
        source = fd if direct is None else direct
        os.lseek(source, 0, os.SEEK_SET)
        began, done = time.perf_counter(), 0
        while done < size and time.perf_counter() - began < seconds and (count := os.readv(source, [buffer])):
            done += count
        return done
    finally:
        buffer.close()
        if direct is not None:
            os.close(direct)
