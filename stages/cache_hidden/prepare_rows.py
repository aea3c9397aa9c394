"""Turns corpus rows into samples: rendered, tokenised, masked, truncated; and the processes in which that happens.

Rows are rendered and tokenised together; where that fails, each alone, so that a template's failure costs its row only.
Chat templates are untrusted programs and a corpus is untrusted data, so a worker has limits of CPU time and memory; the
system ends one that takes more, even inside one call of C.
Forking a process that has run torch is not safe, and a newly started worker spends seconds on imports. So a fork server
is started (`main`): it imports what rows need, reads the target's tokenizer, runs no thread, and forks workers on
request. It hides torch: tokenizers and configs do without, and importing it takes longer than everything else. It ends
when its client is gone, or has sent no request for a while.
The planner, too, imports this module, for the job and the outcomes; only a `RowPreparer` imports transformers.

    T tokens of a sample
"""

import contextlib
import ctypes
import gc
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.cache.samples import PlannedSample, sample_id
from pipeline.corpus.file_formats import Chunk
from pipeline.corpus.record_formats import Conversation, RejectedRow
from pipeline.corpus.rejections import Tally, Unusable, check_ids, check_mask, trim
from pipeline.corpus.sources import chunk_rows
from pipeline.errors import first_line
from pipeline.target.files import TEMPLATE_DATE

ROW_SECONDS = 10.0  # of CPU, for the rows that a worker is sent at once: a batch, or one row on its own
ROW_BYTES = 2 << 30  # of address space, beyond what a worker started with, for these rows
TEMPLATE_SECONDS = 120.0  # of CPU, to read a tokenizer and compile a chat template, constants and all
IDLE_SECONDS = 60.0
# Each worker is one thread, or N workers on N cores would be N * N.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Job:
    """The settings by which workers turn rows into samples: target folder, tokens a sample, vocabulary size, roles.

    template_kwargs, template_date: the chat template's arguments, and the date it gets as today's.
    model: the target's name in errors; its config is checked before any row. None: no check.
    row_seconds, row_bytes: limits for the rows that a worker is sent at once.
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


class RowPreparer:
    """Turns corpus rows into samples with a job's settings."""

    def __init__(self, job: Job):
        from pipeline.target.chat_template import ChatTemplate
        from stages.cache_hidden.tokenise import SampleMaker

        self.job = job
        self.maker = SampleMaker(ChatTemplate(job.folder, job.template_kwargs, job.template_date))

    def outcomes(self, work: Chunk | Sequence[Conversation | RejectedRow], only: int | None = None) -> list[RowOutcome]:
        """Return the outcomes of the rows of a chunk or list, in order; `only`: of the row with this number alone."""
        if isinstance(work, Chunk) and only is not None:
            work = work.single_row(only)
        rows = list(chunk_rows(work, self.job.roles)) if isinstance(work, Chunk) else work
        if only is not None and not isinstance(work, Chunk):
            rows = [work[only]]
        usable = [row for row in rows if isinstance(row, Conversation)]
        prepared = iter(self._prepared(usable))
        return [self._outcome(row, next(prepared) if isinstance(row, Conversation) else None) for row in rows]

    def _prepared(self, rows: list[Conversation]) -> list:
        try:
            return self.maker.prepare(rows, self.job.max_length) if rows else []
        except Exception:  # a template is a stranger's program, and may raise anything
            return [self._alone(row) for row in rows]

    def _alone(self, row: Conversation):
        try:
            return self.maker.prepare([row], self.job.max_length)[0]
        except MemoryError:
            return Unusable("too large", f"takes more than {self.job.row_bytes / 2**30:.1f} GiB to prepare")
        except Exception as error:
            cause = first_line(error, 120)
            return Unusable("template error", f"the chat template fails on it ({type(error).__name__}: {cause})")

    def _outcome(self, row: Conversation | RejectedRow, prepared) -> RowOutcome:
        if isinstance(row, RejectedRow):
            return RowOutcome(row.file, row.line, rejected=(row.reason, row.detail))
        if isinstance(prepared, Unusable):
            return RowOutcome(row.file, row.line, rejected=(prepared.reason, prepared.detail), unknown=row.unknown)
        packed, kinds, notes, truncated, too_short = [], [], [], 0, 0
        try:
            for sample in prepared.samples:
                if len(sample.ids) <= self.job.max_length:  # a truncated sample may have lost its reply
                    check_mask(sample.mask)
                check_ids(sample.ids, self.job.vocab_size)
                truncated += len(sample.ids) > self.job.max_length
                cut = trim(sample.ids[: self.job.max_length], sample.mask[: self.job.max_length])
                if cut is None:
                    too_short += 1
                    continue
                mask_bits = np.packbits(cut[1], bitorder="little").tobytes()
                packed.append((cut[0].astype("<i4", copy=False).tobytes(), mask_bits, sample_id(*cut)))
                kinds += sample.kinds
        except Unusable as rejected:
            return RowOutcome(row.file, row.line, rejected=(rejected.reason, rejected.detail), unknown=row.unknown)
        if too_short:
            notes.append(("too short", f"no two supervised tokens in a row within {self.job.max_length}"))
        return RowOutcome(
            *(row.file, row.line, row.domain, row.split),
            samples=tuple(packed),
            notes=tuple(notes),
            truncated=truncated,
            too_short=too_short,
            turns=prepared.turns,
            last_turns=prepared.last_turns,
            unproven=tuple(prepared.unproven),
            kinds=tuple(kinds),
            unknown=row.unknown,
            regenerated=_record(row),
        )


def _record(row: Conversation) -> str:
    record = {key: value for key, value in (row.regenerated or {}).items() if key != "stops"}
    return json.dumps(record, sort_keys=True) if row.regenerated else ""


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


def main(control: int) -> None:
    """Answer requests on the socket with file descriptor `control`, until its other end is gone.

    Requests and answers: a Job -> "ready", or the exception that loading its template raised; "fork", followed by the
    worker's socket -> the worker's process id; a process id -> that worker's wait status, as of `os.waitpid`.
    """
    _die_with_parent(os.getppid())
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.modules["torch"] = None  # importing it raises ImportError
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # such as the one about a missing torch
    import stages.cache_hidden.tokenise  # noqa: F401  brings transformers, while no limit of time runs
    from pipeline.target.config import check_known

    def make_checked(job) -> RowPreparer:
        if job.model is not None:
            check_known(job.model, job.folder)
        return RowPreparer(job)

    requests, preparer, workers = socket.socket(fileno=control), None, 0
    # The client may leave between a request and its answer, as with Ctrl-C.
    with contextlib.suppress(EOFError, ConnectionError), Connection(os.dup(control)) as connection:
        while connection.poll(None if workers else IDLE_SECONDS):
            request = connection.recv()
            if isinstance(request, int):
                connection.send(os.waitpid(request, 0)[1])
                workers -= 1
            elif request == "fork":
                _, (socket_of_worker,), _, _ = socket.recv_fds(requests, 1, 1)
                connection.send(_fork_worker(socket_of_worker, preparer, (requests.fileno(), connection.fileno())))
                os.close(socket_of_worker)
                workers += 1
            else:
                preparer, answer = _make_preparer(make_checked, request)
                connection.send(answer)


def _make_preparer(make: Callable, job: object) -> tuple:
    """Return (preparer, "ready") for a job, or (None, the exception) where `make` fails, within the limits of CPU."""
    signal.setitimer(signal.ITIMER_PROF, TEMPLATE_SECONDS)  # a template's constants are computed as it is compiled
    limits = _limit_memory(job.row_bytes)
    try:
        preparer = make(job)
        gc.collect()
        gc.freeze()  # else a worker's first collection writes to, and so copies, every page that it shares with us
        return preparer, "ready"
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
            return None, error
        except Exception:
            return None, RuntimeError(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _limit_memory(None, limits)


def _fork_worker(socket_of_worker: int, preparer, inherited: tuple[int, ...]) -> int:
    here = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _die_with_parent(here)
        for fd in inherited:
            os.close(fd)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides the last words of an allocator out of memory
        _serve_rows(Connection(socket_of_worker), preparer)
    finally:
        os._exit(1)  # whatever happened: this process must not clean up anything of the fork server's


def _serve_rows(requests: Connection, preparer) -> None:
    """Answer every request (rows, number of one of them or None) with the rows' outcomes, until the client is gone."""
    job = preparer.job
    _limit_memory(job.row_bytes)
    while True:
        try:
            work, only = requests.recv()
        except EOFError:
            os._exit(0)
        signal.setitimer(signal.ITIMER_PROF, job.row_seconds)
        try:
            answer = preparer.outcomes(work, only)
        except MemoryError:
            os.kill(os.getpid(), signal.SIGUSR1)  # tells the pool that memory was the cause
        except Exception:
            answer = traceback.format_exc()  # a bug of ours
        signal.setitimer(signal.ITIMER_PROF, 0)
        requests.send(answer)


def _limit_memory(max_bytes: int | None, limits: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Limit this process to `max_bytes` of address space beyond what it has (on Linux), or restore `limits`.

    Returns the limits before, None where there is no such limit.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        before = resource.getrlimit(resource.RLIMIT_AS)
        if max_bytes is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits = pages * os.sysconf("SC_PAGE_SIZE") + max_bytes, before[1]
        if limits:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        return before
    return None


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
