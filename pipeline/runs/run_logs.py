"""The logs that a run leaves, as others than the training read them: the doctor, reports, `pipeline watch`.

stages/train_draft/logs.py writes them and says what a line holds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import CacheError
from pipeline.json_files import damage_error, parse_journal, read_file

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
MAX_BYTES = 4 << 30
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
