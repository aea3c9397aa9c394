"""The outcome of preparing a corpus row, as workers send it to the planner, and the job that they prepare rows for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.cache.samples import PlannedSample
from pipeline.corpus.rejections import Tally
from pipeline.target.files import TEMPLATE_DATE
from stages.cache_hidden.row_limits import ROW_BYTES, ROW_SECONDS


@dataclass(frozen=True)
class Job:
    """The settings by which workers turn rows into samples: target folder, tokens a sample, vocabulary size, roles.

    template_kwargs, template_date: the chat template's arguments, and the date it gets as today's.
    model: the target's name in errors; its config is checked before any row. None: no check.
    row_seconds, row_bytes: limits for the rows that a worker is sent at once, see `row_limits.py`.
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


class RowOutcome(NamedTuple):
    """The outcome of one row: its samples, or why it was rejected.

    samples: (ids as int32, mask as packed bits, sample id), each in bytes; kinds: of their turns. fault, notes,
    unproven: (reason, detail); only `fault` rejects the row. turns: how many are supervised, `last_turns` of them in
    the first sample. regenerated: the row's record of which model wrote its replies, as JSON, without `stops`.
    """

    file: str
    line: int
    domain: str = ""
    split: str = ""
    samples: tuple[tuple[bytes, bytes, bytes], ...] = ()
    rejected: tuple[str, str] | None = None
    notes: tuple[tuple[str, str], ...] = ()
    truncated: int = 0
    too_short: int = 0
    turns: int = 0
    last_turns: int = 0
    unproven: tuple[tuple[str, str], ...] = ()
    kinds: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    regenerated: str = ""


def samples_of(outcome: RowOutcome, tally: Tally) -> Iterator[PlannedSample]:
    """Yield the samples of a row, and count in the tally what was left out of it; the row itself is counted before."""
    where = f"{outcome.file}:{outcome.line}"
    for key in outcome.unknown:
        tally.add_unknown_key(key, where)
    if outcome.rejected:
        reason, detail = outcome.rejected
        tally.reject(reason, f"{where}: {detail}")
        return
    for reason, detail in outcome.notes:
        tally.add_example(reason, f"{where}: {detail}")
    tally.truncated += outcome.truncated
    tally.too_short += outcome.too_short
    unproven = [(reason, f"{where}: {detail}") for reason, detail in outcome.unproven]
    tally.count_turns(outcome.turns, outcome.last_turns, unproven)
    tally.count_turn_kinds(outcome.kinds, outcome.file, outcome.line)
    for data, bits, name in outcome.samples:
        ids = np.frombuffer(data, "<i4")
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=len(ids), bitorder="little").view(bool)
        yield PlannedSample(ids, mask, outcome.domain, outcome.split, outcome.file, outcome.line, name)
