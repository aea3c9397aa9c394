"""A run's journals: JSON lines that a resumed run cuts back to its checkpoint, so that they do not tell of kills.

    metrics.jsonl    a line a logging step and evaluation; the same bytes whatever was killed when
    timing.jsonl     what differs from run to run: seconds, tokens a second

Each line ends with a checksum of itself and of the line before (see pipeline/checksummed_json.py), and a checkpoint
keeps that of the last line before it: so a line that is changed, lost or of another run shows before a figure of it is
used.
"""

import json
import os
from pathlib import Path

from pipeline.cache.atomic import write_errors, write_file
from pipeline.checksummed_json import damaged, sealed, unsealed
from pipeline.errors import CacheError
from pipeline.untrusted import read_file

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
MOST_BYTES = 4 << 30
REMOVE = "remove it to go on without the figures of earlier steps"


class Journal:
    """The lines of one journal. `last` is the checksum of the newest."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict] = []
        self.last = ""

    def rewind(self, step: int, vouched: str = "") -> None:
        """Keep the lines up to `step`; later ones will be written again, and a torn one is dropped.

        vouched: the checksum of a line that has to be among them. CacheError where it is not, since then those before
        it are not the ones that were written. A journal that was removed begins anew, and says so in its first line.
        """
        self.lines, self.last = [], ""
        if vouched and not self.path.exists():
            return self.write({"step": step, "removed": vouched})
        kept, wrong = self._read(step)
        if vouched and not any(vouched in (checksum, record.get("removed")) for _, record, checksum in kept):
            lost = wrong or f"the lines up to step {step} are not all there"
            raise CacheError(f"{self.path}: damaged ({lost}); {REMOVE}")
        self.lines = [record for _, record, _ in kept]
        self.last = kept[-1][2] if kept else ""
        write_file(self.path, b"".join(line for line, _, _ in kept))

    def _read(self, step: int) -> tuple[list[tuple[bytes, dict, str]], str]:
        """Return the lines up to `step`, each with its record and checksum, as far as they are sound, and what is wrong
        with the one after."""
        try:
            lines = read_file(self.path, MOST_BYTES).splitlines(keepends=True) if self.path.exists() else []
        except (OSError, ValueError) as error:
            raise damaged(self.path, error, REMOVE) from None
        kept, last = [], ""
        for number, line in enumerate(lines, 1):
            try:
                record, checksum = unsealed(line, last)
                if not line.endswith(b"\n") or type(record.get("step")) is not int or (last and not checksum):
                    raise ValueError("no line of a journal")
            except ValueError as error:
                return kept, f"line {number}: {error}"
            if record["step"] > step:
                break
            kept.append((line, record, checksum))
            last = checksum
        return kept, ""

    def write(self, record: dict) -> None:
        """Append one line and sync it. RoomError when the disk is full."""
        line = sealed(json.dumps(record, allow_nan=False), self.last)
        self.lines.append(record)
        self.last = unsealed(line, self.last)[1]
        with write_errors(self.path, "a line of metrics"), open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
