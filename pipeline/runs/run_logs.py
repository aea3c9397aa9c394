"""The logs that a run leaves, as others than the training read them: the doctor, reports, `pipeline watch`.

stages/train_draft/logs.py writes them and says what a line holds.
"""

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
