"""What a row comes to, as it travels from whoever prepared it to the plan; and what decides it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.cache.samples import PlannedSample
from pipeline.corpus.tally import Tally
from pipeline.target.files import TEMPLATE_DATE
from stages.cache_hidden.row_limits import ROW_BYTES, ROW_SECONDS


@dataclass(frozen=True)
class Job:
    """What decides how rows become samples: the target's folder, tokens a sample, its vocabulary, names of roles.

    template_kwargs, template_date: the arguments of its chat template, and the day that it is told.
    model: how errors call the target, whose config is checked before any row; None checks nothing.
    row_seconds, row_bytes: what the rows that a worker is sent at once may take, see `row_limits.py`.
    """

    folder: Path
    max_length: int
    vocab_size: int
    roles: dict[str, str] | None = None
    template_kwargs: dict | None = None
    template_date: str = TEMPLATE_DATE
    row_seconds: float = ROW_SECONDS
    row_bytes: int = ROW_BYTES
    model: str | None = None


class Outcome(NamedTuple):
    """What one row came to: its samples, or the fault it is.

    samples: (ids int32, mask in bits, name), each in bytes, and `kinds` of their turns. fault, notes, unproven:
    (reason, detail); of these a fault alone costs the row. turns: supervised, `last_turns` of them in the first sample.
    regenerated: the row's record of who said its replies, as JSON without what differs from row to row.
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
    turns: int = 0
    last_turns: int = 0
    unproven: tuple[tuple[str, str], ...] = ()
    kinds: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    regenerated: str = ""


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
    unproven = [(reason, f"{where}: {detail}") for reason, detail in outcome.unproven]
    tally.count_turns(outcome.turns, outcome.last_turns, unproven)
    tally.count_kinds(outcome.kinds, outcome.file, outcome.line)
    for data, bits, name in outcome.samples:
        ids = np.frombuffer(data, "<i4")
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=len(ids), bitorder="little").view(bool)
        yield PlannedSample(ids, mask, outcome.domain, outcome.split, outcome.file, outcome.line, name)
