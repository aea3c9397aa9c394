"""Standard output and error that outlive whoever reads them: a command does its work and ends with its own exit code.

`head`, a closed terminal or a full disk under a log would else end a training, or hide that a cache is damaged.
"""

import errno
import io
import os
import sys

GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe has left, or a terminal was closed


class _Lasting(io.FileIO):
    """A standard stream's descriptor. What cannot be written any more is dropped, and `failed` says why."""

    failed: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = self.failed or error
            _put_nothing(self.fileno(), os.O_WRONLY)
            return len(data)


def outlive_readers() -> None:
    """Make the process's own standard streams last; open those that are closed, or other files would get their numbers.

    Streams that somebody put in their place, as tests do, stay.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        here, first = getattr(sys, name), getattr(sys, f"__{name}__")
        if here is None and not _is_open(number):
            _put_nothing(number, os.O_WRONLY if number else os.O_RDONLY)
        if number and here is first:
            setattr(sys, name, _lasting(number, here))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _put_nothing(number: int, flags: int) -> None:
    """Make a descriptor lead nowhere."""
    null = os.open(os.devnull, flags)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    os.set_inheritable(number, True)


def _lasting(number: int, stream) -> io.TextIOWrapper:
    """A text stream on a descriptor, which writes what it has whenever the one that it replaces would."""
    if stream is not None:
        stream.flush()
    raw = _Lasting(number, "w", closefd=False)
    # What an encoding lacks is shown escaped: half a surrogate of a file's name, a letter on an ASCII terminal.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    lines = raw.isatty() or number == 2
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)


def lost_output() -> str | None:
    """Why not all that was printed was written, in words; None where it was, or where its reader had left."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    failed = raw.failed if isinstance(raw, _Lasting) else None
    return None if failed is None or failed.errno in GONE else failed.strerror
