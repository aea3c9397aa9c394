"""The journal of a regeneration, `OUT.journal`: every reply as it came, one line each, so that none is asked for twice.

A line is JSON, a tab, and the digest of that JSON. The first one says what is being made: by whom, how, from which
corpus. A line that a kill or a full disk left unfinished is cut off, its reply asked for again; so is a damaged one.
The file is locked while a process writes, and only ever added to.
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

SYNC_S = 2.0  # between syncs: what a lost power supply costs
SEPARATOR = b"\t"


class Journal:
    """Replies by the key of their row and their turn, on disk but for where they stand. Open it with `with`.

    head: what decides every reply, compared with what the file says. lost: lines that were damaged and are asked again.
    """

    def __init__(self, path: Path, head: dict):
        self.path, self.head, self.lost = path, head, 0
        self._places: dict[bytes, list[tuple[int, int]]] = {}
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
        return sum(map(len, self._places.values()))

    def replies(self, key: str) -> list[Reply]:
        """Return the replies to a row, turn by turn, as far as there are any."""
        return [Reply(**self._load(*place)["reply"]) for place in self._places.get(bytes.fromhex(key), ())]

    def add(self, key: str, turn: int, reply: Reply) -> None:
        """Write a reply down. RoomError when there is no room for it."""
        line = _line({"key": key, "turn": turn, "reply": reply.as_dict()})
        with write_errors(self.path, "a reply", len(line)), defer_signals():
            self._append(line)
        self._note(key, turn, len(line))

    def sync(self) -> None:
        """Make what is written last."""
        with write_errors(self.path, "the journal"):
            os.fsync(self._fd)
        self._synced = time.monotonic()

    def _append(self, line: bytes) -> None:
        try:
            write_all(self._fd, line)
        except OSError:
            os.ftruncate(self._fd, self._end)  # half a line would spoil the next one
            os.lseek(self._fd, self._end, os.SEEK_SET)
            raise
        if time.monotonic() - self._synced > SYNC_S:
            self.sync()

    def _note(self, key: str, turn: int, size: int) -> None:
        """Remember where a reply stands; one out of turn follows what was lost, and is asked again."""
        places = self._places.setdefault(bytes.fromhex(key), [])
        if turn == len(places):
            places.append((self._end, size))
        self._end += size

    def _load(self, start: int, size: int) -> dict:
        return _parsed(os.pread(self._fd, size, start))

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            head = next(file, b"")
            if not head.endswith(b"\n"):  # new, or killed within its first line
                return self._begin()
            found = _parsed(head)
            if found is None or "head" not in found:
                raise UsageError(f"{self.path} is no journal of `pipeline regenerate`; name another --out")
            self._compare(found["head"])
            self._end = len(head)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                entry = _parsed(line)
                if entry is None:
                    self.lost += 1
                    self._end += len(line)
                else:
                    self._note(entry["key"], entry["turn"], len(line))
        with write_errors(self.path, "the journal"):
            os.ftruncate(self._fd, self._end)
            os.lseek(self._fd, self._end, os.SEEK_SET)

    def _begin(self) -> None:
        line = _line({"head": self.head})
        with write_errors(self.path, "the journal", len(line)):
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._append(line)
            self.sync()
            sync_folder(self.path.parent)
        self._end = len(line)

    def _compare(self, found: dict) -> None:
        for name, there, here in _differences(found, self.head):
            raise UsageError(
                f"{self.path} holds replies with {name} {there}, and here it is {here}; name another --out, "
                "or remove that file to ask everything again"
            )


def _differences(found: dict, wanted: dict) -> Iterator[tuple[str, str, str]]:
    """Yield what two heads differ in, outermost name first, with both values as JSON."""
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


def _parsed(line: bytes) -> dict | None:
    """Return what a line says, None when it is damaged."""
    data, _, digest = line.rstrip(b"\n").rpartition(SEPARATOR)
    return json.loads(data) if data and _digest(data) == digest else None
