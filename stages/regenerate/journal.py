"""The journal of a regeneration, `OUT.journal`: every reply as it arrives, one line each; none is requested twice.

A line is JSON, a tab, and the digest of that JSON. The first line is the header: target, engine, sampling,
corpus. A line that a kill or a full disk left unfinished is cut off and its reply requested again, as is a damaged one.
The file is locked while a process writes, and append-only.
"""

import json
import os
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from pipeline.cache.atomic import defer_signals, sync_folder, try_lock, write_all, write_errors
from pipeline.errors import UsageError
from stages.regenerate.replies import Reply

SYNC_S = 2.0  # between syncs: the most that a power failure loses
SEPARATOR = b"\t"


class Journal:
    """Replies by corpus row key and turn; memory holds only their offsets. Open it with `with`.

    header: what decides every reply, compared with the file's. damaged: lines whose replies are requested again.
    """

    def __init__(self, path: Path, header: dict):
        self.path, self.header, self.damaged = path, header, 0
        self._spans: dict[bytes, list[tuple[int, int]]] = {}
        self._fd, self._end, self._synced = -1, 0, time.monotonic()

    def __enter__(self) -> "Journal":
        with write_errors(self.path, "the journal"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = try_lock(self.path)
        if fd is None:
            raise UsageError(f"{self.path}: another process writes it; wait for it, or name another --out")
        self._fd = fd
        try:
            self._read()
        except BaseException:
            os.close(fd)
            raise
        return self

    def __exit__(self, *_) -> None:
        os.close(self._fd)

    def __len__(self) -> int:
        """The number of replies."""
        return sum(map(len, self._spans.values()))

    def replies(self, key: str) -> list[Reply]:
        """Return the replies to a row, turn by turn, as far as there are any."""
        return [Reply(**self._load(*span)["reply"]) for span in self._spans.get(bytes.fromhex(key), ())]

    def add(self, key: str, turn: int, reply: Reply) -> None:
        """Append a reply. RoomError when the disk is full."""
        line = _line({"key": key, "turn": turn, "reply": reply.as_dict()})
        with write_errors(self.path, "a reply", len(line)), defer_signals():
            self._append(line)
        self._index(key, turn, len(line))

    def sync(self) -> None:
        """Sync the file to disk."""
        with write_errors(self.path, "the journal"):
            os.fsync(self._fd)
        self._synced = time.monotonic()

    def _append(self, line: bytes) -> None:
        try:
            write_all(self._fd, line)
        except OSError:
            os.ftruncate(self._fd, self._end)  # half a line would damage the next one
            os.lseek(self._fd, self._end, os.SEEK_SET)
            raise
        if time.monotonic() - self._synced > SYNC_S:
            self.sync()

    def _index(self, key: str, turn: int, size: int) -> None:
        """Index a reply's offset and size. One out of order follows a lost reply, and is requested again."""
        spans = self._spans.setdefault(bytes.fromhex(key), [])
        if turn == len(spans):
            spans.append((self._end, size))
        self._end += size

    def _load(self, start: int, size: int) -> dict:
        return _parse(os.pread(self._fd, size, start))

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            first_line = next(file, b"")
            if not first_line.endswith(b"\n"):  # new, or killed within its first line
                return self._begin()
            header = _parse(first_line)
            if header is None or "head" not in header:
                raise UsageError(f"{self.path} is no journal of `pipeline regenerate`; name another --out")
            self._compare(header["head"])
            self._end = len(first_line)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                entry = _parse(line)
                if entry is None:
                    self.damaged += 1
                    self._end += len(line)
                else:
                    self._index(entry["key"], entry["turn"], len(line))
        with write_errors(self.path, "the journal"):
            os.ftruncate(self._fd, self._end)
            os.lseek(self._fd, self._end, os.SEEK_SET)

    def _begin(self) -> None:
        line = _line({"head": self.header})
        with write_errors(self.path, "the journal", len(line)):
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._append(line)
            self.sync()
            sync_folder(self.path.parent)
        self._end = len(line)

    def _compare(self, found: dict) -> None:
        for name, there, here in _differences(found, self.header):
            raise UsageError(
                f"{self.path} holds replies with {name} {there}, and here it is {here}; name another --out, "
                "or remove that file to ask everything again"
            )


def _differences(found: dict, wanted: dict) -> Iterator[tuple[str, str, str]]:
    """Yield each key in which two headers differ, with both values as JSON."""
    for name in dict.fromkeys([*wanted, *found]):
        there, here = found.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(here, dict) and name == "regenerated":
            yield from _differences(there, here)
        elif there != here:
            yield name, json.dumps(there, sort_keys=True), json.dumps(here, sort_keys=True)


def _line(entry: dict) -> bytes:
    data = json.dumps(entry, ensure_ascii=False).encode()
    return data + SEPARATOR + _digest(data) + b"\n"


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).hexdigest().encode()


def _parse(line: bytes) -> dict | None:
    """Return the entry of a line, None when it is damaged."""
    data, _, digest = line.rstrip(b"\n").rpartition(SEPARATOR)
    return json.loads(data) if data and _digest(data) == digest else None
