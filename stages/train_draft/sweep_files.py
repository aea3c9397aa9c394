"""What a sweep leaves: sweep.json, and sweep.csv for spreadsheets."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.cache.atomic import write_file
from pipeline.runs.sweep_record import SweepRecord, write_sweep
from pipeline.visible_text import visible

CSV = "sweep.csv"
FORMULAS = ("=", "+", "-", "@")  # what a spreadsheet takes for the beginning of a formula


def write_files(folder: Path, record: SweepRecord) -> None:
    """Write both. Raises RoomError."""
    write_sweep(folder, record)
    write_file(folder / CSV, csv_text(record).encode())


def csv_text(record: SweepRecord) -> str:
    """Return the runs as CSV, best first, one row each; what is not known is an empty cell."""
    fields = list(record.runs[0].setting) if record.runs else []
    rows = [[*fields, *COLUMNS]]
    for run in record.runs:
        low, high = run.interval or (None, None)
        pruned = (run.pruned.step, run.pruned.accept_len) if run.pruned else (None, None)
        figures = [run.state, run.accept_len, low, high, run.calls, run.steps, run.parameters, run.seconds]
        rows.append([*run.setting.values(), *figures, run.data, run.heldout, run.failed, *pruned, run.trial, run.run])
    return as_csv(rows)


COLUMNS = [
    "state", "accept_len", "accept_len_low", "accept_len_high", "calls", "steps", "parameters", "seconds", "data",
    "heldout", "failed", "pruned_step", "pruned_accept_len", "trial", "run",
]  # fmt: skip


def as_csv(rows: Sequence[Sequence[object]]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([[_cell(value) for value in row] for row in rows])
    return out.getvalue()


def _cell(value: object) -> object:
    """Return a cell's value. Text that a spreadsheet would compute, or that steers a terminal, is shown as it is."""
    if value is None or isinstance(value, int | float):
        return value
    text = visible(value if isinstance(value, str) else json.dumps(value))
    return f"'{text}" if text.startswith(FORMULAS) else text
