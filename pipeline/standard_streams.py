"""Standard output and error that survive a closed reader, so that a command finishes with its own exit code: otherwise
`head`, a closed terminal or a full disk under a log would end a training, or hide that a cache is damaged.
"""

import errno
import io
import os
import sys

from pipeline.errors import RoomError

READER_GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe has left, or a terminal was closed


class _DroppingFile(io.FileIO):
    """The raw file of a standard stream. After a failed write output is dropped; `failed` is the first error."""

    failed: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = self.failed or error
            _open_devnull(self.fileno(), os.O_WRONLY)
            return len(data)


def protect_standard_streams() -> None:
    """Protect the standard streams; point closed ones at /dev/null, or other files would get their descriptors.

    Streams that were replaced, as tests do, stay.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        current, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if current is None:
            try:
                os.fstat(number)
            except OSError:  # closed
                _open_devnull(number, os.O_WRONLY if number else os.O_RDONLY)
        if number and current is original:
            setattr(sys, name, _protected_stream(number, current))


def _open_devnull(number: int, flags: int) -> None:
    """Point a descriptor at /dev/null."""
    null = os.open(os.devnull, flags)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    os.set_inheritable(number, True)


def _protected_stream(number: int, stream) -> io.TextIOWrapper:
    """Return a text stream on a descriptor, buffered as the stream that it replaces."""
    if stream is not None:
        stream.flush()
    raw = _DroppingFile(number, "w", closefd=False)
    # Escape what the encoding lacks: a lone surrogate of a file name, a letter on an ASCII terminal.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    lines = raw.isatty() or number == 2
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)


def check_standard_output() -> None:
    """Raise RoomError where not all that was printed could be written, unless its reader has left."""
    sys.stdout.flush()
    failed = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failed", None)
    if failed and failed.errno not in READER_GONE:
        cause = f"standard output: {failed.strerror}"
        raise RoomError(f"{cause}; all else is done: make room, or print it to another place")
