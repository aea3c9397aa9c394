"""A run's logs: JSON lines that a resumed run truncates to its checkpoint, so that a kill leaves no trace in them.

    metrics.jsonl    one line for each logged step and each evaluation; the same bytes however often a run was killed
    timing.jsonl     what differs between runs of one recipe: seconds, tokens a second

Each line ends with a checksum of itself and of the line before (see pipeline/checksummed_json.py), and a checkpoint
records that of the last line before it. So a line that is changed, missing or from another run is found before its
figures are used.
"""

import json
import os
from pathlib import Path

from pipeline.cache.atomic import write_errors, write_file
from pipeline.checksummed_json import damage_error, parse_checksummed, with_checksum
from pipeline.errors import CacheError
from pipeline.untrusted import read_file

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
MAX_BYTES = 4 << 30
REMOVE = "remove it to go on without the figures of earlier steps"


class MetricsLog:
    """One append-only file of checksummed JSON lines. `last_checksum` is that of the newest line, "" without one."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict] = []
        self.last_checksum = ""

    def truncate(self, step: int, expected_checksum: str = "") -> None:
        """Keep the lines up to `step`; later ones will be written again, and an incomplete last line is dropped.

        expected_checksum: of a line that must be among them, as the checkpoint recorded it. Raises CacheError where it
        is not, since then the lines before it are not those that were written. A log that the user removed starts
        again with a line that records this.
        """
        self.lines, self.last_checksum = [], ""
        if expected_checksum and not self.path.exists():
            return self.write({"step": step, "removed": expected_checksum})
        valid, reason = self._read(step)
        checksums = [word for _, record, checksum in valid for word in (checksum, record.get("removed"))]
        if expected_checksum and expected_checksum not in checksums:
            reason = reason or f"the lines up to step {step} are not all there"
            raise CacheError(f"{self.path}: damaged ({reason}); {REMOVE}")
        self.lines = [record for _, record, _ in valid]
        self.last_checksum = valid[-1][2] if valid else ""
        write_file(self.path, b"".join(line for line, _, _ in valid))

    def _read(self, step: int) -> tuple[list[tuple[bytes, dict, str]], str]:
        """Return the valid lines up to `step` as (bytes, record, checksum), and what is wrong with the line after
        them ("" for nothing)."""
        try:
            lines = read_file(self.path, MAX_BYTES).splitlines(keepends=True) if self.path.exists() else []
        except (OSError, ValueError) as error:
            raise damage_error(self.path, error, REMOVE) from None
        valid, last = [], ""
        for number, line in enumerate(lines, 1):
            try:
                record, checksum = parse_checksummed(line, last)
                if not line.endswith(b"\n") or type(record.get("step")) is not int or (last and not checksum):
                    raise ValueError("no line of a journal")
            except ValueError as error:
                return valid, f"line {number}: {error}"
            if record["step"] > step:
                break
            valid.append((line, record, checksum))
            last = checksum
        return valid, ""

    def write(self, record: dict) -> None:
        """Append one line and fsync it. Raises RoomError when the disk is full."""
        line = with_checksum(json.dumps(record, allow_nan=False), self.last_checksum)
        self.lines.append(record)
        self.last_checksum = parse_checksummed(line, self.last_checksum)[1]
        with write_errors(self.path, "a line of metrics"), open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
