"""Locks between processes (flock), for a whole cache or one file, and signals deferred for the length of a commit.

Correctness does not depend on them: where a network file system has none that reach other machines, two processes may
do the same work twice, and both write the same bytes.
"""

import contextlib
import errno
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.cache.layout import SCRATCH
from pipeline.errors import CacheError

QUIET_WAIT_S = 3.0  # a longer wait for another process is printed
POLL_S = 0.5


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
    return any(_is_locked(path / "lock" if path.is_dir() else path) for path in scratch)


def _is_locked(path: Path) -> bool:
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
def process_lock(cache: Path, step: str) -> Iterator[None]:
    """Hold the cache's lock for `step` against all other processes; a wait of more than QUIET_WAIT_S is printed.

    The lock of a process that dies is released, so only a suspended process can block the others for good.
    """
    path = cache / f"{SCRATCH}{step}.lock"
    fd = _wait_for_lock(path, step)
    try:
        yield
    finally:
        with defer_signals():
            path.unlink(missing_ok=True)
            os.close(fd)


def _wait_for_lock(path: Path, step: str) -> int:
    """Poll for a lock: a blocking wait on a network file system may not be interruptible. Returns its descriptor."""
    since, pause, printed = time.monotonic(), 0.001, False
    while (fd := try_lock(path)) is None:
        if not path.parent.is_dir():
            raise CacheError(f"{path.parent}: the cache was removed while a process worked on it")
        if not printed and time.monotonic() - since > QUIET_WAIT_S:
            printed = True
            print(
                f"waiting for another process, which is at the {step} of this cache (it holds {path.name}; "
                "remove that file if there is no such process)",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(pause)
        pause = min(2 * pause, POLL_S)
    return fd
