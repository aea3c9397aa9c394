"""Typed errors for what a user can get wrong or the machine lacks, each with its exit code.

`pipeline/command_line.py` prints each as one line on standard error. A message states what was found, what was wanted
and what to do. Errors of the machine (memory, open files, disk space, permissions, paths) say nothing of a file's
content, so code that reports damage asks `limit_error` first. Imports nothing heavy.
"""

import errno
import os
import re
from pathlib import Path


class PipelineError(Exception):
    """Base of every error that is not a bug in this program."""

    code = 1


class ProofError(PipelineError):
    """A proof failed: outputs differ, an export does not match, a loss is not finite. Exit code 1."""


class UsageError(PipelineError):
    """A wrong option, recipe, path or model, or an identity that does not match. Exit code 2."""

    code = 2


class DataError(PipelineError):
    """An unusable corpus or chat template, or too many refused samples. Exit code 3."""

    code = 3


class CacheError(PipelineError):
    """A damaged cache. Exit code 4."""

    code = 4


class VersionError(PipelineError):
    """A format, codec or field of a cache that this version does not know. Exit code 4.

    No CacheError: it is no damage, so nothing that mends or replaces what is damaged may touch it.
    """

    code = 4


class RoomError(PipelineError):
    """Not enough disk or memory, or a read-only disk. Exit code 5."""

    code = 5


class DiskError(RoomError):
    """No room on a disk, or no right to write to it: whatever else is to be written there fails, too. Exit code 5."""


def first_line(error: object, most: int | None = 160) -> str:
    """Return the first line of an error's message, `most` characters of it; its type's name where it says nothing."""
    return str(error).strip().split("\n")[0][:most] or type(error).__name__


def cause_of(error: Exception) -> str:
    """Return what the system says of an error, such as "No such file or directory", else the error's own text."""
    return getattr(error, "strerror", None) or str(error)


UPGRADE = "upgrade draft-pipeline"
MEMORY = "free memory, raise the limit on it (`ulimit -v`, the job's), or use a machine with more; no file is damaged"
FILES = "raise `ulimit -n` or close other programs; the same command goes on where this stopped"
THREADS = "raise `ulimit -u` or close other programs; the same command goes on where this stopped"
PERMISSION = "ask its owner for the right to it, or run the command as a user who has it"
TOO_LONG = "the path is longer than this system takes; move the folder to a shorter one"
LINK_LOOP = "links on the way to it lead in a circle; name the folder itself"
FULL = "free space there, or write to another disk; the same command goes on where this stopped"
READ_ONLY = "it lies on a disk that is read-only; make it writable, or write to another"

# Errors that a file's content cannot cause: what each is raised as, and what to do.
LIMITS: dict[int, tuple[type[PipelineError], str]] = {
    errno.ENOMEM: (RoomError, MEMORY),
    errno.EMFILE: (RoomError, FILES),
    errno.ENFILE: (RoomError, FILES),
    errno.ENOSPC: (RoomError, FULL),
    errno.EDQUOT: (RoomError, FULL),
    errno.EROFS: (RoomError, READ_ONLY),
    errno.EACCES: (UsageError, PERMISSION),
    errno.EPERM: (UsageError, PERMISSION),
    errno.ENAMETOOLONG: (UsageError, TOO_LONG),
    errno.ELOOP: (UsageError, LINK_LOOP),
}
NUMBERED = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]")  # as safetensors and Arrow put it into words
MEMORY_MARGIN = 256 << 20  # bytes of address space; with less left, a failure to decode is not called damage
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "out of memory")


def errno_of(error: BaseException) -> int | None:
    """Return an error's errno, from its text if need be (ENOMEM for allocators' messages); None without one."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if match := NUMBERED.search(str(error)):
        return int(match[1] or match[2])
    return errno.ENOMEM if any(words in str(error) for words in NO_MEMORY) else None


def limit_error(where: Path | str, error: BaseException) -> PipelineError | None:
    """Return the RoomError or UsageError for a limit of the machine met at `where`; None for any other error."""
    if "can't start new thread" in str(error):
        return RoomError(f"{where}: no further thread can be started; {THREADS}")
    number = errno_of(error)
    if number not in LIMITS:
        return None
    kind, remedy = LIMITS[number]
    return kind(f"{where}: {os.strerror(number)}; {remedy}")


def refuse_limit(where: Path | str, error: BaseException) -> None:
    """Raise RoomError or UsageError where the error is a limit of the machine; return where it may be the file's."""
    known = limit_error(where, error)
    if known is not None:
        raise known from error


def read_error(path: Path | str, error: OSError) -> PipelineError:
    """Return the typed error for a file that cannot be read: an exhausted limit or a missing right is no damage."""
    exhausted = limit_error(f"{path}: cannot be read", error)
    if exhausted is not None:
        return exhausted
    number = errno_of(error)
    if number in (errno.ENOENT, errno.ENOTDIR):
        return CacheError(f"{path}: missing; run `pipeline verify`")
    message = os.strerror(number) if number else str(error)
    if number in (None, errno.EISDIR, errno.EINVAL):
        return CacheError(f"{path}: cannot be read: {message}; run `pipeline verify`")
    return CacheError(f"{path}: cannot be read: {message}; the disk or the way to it is failing: see the system's log")


def is_present(path: Path) -> bool:
    """Return whether anything is at a path. Raises UsageError where the system cannot tell, as for one too long or
    without the right to look: `Path.exists` says no then, from Python 3.14 on."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a name with a zero byte is none
        return False
    except OSError as error:
        refuse_limit(path, error)
        raise
    return True


def check_memory(where: Path | str) -> None:
    """Raise RoomError when memory is nearly exhausted: a decoder may then fail just as on damaged bytes.

    Tries to allocate far more than a chunk needs, since other threads take and free memory meanwhile.
    """
    try:
        bytearray(MEMORY_MARGIN)
    except MemoryError as error:
        raise limit_error(where, error) from None
