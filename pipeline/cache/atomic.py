"""Crash-safe writes: atomic renames, locks, scratch folders, and typed errors for what the system refuses.

Unfinished work is named `tmp-*` and stays locked (flock) while its process lives. A name without the prefix is
complete: files are synced, renamed, and their folder synced. `clean_scratch` removes what dead processes left.

Correctness does not depend on locks: where a network file system has none that reach other machines, two processes may
do the same work twice, and both write the same bytes.
"""

import contextlib
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
from pipeline.errors import MEMORY, CacheError, DiskError, RoomError, read_error
from pipeline.size_text import size_text
from pipeline.visible_text import visible

QUIET_WAIT_S = 3.0  # a longer wait for another process is printed
POLL_S = 0.5

_RESUME = "the same command goes on where this stopped"
_FREE_SPACE = "free {short} or pass --out on another disk; " + _RESUME
_MAKE_WRITABLE = "make it writable or pass another --out; " + _RESUME
_OPEN_FEWER = "raise `ulimit -n` or close other programs; " + _RESUME
_NO_LOCKS = "this disk has no file locks (a Lustre mount needs `-o flock`); pass --out on another disk"
_DISK_FAILING = "the disk or the way to it is failing: see the system's log, then pass --out on another; " + _RESUME

REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "raise `ulimit -f`; " + _RESUME,
    errno.EROFS: _MAKE_WRITABLE,
    errno.EACCES: _MAKE_WRITABLE,
    errno.EPERM: _MAKE_WRITABLE,
    errno.EMFILE: _OPEN_FEWER,
    errno.ENFILE: _OPEN_FEWER,
    errno.ENOLCK: _NO_LOCKS,
    errno.EOPNOTSUPP: _NO_LOCKS,
    errno.ENOSYS: _NO_LOCKS,
    errno.ENOENT: "a folder on the way cannot be made, or was removed; pass another --out",
    errno.ENOTDIR: "a file stands where a folder on the way should; pass another --out",
    errno.ENAMETOOLONG: "the path is longer than this disk takes; pass a shorter --out",
    errno.ELOOP: "links on the way lead in a circle; pass another --out",
    errno.ENOMEM: f"{MEMORY}; {_RESUME}",
    errno.EIO: _DISK_FAILING,
    errno.ESTALE: _DISK_FAILING,
}


@contextlib.contextmanager
def write_errors(where: Path, what: str, need: int = 0) -> Iterator[None]:
    """Raise RoomError for an OSError of a full disk, a read-only folder or an exhausted limit.

    where: the path written to   what: the thing written, for the message   need: its size in bytes, if known
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        kind = RoomError if error.errno == errno.ENOMEM else DiskError
        raise kind(_write_error_message(where, what, need, error)) from error


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Raise the error of `read_error` for an OSError met while a file of a cache is read."""
    try:
        yield
    except OSError as error:
        raise read_error(path, error) from error


def _write_error_message(where: Path, what: str, need: int, error: OSError) -> str:
    free = free_bytes(where)
    short = f"at least {size_text(max(need - free, 1 << 20))}"
    is_full = need and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    needs = f", which needs {size_text(need)} where {size_text(free)} are free" if is_full else ""
    remedy = REMEDIES[error.errno].format(short=short)
    return f"{where}: cannot write {what}{needs}: {os.strerror(error.errno)}; {remedy}"


def free_bytes(where: Path) -> int:
    """Bytes that a user without special rights can still write at `where`, or at its nearest parent that exists."""
    where = where.absolute()
    while not where.exists():
        where = where.parent
    return shutil.disk_usage(where).free


def check_free_space(where: Path, what: str, need: int) -> None:
    """Raise RoomError, before any work, when the disk of `where` has fewer than `need` bytes free."""
    if need > free_bytes(where):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise RoomError(_write_error_message(where, what, need, full))


def write_all(fd: int, data) -> None:
    """Write all of `data`, a contiguous buffer, to a file descriptor."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames into it survive a power cut."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Sync a file's content to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def try_lock(path: Path) -> int | None:
    """Open (or create) `path` and lock it without waiting. None when another process has the lock, or removed the file.

    The lock is the file descriptor returned: closing it, or the end of the process, releases it. The lock of a file
    that was removed protects nothing, so the inode is compared with that of the path at the end.
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
        locked, named = os.fstat(fd), os.stat(path)
        if (locked.st_dev, locked.st_ino) == (named.st_dev, named.st_ino):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def in_use(cache: Path) -> bool:
    """Whether a process is writing to the cache, as far as locks tell. Writes nothing and needs no right to write."""
    try:
        scratch = sorted(cache.glob(f"{SCRATCH}*"))
    except OSError:
        return False
    return any(is_locked(path / "lock" if path.is_dir() else path) for path in scratch)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file, as far as locks tell. Writes nothing."""
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
def defer_signals() -> Iterator[None]:
    """Defer SIGINT, SIGTERM and SIGHUP until the `with` block is done, which should take milliseconds.

    Only the main thread gets signals, so in another thread this does nothing.
    """
    before, pending = {}, []
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler is not None:  # None: not set by Python, which could not restore it
                signal.signal(number, lambda number, frame: pending.append(number))
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        if pending:
            signal.raise_signal(pending[0])


@contextlib.contextmanager
def process_lock(folder: Path, step: str) -> Iterator[None]:
    """Hold a folder's lock for `step` against all other processes; a wait of more than QUIET_WAIT_S is printed.

    The lock of a process that dies is released, so only a suspended process can block the others for good. Polled: a
    blocking wait on a network file system may not be interruptible.
    """
    path, since, pause = folder / f"{SCRATCH}{step}.lock", time.monotonic(), 0.001
    while (fd := try_lock(path)) is None:
        if not folder.is_dir():
            raise CacheError(f"{folder}: the folder was removed while a process worked in it")
        if time.monotonic() - since > QUIET_WAIT_S:
            since = float("inf")  # once
            print(
                f"waiting for another process, which is at the {step} in {visible(folder)} (it holds {path.name}; "
                "remove that file if there is no such process)",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(pause)
        pause = min(2 * pause, POLL_S)
    try:
        yield
    finally:
        with defer_signals():
            path.unlink(missing_ok=True)
            os.close(fd)


@contextlib.contextmanager
def commit_lock(cache: Path) -> Iterator[None]:
    """Hold the cache's commit lock, signals deferred, for the milliseconds in which files are renamed into place."""
    refuse_links(cache)
    with process_lock(cache, "commit"), defer_signals():
        yield


class Scratch:
    """A temporary folder `tmp-<label>-<uuid>/` of a cache, locked while in use.

    Removed by `close`, or when the interpreter ends."""

    def __init__(self, cache: Path, label: str):
        with write_errors(cache, "a scratch folder"), defer_signals():
            fd = None
            while fd is None:  # `clean_scratch` of another process may remove the folder before it is locked
                self.path = cache / f"{SCRATCH}{label}-{uuid.uuid4().hex}"
                self.path.mkdir()
                fd = try_lock(self.path / "lock")
            self._remove = weakref.finalize(self, _remove_folder, self.path, fd, os.getpid())

    def close(self) -> None:
        with defer_signals():
            self._remove()

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _remove_folder(path: Path, lock: int, owner: int) -> None:
    """Remove a folder locked by a process `owner`; not in a child that it forked, as the parent still uses it.

    NFS keeps a `.nfs*` file for the lock until that is closed, hence the `rmdir`."""
    if os.getpid() != owner:
        return
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
    with contextlib.suppress(OSError):
        path.rmdir()


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: synced under a temporary name, then renamed. Raises RoomError."""
    with write_errors(path, "a file", len(data)), defer_signals():
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = None
        while fd is None:
            temporary = path.parent / f"{SCRATCH}{uuid.uuid4().hex}"
            fd = try_lock(temporary)
        try:
            write_all(fd, data)
            os.fsync(fd)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(fd)


def clean_scratch_of(folder: Path, label: str) -> None:
    """Remove the scratch folders of this label whose process is gone; those that cannot be removed stay."""
    with contextlib.suppress(OSError, CacheError):
        for path in sorted(folder.glob(f"{SCRATCH}{label}-{'[0-9a-f]' * 32}")):
            if path.is_symlink() or not path.is_dir():
                continue
            fd = try_lock(path / "lock")
            if fd is not None:
                _remove_folder(path, fd, os.getpid())


def refuse_links(cache: Path) -> None:
    """Raise CacheError where a folder of the cache is a symbolic link: writes might land anywhere."""
    links = [cache / name for name in FOLDERS if (cache / name).is_symlink()]
    if not links and (cache / SHARDS).is_dir():
        with read_errors(cache / SHARDS), os.scandir(cache / SHARDS) as entries:
            links = [Path(entry) for entry in entries if entry.is_symlink()]
    if links:
        raise CacheError(f"{links[0]}: a link, where only a folder is written to; replace it by what it points to")


def clean_scratch(cache: Path) -> list[str]:
    """Remove the scratch folders and files of dead processes. Returns their paths, relative to the cache."""
    refuse_links(cache)
    removed = []
    with read_errors(cache):
        folders = [cache, *(cache / name for name in FOLDERS), *(cache / SHARDS).glob("*")]
        scratch = sorted(path for folder in folders for path in folder.glob(f"{SCRATCH}*"))
    for path in scratch:
        is_folder = path.is_dir() and not path.is_symlink()
        if path.is_symlink():  # never made by this program
            path.unlink()
        if not is_folder and not path.is_file():
            continue
        fd = try_lock(path / "lock" if is_folder else path)
        if fd is None:
            continue
        if is_folder:
            _remove_folder(path, fd, os.getpid())
        else:
            path.unlink(missing_ok=True)
            os.close(fd)
        removed.append(path.relative_to(cache).as_posix())
    return removed
