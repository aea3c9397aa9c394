"""What the machine or a right lacks, told apart from what is wrong with a file.

Little memory, too many open files or a path too long say nothing of what a file holds: whoever reports damage asks here
first. Imports nothing heavy.
"""

import errno
import os
import re
from pathlib import Path

from pipeline.errors import PipelineError, RoomError, UsageError

MEMORY = "free memory, raise the limit on it (`ulimit -v`, the job's), or use a machine with more; no file is damaged"
FILES = "raise `ulimit -n` or close other programs; the same command goes on where this stopped"
THREADS = "raise `ulimit -u` or close other programs; the same command goes on where this stopped"
RIGHT = "ask its owner for the right to it, or run the command as a user who has it"
LONG = "the path is longer than this system takes; move the folder to a shorter one"
CIRCLE = "links on the way to it lead in a circle; name the folder itself"
FULL = "free space there, or write to another disk; the same command goes on where this stopped"
FIXED = "it lies on a disk that is read-only; make it writable, or write to another"

# Of these errors no content is the cause: which kind of error it is for us, and what to do.
LIMITS: dict[int, tuple[type[PipelineError], str]] = {
    errno.ENOMEM: (RoomError, MEMORY),
    errno.EMFILE: (RoomError, FILES),
    errno.ENFILE: (RoomError, FILES),
    errno.ENOSPC: (RoomError, FULL),
    errno.EDQUOT: (RoomError, FULL),
    errno.EROFS: (RoomError, FIXED),
    errno.EACCES: (UsageError, RIGHT),
    errno.EPERM: (UsageError, RIGHT),
    errno.ENAMETOOLONG: (UsageError, LONG),
    errno.ELOOP: (UsageError, CIRCLE),
}
NUMBERED = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]")  # as safetensors and Arrow put it into words
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "out of memory")


def number_of(error: BaseException) -> int | None:
    """Return the system's number of an error; ENOMEM for one that only says so in words, None where there is none."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if found := NUMBERED.search(str(error)):
        return int(found[1] or found[2])
    return errno.ENOMEM if any(words in str(error) for words in NO_MEMORY) else None


def limit(where: Path | str, error: BaseException) -> PipelineError | None:
    """Return what to say of a limit that was met at `where`; None where the error is of another kind."""
    if "can't start new thread" in str(error):
        return RoomError(f"{where}: no further thread can be started; {THREADS}")
    number = number_of(error)
    if number not in LIMITS:
        return None
    kind, remedy = LIMITS[number]
    return kind(f"{where}: {os.strerror(number)}; {remedy}")


def refuse_limit(where: Path | str, error: BaseException) -> None:
    """Raise RoomError or UsageError where the error is a limit's; else return, for it is the file's."""
    found = limit(where, error)
    if found is not None:
        raise found from error
