"""What a row comes to, as it travels from whoever prepared it to the plan; and what decides it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.cache.samples import PlannedSample
from pipeline.intake import Tally
from stages.cache_hidden.limits import ROW_BYTES, ROW_SECONDS


@dataclass(frozen=True)
class Job:
    """What decides how rows become samples: the target's folder, tokens a sample, its vocabulary, names of roles.

    row_seconds, row_bytes: what the rows that a worker is sent at once may take, see `limits.py`.
    """

    folder: Path
    max_length: int
    vocab_size: int
    roles: dict[str, str] | None = None
    row_seconds: float = ROW_SECONDS
    row_bytes: int = ROW_BYTES


class Outcome(NamedTuple):
    """What one row came to: its samples, or the fault it is.

    samples: (ids int32, mask in bits, name), each in bytes. fault, notes: (reason, detail); notes do not cost the row.
    """

    file: str
    line: int
    domain: str = ""
    split: str = ""
    samples: tuple[tuple[bytes, bytes, bytes], ...] = ()
    fault: tuple[str, str] | None = None
    notes: tuple[tuple[str, str], ...] = ()
    truncated: int = 0
    short: int = 0
    rewritten: int = 0
    unknown: tuple[str, ...] = ()


def samples_of(outcome: Outcome, tally: Tally) -> Iterator[PlannedSample]:
    """Yield the samples of a row; what it lacks goes into the tally, which has counted it already."""
    where = f"{outcome.file}:{outcome.line}"
    for key in outcome.unknown:
        tally.key(key, where)
    if outcome.fault:
        reason, detail = outcome.fault
        tally.fault(reason, f"{where}: {detail}")
        return
    for reason, detail in outcome.notes:
        tally.show(reason, f"{where}: {detail}")
    tally.truncated += outcome.truncated
    tally.short += outcome.short
    tally.rewritten += outcome.rewritten
    for data, bits, name in outcome.samples:
        ids = np.frombuffer(data, "<i4")
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=len(ids), bitorder="little").view(bool)
        yield PlannedSample(ids, mask, outcome.domain, outcome.split, outcome.file, outcome.line, name)
