"""Writing that survives a kill: scratch folders, locks, atomic renames, and errors that say what to do.

What is unfinished is named `tmp-*` and stays locked (flock) while its process lives. A name without the prefix is
complete: files are synced, renamed, and their folder synced. `clean` removes what nobody holds any more.

Locks only save work: where a network file system has none that reach other machines, two processes may do the same
twice, and the bytes, which depend on neither, come out the same.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path

from pipeline.cache.layout import FOLDERS, SCRATCH, SHARDS
from pipeline.errors import CacheError, PipelineError, RoomError
from pipeline.os_errors import MEMORY, errno_of, limit_error

PATIENCE_S = 3.0  # of silent waiting for another process
POLL_S = 0.5

_GO_ON = "the same command goes on where this stopped"
_FREE = "free {short} or pass --out on another disk; " + _GO_ON
_MAY = "make it writable or pass another --out; " + _GO_ON
_FEWER = "raise `ulimit -n` or close other programs; " + _GO_ON
_LOCKS = "this disk has no file locks (a Lustre mount needs `-o flock`); pass --out on another disk"
_BROKEN = "the disk or the way to it is failing: see the system's log, then pass --out on another; " + _GO_ON

REMEDIES = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: "raise `ulimit -f`; " + _GO_ON,
    errno.EROFS: _MAY,
    errno.EACCES: _MAY,
    errno.EPERM: _MAY,
    errno.EMFILE: _FEWER,
    errno.ENFILE: _FEWER,
    errno.ENOLCK: _LOCKS,
    errno.EOPNOTSUPP: _LOCKS,
    errno.ENOSYS: _LOCKS,
    errno.ENOENT: "a folder on the way cannot be made, or was removed; pass another --out",
    errno.ENOTDIR: "a file stands where a folder on the way should; pass another --out",
    errno.ENAMETOOLONG: "the path is longer than this disk takes; pass a shorter --out",
    errno.ELOOP: "links on the way lead in a circle; pass another --out",
    errno.ENOMEM: f"{MEMORY}; {_GO_ON}",
    errno.EIO: _BROKEN,
    errno.ESTALE: _BROKEN,
}


def size_text(count: int) -> str:
    """A number of bytes for people: `1.5 GiB`, `20.0 MiB`."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{max(count, 0) / 1024:.1f} KiB"


@contextlib.contextmanager
def room(where: Path, what: str, need: int = 0) -> Iterator[None]:
    """Turn a full disk, a read-only folder or a used-up limit into a RoomError; `need` is in bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise RoomError(_room_message(where, what, need, error)) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says of a file of a cache that cannot be read into a typed error."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> PipelineError:
    """What to say of a file that cannot be read: a limit and a missing right are no damage, and mend otherwise."""
    met = limit_error(f"{path}: cannot be read", error)
    if met is not None:
        return met
    number = errno_of(error)
    if number in (errno.ENOENT, errno.ENOTDIR):
        return CacheError(f"{path}: missing; run `pipeline verify`")
    said = os.strerror(number) if number else str(error)
    if number in (None, errno.EISDIR, errno.EINVAL):
        return CacheError(f"{path}: cannot be read: {said}; run `pipeline verify`")
    return CacheError(f"{path}: cannot be read: {said}; the disk or the way to it is failing: see the system's log")


def _room_message(where: Path, what: str, need: int, error: OSError) -> str:
    free = free_bytes(where)
    short = f"at least {size_text(max(need - free, 1 << 20))}"
    room = need and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    needs = f", which needs {size_text(need)} where {size_text(free)} are free" if room else ""
    remedy = REMEDIES[error.errno].format(short=short)
    return f"{where}: cannot write {what}{needs}: {os.strerror(error.errno)}; {remedy}"


def free_bytes(where: Path) -> int:
    """Bytes an ordinary user may still write at `where`, or at its nearest parent that exists."""
    where = where.absolute()
    while not where.exists():
        where = where.parent
    return shutil.disk_usage(where).free


def need_room(where: Path, what: str, need: int) -> None:
    """RoomError before the work when `need` bytes cannot fit."""
    if need > free_bytes(where):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise RoomError(_room_message(where, what, need, full))


def write_all(fd: int, data) -> None:
    """`os.write` until every byte of `data` (a contiguous buffer) is written."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


# Linux only. Python has no name for it; its POSIX_FADV_DONTNEED would also wait for every CPU of the machine.
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and do not wait


def begin_writing(fd: int, start: int, size: int) -> None:
    """Have the system begin to write what it holds of a range of a file. No more than advice: it may not take it."""
    if _sync_file_range is not None:
        _sync_file_range(fd, start, size, _WRITE)


def sync_folder(folder: Path) -> None:
    """Make renames into `folder` last."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(path: Path) -> int | None:
    """Open (or make) `path` and lock it. None when it is held by another, or was removed meanwhile.

    The descriptor is the lock: closing it, or dying, lets go. Holding the lock of a name that is gone protects
    nothing, hence the comparison at the end.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except FileNotFoundError:  # its folder was removed
        return None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        raise CacheError(f"{path}: a link or a folder, where a lock is a file; remove it") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held, there = os.fstat(fd), os.stat(path)
        if (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def in_use(cache: Path) -> bool:
    """Whether a process is at work on the cache, as far as locks reach. Writes nothing, and needs no right to."""
    try:
        left = sorted(cache.glob(f"{SCRATCH}*"))
    except OSError:
        return False
    return any(_is_held(path / "lock" if path.is_dir() else path) for path in left)


def _is_held(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a disk without locks
        return False
    finally:
        os.close(fd)
    return False


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP wait until the block is done: what takes milliseconds is not left half done.

    Only the main thread gets signals, so elsewhere there is nothing to hold back.
    """
    before, waiting = {}, []
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler is not None:  # None: not Python's to put back
                signal.signal(number, lambda number, frame: waiting.append(number))
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


@contextlib.contextmanager
def turn(cache: Path, step: str) -> Iterator[None]:
    """Hold the cache's lock for `step`, alone of all processes; whoever waits for it long says so.

    A holder that dies lets go, so nothing but a stopped process can keep others waiting.
    """
    path = cache / f"{SCRATCH}{step}.lock"
    fd = _lock_in_turn(path, step)
    try:
        yield
    finally:
        with finishing():
            path.unlink(missing_ok=True)
            os.close(fd)


def _lock_in_turn(path: Path, step: str) -> int:
    """Wait for a lock by asking again and again: a blocking wait on a network file system may not be interrupted."""
    since, pause, said = time.monotonic(), 0.001, False
    while (fd := lock(path)) is None:
        if not path.parent.is_dir():
            raise CacheError(f"{path.parent}: the cache was removed while a process worked on it")
        if not said and time.monotonic() - since > PATIENCE_S:
            said = True
            print(
                f"waiting for another process, which is at the {step} of this cache (it holds {path.name}; "
                "remove that file if there is no such process)",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(pause)
        pause = min(2 * pause, POLL_S)
    return fd


@contextlib.contextmanager
def committing(cache: Path) -> Iterator[None]:
    """Hold the cache's commit lock, for the few milliseconds in which names are put in place."""
    refuse_links(cache)
    with turn(cache, "commit"), finishing():
        yield


class Scratch:
    """A folder `tmp-<label>-<uuid>/` of a cache, locked while it is used and removed on `close`, at the latest when
    the interpreter ends."""

    def __init__(self, cache: Path, label: str):
        with room(cache, "a scratch folder"), finishing():
            held = None
            while held is None:  # a cleaner may be quicker than our lock
                self.path = cache / f"{SCRATCH}{label}-{uuid.uuid4().hex}"
                self.path.mkdir()
                held = lock(self.path / "lock")
            self._remove = weakref.finalize(self, _remove, self.path, held, os.getpid())

    def close(self) -> None:
        with finishing():
            self._remove()

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _remove(path: Path, held: int, owner: int) -> None:
    """Remove a scratch folder and let go of it; not in a forked child, whose parent still uses it."""
    if os.getpid() == owner:
        _remove_folder(path, held)


def _remove_folder(path: Path, held: int) -> None:
    """Remove a locked folder. A network file system keeps a trace of the lock in it until that is closed."""
    shutil.rmtree(path, ignore_errors=True)
    os.close(held)
    with contextlib.suppress(OSError):
        path.rmdir()


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with room(path, "a file", len(data)), finishing():
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = None
        while fd is None:
            temporary = path.parent / f"{SCRATCH}{uuid.uuid4().hex}"
            fd = lock(temporary)
        try:
            write_all(fd, data)
            os.fsync(fd)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(fd)


def clean_label(folder: Path, label: str) -> None:
    """Remove the scratch folders of this label whose process is gone, as far as rights allow."""
    with contextlib.suppress(OSError, CacheError):
        for path in sorted(folder.glob(f"{SCRATCH}{label}-{'[0-9a-f]' * 32}")):
            if path.is_symlink() or not path.is_dir():
                continue
            held = lock(path / "lock")
            if held is not None:
                _remove_folder(path, held)


def refuse_links(cache: Path) -> None:
    """CacheError where a folder that is to be written to is a link, which may lead anywhere."""
    links = [cache / name for name in FOLDERS if (cache / name).is_symlink()]
    if not links and (cache / SHARDS).is_dir():
        with reading(cache / SHARDS), os.scandir(cache / SHARDS) as entries:
            links = [Path(entry) for entry in entries if entry.is_symlink()]
    if links:
        raise CacheError(f"{links[0]}: a link, where only a folder is written to; replace it by what it points to")


def clean(cache: Path) -> list[str]:
    """Remove scratch folders and files whose process is gone. Returns their names, relative to the cache."""
    refuse_links(cache)
    removed = []
    with reading(cache):
        own = [cache, *(cache / name for name in FOLDERS), *(cache / SHARDS).glob("*")]
        left = sorted(path for folder in own for path in folder.glob(f"{SCRATCH}*"))
    for path in left:
        folder = path.is_dir() and not path.is_symlink()
        if path.is_symlink():  # nobody's: what we make is no link
            path.unlink()
        if not folder and not path.is_file():
            continue
        fd = lock(path / "lock" if folder else path)
        if fd is None:
            continue
        if folder:
            _remove_folder(path, fd)
        else:
            path.unlink(missing_ok=True)
            os.close(fd)
        removed.append(path.relative_to(cache).as_posix())
    return removed
