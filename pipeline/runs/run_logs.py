"""The logs that a run leaves, as others than the training read them: the doctor, reports, `pipeline watch`.

stages/train_draft/logs.py writes them and says what a line holds. `read_log` checks every line; `LogTail` follows a log
as it grows and passes over what it cannot read.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import CacheError
from pipeline.json_files import damage_error, parse_journal, parse_json, read_file

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
MAX_BYTES = 4 << 30
MOST_AT_ONCE = 64 << 20  # bytes read of a growing log: of a longer one the rest comes with the next call
REMOVE = "remove it to go on without the figures of earlier steps"


def read_log(path: Path) -> list[dict]:
    """Return the lines of a run's log, none where it is not there. An incomplete last line is left out.

    Raises CacheError for a damaged log.
    """
    if not path.exists():
        return []
    try:
        data = read_file(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise damage_error(path, error, REMOVE) from None
    valid, reason = parse_journal(data)
    if len(valid) < data.count(b"\n"):
        raise CacheError(f"{path}: damaged ({reason}); {REMOVE}")
    return [record for _, record, _ in valid]


def cumulative_seconds(lines: Sequence[Mapping]) -> list[tuple[int, float]]:
    """Return the step of each line of a timing log, and the seconds spent on steps up to it, over all starts.

    A line's `seconds` count from its own start, which was at step `since`; in logs without that it follows from the
    seconds of a step. Steps that no line tells of, as those between a start's last line and the checkpoint that the
    next start went on from, count as long as those of the line before, of the first start as those after.
    """
    found: list[tuple[int, float]] = []
    start, before, pace = None, 0.0, None  # of the start that the lines belong to: its step; the seconds up to it
    for line in lines:
        if "seconds" not in line:
            continue
        last, total = found[-1] if found else (0, 0.0)
        began = _began(line, start, last)
        of_line = line["seconds"] / max(1, line["step"] - began)
        if began != start:
            before = total + (began - last) * (of_line if pace is None else pace)
        start, pace = began, of_line
        found.append((line["step"], before + line["seconds"]))
    return found


def _began(line: Mapping, start: int | None, last: int) -> int:
    """Return the step at which the start of a line began. start: that of the line before, at step `last`, which a new
    start never precedes."""
    if "since" in line:
        return line["since"]
    steps = line["seconds"] / line["step_seconds"] if line.get("step_seconds") else line["step"] - last
    guess = min(max(round(line["step"] - steps), last), line["step"] - 1)
    goes_on = start is not None and line["step"] - steps < (start + last) / 2
    return start if goes_on else guess


class LogTail:
    """The lines of a log so far, which may be anyone's. last: the newest without an evaluation. evaluations: the step
    and figures of those with one, but for single replies. written: when the log last grew, in seconds since the epoch;
    0 without a log.

    A line that is not whole yet waits. A log that was replaced, as by a run that goes on from its checkpoint, is read
    from its start.
    """

    def __init__(self, path: Path):
        self.path = path
        self._start()

    def _start(self) -> None:
        self.last: dict = {}
        self.evaluations: list[dict] = []
        self.written, self._inode, self._offset, self._rest = 0.0, 0, 0, b""

    @property
    def step(self) -> int:
        """The newest step that a line tells of, 0 without one."""
        return max(self.last.get("step", 0), *(found["step"] for found in self.evaluations[-1:]), 0)

    def refresh(self) -> None:
        """Read what was appended since the last call."""
        try:
            with open(self.path, "rb", opener=_open_waiting_for_nothing) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    return
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._start()
                self._inode, self.written = found.st_ino, found.st_mtime
                file.seek(self._offset)
                data = file.read(MOST_AT_ONCE)
        except (OSError, ValueError):  # not there yet, or nothing that can be read
            if not self.path.exists():
                self._start()
            return
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MOST_AT_ONCE:  # no line of ours
            self._rest = b""
        for line in lines:
            if b'"eval":' in line:
                self._take(line)
        for line in reversed(lines):
            if b'"eval":' not in line and self._take(line):
                break

    def _take(self, line: bytes) -> bool:
        """Keep a line; return whether it is one of a log."""
        try:
            record = parse_json(line)
        except ValueError:
            return False
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            return False
        if isinstance(record.get("eval"), dict):
            figures = {name: value for name, value in record["eval"].items() if name != "replies"}
            self.evaluations.append({**figures, "step": record["step"]})
        else:
            self.last = record
        return True


def _open_waiting_for_nothing(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def number(value: object) -> float | None:
    """Return a finite number as it is, None for anything else."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None
