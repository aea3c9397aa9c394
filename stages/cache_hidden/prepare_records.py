"""Turns records of a corpus into samples: rendered, tokenised, masked, truncated, within limits of time and memory.

Records are rendered and tokenised together; where that fails, each alone, so that a template's failure costs its record
only. Chat templates are untrusted programs and a corpus is untrusted data, so a worker has limits of CPU time and
memory; the system ends one that takes more, even inside one call of C.
The planner, too, imports this module, for the job and the outcomes; only a `RecordPreparer` imports transformers.

    T tokens of a sample
"""

import contextlib
import json
import os
import resource
import signal
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.cache.samples import PlannedSample, sample_id
from pipeline.corpus.file_formats import Chunk
from pipeline.corpus.record_formats import Conversation, RejectedRecord
from pipeline.corpus.rejections import Tally, Unusable, check_ids, check_mask, trim
from pipeline.corpus.sources import chunk_records
from pipeline.errors import first_line
from pipeline.target.files import TEMPLATE_DATE

RECORD_SECONDS = 10.0  # of CPU, for the records that a worker is sent at once: a batch, or one record on its own
RECORD_BYTES = 2 << 30  # of address space, beyond what a worker started with, for these records
LIMIT_SIGNALS = (signal.SIGPROF, signal.SIGUSR1)  # what ends a worker beyond its limit: of time, of memory

Work = Chunk | Sequence[Conversation | RejectedRecord]


@dataclass(frozen=True)
class Job:
    """The settings by which workers turn records into samples: target folder, tokens a sample, vocabulary size, roles.

    template_kwargs, template_date: the chat template's arguments, and the date it gets as today's.
    model: the target's name in errors; its config is checked before any record. None: no check.
    record_seconds, record_bytes: limits for the records that a worker is sent at once.
    """

    folder: Path
    max_length: int
    vocab_size: int
    roles: dict[str, str] | None = None
    template_kwargs: dict | None = None
    template_date: str = TEMPLATE_DATE
    record_seconds: float = RECORD_SECONDS
    record_bytes: int = RECORD_BYTES
    model: str | None = None

    def too_large(self) -> tuple[str, str]:
        """Return reason and detail for a record that takes too much memory."""
        return "too large", f"takes more than {self.record_bytes / 2**30:.1f} GiB to prepare"


class RecordOutcome(NamedTuple):
    """The outcome of one record: its samples, or why it was rejected.

    samples: (ids as int32, mask as packed bits, sample id), each in bytes; kinds: of their turns. rejected, notes,
    unproven: (reason, detail). turns: how many are supervised, `last_turns` of them in the first sample. regenerated:
    which model wrote the record's replies, as JSON, without `stops`.
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


class RecordPreparer:
    """Turns records of a corpus into samples with a job's settings."""

    def __init__(self, job: Job):
        from pipeline.target.chat_template import ChatTemplate
        from pipeline.target.config import check_known
        from stages.cache_hidden.tokenise import SampleMaker

        if job.model is not None:
            check_known(job.model, job.folder)
        self.job = job
        self.maker = SampleMaker(ChatTemplate(job.folder, job.template_kwargs, job.template_date))

    def outcomes(self, work: Work) -> list[RecordOutcome]:
        """Return the outcomes of the records of a chunk or list, in order."""
        records = list(chunk_records(work, self.job.roles)) if isinstance(work, Chunk) else work
        usable = [record for record in records if isinstance(record, Conversation)]
        try:
            prepared = iter(self.maker.prepare(usable, self.job.max_length))
        except Exception:  # a template is a stranger's program, and may raise anything
            prepared = map(self._prepare_alone, usable)
        return [
            RecordOutcome(record.file, record.line, rejected=(record.reason, record.detail))
            if isinstance(record, RejectedRecord)
            else self._outcome(record, next(prepared))
            for record in records
        ]

    def _prepare_alone(self, record: Conversation):
        try:
            return self.maker.prepare([record], self.job.max_length)[0]
        except MemoryError:
            return Unusable(*self.job.too_large())
        except Exception as error:
            cause = first_line(error, 120)
            return Unusable("template error", f"the chat template fails on it ({type(error).__name__}: {cause})")

    def _outcome(self, record: Conversation, prepared) -> RecordOutcome:
        packed, kinds, notes, truncated, max_length = [], [], [], 0, self.job.max_length
        try:
            if isinstance(prepared, Unusable):
                raise prepared
            for sample in prepared.samples:
                if len(sample.ids) <= max_length:  # a truncated sample may have lost its reply
                    check_mask(sample.mask)
                check_ids(sample.ids, self.job.vocab_size)
                truncated += len(sample.ids) > max_length
                if cut := trim(sample.ids[:max_length], sample.mask[:max_length]):
                    mask_bits = np.packbits(cut[1], bitorder="little").tobytes()
                    packed.append((cut[0].astype("<i4", copy=False).tobytes(), mask_bits, sample_id(*cut)))
                    kinds += sample.kinds
        except Unusable as fault:
            rejected = fault.reason, fault.detail
            return RecordOutcome(record.file, record.line, rejected=rejected, unknown=record.unknown)
        if too_short := len(prepared.samples) - len(packed):
            notes.append(("too short", f"no two supervised tokens in a row within {max_length}"))
        regenerated = {key: value for key, value in (record.regenerated or {}).items() if key != "stops"}
        return RecordOutcome(
            *(record.file, record.line, record.domain, record.split),
            samples=tuple(packed),
            notes=tuple(notes),
            truncated=truncated,
            too_short=too_short,
            turns=prepared.turns,
            last_turns=prepared.last_turns,
            unproven=tuple(prepared.unproven),
            kinds=tuple(kinds),
            unknown=record.unknown,
            regenerated=json.dumps(regenerated, sort_keys=True) if record.regenerated else "",
        )


def samples_of(outcome: RecordOutcome, tally: Tally) -> Iterator[PlannedSample]:
    """Yield the samples of a record, and count in the tally what was left out of it; it is counted itself before."""
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
    tally.count_turns(outcome.turns, outcome.last_turns, outcome.kinds, outcome.unproven, where)
    for data, bits, name in outcome.samples:
        ids = np.frombuffer(data, "<i4")
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=len(ids), bitorder="little").view(bool)
        yield PlannedSample(ids, mask, outcome.domain, outcome.split, outcome.file, outcome.line, name)


def answer_requests(requests: Connection, preparer: RecordPreparer) -> None:
    """Answer every request, records, with their outcomes, within the job's limits, until the client is gone."""
    limit_memory(preparer.job.record_bytes)
    while True:
        try:
            work = requests.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, preparer.job.record_seconds)
        try:
            answer = preparer.outcomes(work)
        except MemoryError:
            os.kill(os.getpid(), signal.SIGUSR1)  # tells the pool that memory was the cause
        except Exception:
            answer = traceback.format_exc()  # a bug of ours
        signal.setitimer(signal.ITIMER_PROF, 0)
        requests.send(answer)


def limit_memory(max_bytes: int) -> tuple[int, int]:
    """Limit this process to `max_bytes` of address space beyond what it has (on Linux); return the limits before."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + max_bytes, before[1]))
    return before


def outcome_of_death(job: Job, work: Work, exit_code: int) -> RecordOutcome:
    """Return the outcome of a record, `work` on its own, that killed its worker."""
    file, line = (work.file, work.lines[0]) if isinstance(work, Chunk) else (work[0].file, work[0].line)
    if exit_code == -signal.SIGPROF:
        rejected = "too slow", f"takes more than {job.record_seconds:.0f} s to prepare"
    elif exit_code == -signal.SIGUSR1:
        rejected = job.too_large()
    else:
        by = f"signal {-exit_code}, {signal.strsignal(-exit_code)}" if exit_code < 0 else f"exit code {exit_code}"
        rejected = "ended its process", f"ends the process that prepares it ({by})"
    return RecordOutcome(file, line, rejected=rejected)
