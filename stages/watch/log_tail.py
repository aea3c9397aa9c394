"""A journal that is being written, read as it grows: each call reads only what is new.

A line that is not whole yet waits, one that cannot be read is passed over (`train-draft` itself checks every one). A
file that was replaced, as by a run that goes on from its checkpoint, is read from its start.
"""

import os
from pathlib import Path

from pipeline.json_files import parse_json

MOST = 64 << 20  # bytes read at once: of a longer log the rest comes with the next call


class LogTail:
    """The lines of a log so far. last: the newest one. evaluations: those that hold one. written: when it last grew,
    in seconds since the epoch; 0 without a log."""

    def __init__(self, path: Path):
        self.path = path
        self._start()

    def _start(self) -> None:
        self.last: dict = {}
        self.evaluations: list[dict] = []
        self.written, self._inode, self._offset, self._rest = 0.0, 0, 0, b""

    def refresh(self) -> None:
        """Read what was appended since the last call."""
        try:
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._start()
                self._inode, self.written = found.st_ino, found.st_mtime
                file.seek(self._offset)
                data = file.read(MOST)
        except (OSError, ValueError):  # not there yet, or no regular file
            if not self.path.exists():
                self._start()
            return
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if b'"eval":' in line:
                self._take(line)
        for line in reversed(lines):
            if b'"eval":' not in line and self._take(line):
                break

    def _take(self, line: bytes) -> bool:
        try:
            record = parse_json(line)
        except ValueError:
            return False
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            return False
        if isinstance(record.get("eval"), dict):
            self.evaluations.append({"step": record["step"], **record["eval"]})
        else:
            self.last = record
        return True
