"""A pool of worker processes, one a core, that prepare the rows of a corpus; outcomes come in the corpus's order.

When a worker dies, its rows are sent again one by one to find the one that killed it, which is rejected while the
others go on. Rows in flight are bounded in bytes.
"""

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from pipeline.corpus.file_formats import Chunk
from pipeline.corpus.record_formats import Conversation, RejectedRow
from pipeline.corpus.rejections import REFUSED_SHARE
from pipeline.errors import DataError, RoomError, UsageError
from stages.cache_hidden.prepare_rows import ONE_THREAD, TEMPLATE_SECONDS, Job, RowOutcome

IN_FLIGHT = 32 << 20  # bytes of rows that are with workers, or done but behind one that is not
MAX_DEATHS = 16  # rows that killed a worker; more of them, if also more than REFUSED_SHARE of the rows, end planning
KILLED_MESSAGE = (
    "the process that prepares rows was killed, as a system does when memory runs out; free some, and run the same "
    "command again"
)
ROOT = Path(__file__).resolve().parents[2]

Work = Chunk | Sequence[Conversation | RejectedRow]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(eq=False)
class _Task:
    """Rows in flight: waiting, with a worker, or done (`outcomes`). `only`: the number of a single row of `work`."""

    work: Work
    only: int | None = None
    outcomes: list | None = None
    assigned: bool = False
    retried: bool = False  # a worker died over this row before, perhaps for another reason

    @property
    def rows(self) -> int:
        return 1 if self.only is not None else len(self.work.lines if isinstance(self.work, Chunk) else self.work)

    @property
    def size(self) -> int:
        return self.work.size if isinstance(self.work, Chunk) else 2048 * len(self.work)


@dataclass(eq=False)
class _Worker:
    pid: int
    connection: Connection
    task: _Task | None = None


class _ForkServer:
    """The client's end of the fork server, see `prepare_rows.main`."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = f"from stages.cache_hidden.prepare_rows import main; main({theirs.fileno()})"
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for us only; we end the others
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", command],
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
                    stdin=subprocess.DEVNULL,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.socket, self.connection = ours, Connection(os.dup(ours.fileno()))

    def ask(self, request: object) -> object:
        self.connection.send(request)
        return self.connection.recv()

    def fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            self.connection.send("fork")
            socket.send_fds(self.socket, [b"."], [theirs.fileno()])
            return _Worker(self.connection.recv(), Connection(ours.detach()))

    def close(self) -> None:
        self.connection.close()
        self.socket.close()
        self.process.wait()


_idle: list[tuple[int, _ForkServer]] = []  # (our process id, server), for the next plan; each ends after some idle time


def start_fork_server() -> None:
    """Start a fork server in advance, unless one is idle, so that its imports run while this process works on."""
    if all(owner != os.getpid() for owner, _ in _idle):
        _idle.append((os.getpid(), _ForkServer()))


def _fork_server_for(job: Job) -> _ForkServer:
    """Return a fork server that has loaded the job's tokenizer and template. Raises the error of loading them."""
    while _idle:
        owner, fork_server = _idle.pop()
        try:
            answer = fork_server.ask(job) if owner == os.getpid() else None
        except (EOFError, OSError):  # it has ended since
            fork_server.close()
            continue
        if answer is not None:
            return _ready_or_raise(fork_server, answer)
    fork_server = _ForkServer()
    try:
        answer = fork_server.ask(job)
    except (EOFError, OSError) as error:
        fork_server.close()
        if fork_server.process.returncode == -signal.SIGPROF:
            raise UsageError(
                f"{job.folder}: its tokenizer and chat template take more than {TEMPLATE_SECONDS:.0f} s to be read; "
                "fetch the target's files again"
            ) from error
        raise RoomError(KILLED_MESSAGE) from error
    return _ready_or_raise(fork_server, answer)


def _ready_or_raise(fork_server: _ForkServer, answer: object) -> _ForkServer:
    if isinstance(answer, Exception):
        _idle.append((os.getpid(), fork_server))
        raise answer
    return fork_server


@atexit.register
def _close_idle() -> None:
    for owner, fork_server in _idle:
        if owner == os.getpid():
            fork_server.process.kill()
            fork_server.close()


@dataclass
class WorkerPool:
    """Workers for one job. A context manager: leaving it kills them, busy or not."""

    job: Job
    max_workers: int = field(default_factory=cores)  # only as many are started as there is work for

    def __post_init__(self):
        self.fork_server = _fork_server_for(self.job)
        self.workers: list[_Worker] = []
        self.tasks: list[_Task] = []  # in the corpus's order, done or not
        self.yielded, self.deaths = 0, 0  # rows yielded; rows that killed a worker

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            worker.connection.close()
        if kind is not None and not issubclass(kind, Exception):  # Ctrl-C, perhaps between a request and its answer
            self.fork_server.process.kill()
        try:
            for worker in self.workers:
                self.fork_server.ask(worker.pid)
            _idle.append((os.getpid(), self.fork_server))
        except (EOFError, OSError):  # the fork server is gone, and its workers with it
            self.fork_server.close()
        self.workers = []

    def outcomes(self, work: Iterable[Work]) -> Iterator[RowOutcome]:
        """Yield the rows' outcomes in order. DataError when too many rows kill their worker."""
        source, more = iter(work), True
        while more or self.tasks:
            while more and sum(task.size for task in self.tasks) < IN_FLIGHT and self._has_free_worker():
                piece = next(source, None)
                more = piece is not None
                if more:
                    self.tasks.append(_Task(piece))
                    self._assign()
            while self.tasks and self.tasks[0].outcomes is not None:
                task = self.tasks.pop(0)
                self.yielded += task.rows
                yield from task.outcomes
            self._assign()
            if any(worker.task for worker in self.workers):
                self._collect()

    def _has_free_worker(self) -> bool:
        return len(self.workers) < self.max_workers or any(worker.task is None for worker in self.workers)

    def _assign(self) -> None:
        """Send waiting tasks to free workers, starting further workers where none is free."""
        for task in [task for task in self.tasks if not task.assigned]:
            free = next((worker for worker in self.workers if worker.task is None), None)
            if free is None and len(self.workers) < self.max_workers:
                free = self._call_server(self.fork_server.fork)
                self.workers.append(free)
            if free is None:
                return
            free.task, task.assigned = task, True
            try:
                free.connection.send((task.work, task.only))
            except OSError:
                self._handle_death(free)

    def _collect(self) -> None:
        """Wait until a worker has finished its task, and store the outcomes."""
        ready = wait([worker.connection for worker in self.workers if worker.task])
        for worker in [worker for worker in self.workers if worker.connection in ready]:
            try:
                outcomes = worker.connection.recv()
            except (EOFError, OSError):
                self._handle_death(worker)
                continue
            if isinstance(outcomes, str):
                raise RuntimeError(outcomes)
            worker.task.outcomes, worker.task = outcomes, None

    def _handle_death(self, worker: _Worker) -> None:
        """Split the task of a dead worker into single rows; a single row is retried once, then rejected."""
        self.workers.remove(worker)
        worker.connection.close()
        task, ended = worker.task, self._call_server(lambda: self.fork_server.ask(worker.pid))
        if task.rows > 1:
            at = self.tasks.index(task)
            self.tasks[at : at + 1] = [_Task(task.work, only) for only in range(task.rows)]
            return
        by_its_limits = os.WIFSIGNALED(ended) and os.WTERMSIG(ended) in (signal.SIGPROF, signal.SIGUSR1)
        if not task.retried and not by_its_limits:  # another process may have killed it
            task.retried, task.assigned = True, False
            return
        self.deaths += 1
        task.outcomes = [_outcome_of_death(self.job, task, ended)]
        if self.deaths > MAX_DEATHS and self.deaths > REFUSED_SHARE * (self.yielded + len(self.tasks)):
            last = task.outcomes[0]
            raise DataError(
                f"{self.deaths} of the first {self.yielded + len(self.tasks)} rows cannot be prepared, such as "
                f"{last.file}:{last.line} ({last.rejected[1]}); look at the target's chat template, or leave them out"
            )

    def _call_server(self, call: Callable[[], object]):
        try:
            return call()
        except (EOFError, OSError) as error:
            raise RoomError(KILLED_MESSAGE) from error


def _outcome_of_death(job: Job, task: _Task, status: int) -> RowOutcome:
    """Return the outcome of a row that killed its worker; `status` is the worker's, as of `os.waitpid`."""
    row = task.only or 0
    if isinstance(task.work, Chunk):
        file, line = task.work.file, task.work.lines[row]
    else:
        file, line = task.work[row].file, task.work[row].line
    code = -os.waitstatus_to_exitcode(status)
    if code == signal.SIGPROF:
        rejected = "too slow", f"takes more than {job.row_seconds:.0f} s to prepare"
    elif code == signal.SIGUSR1:
        rejected = "too large", f"takes more than {job.row_bytes / 2**30:.1f} GiB to prepare"
    else:
        how = f"signal {code}, {signal.strsignal(code)}" if code > 0 else f"exit code {-code}"
        rejected = "ended its process", f"ends the process that prepares it ({how})"
    return RowOutcome(file, line, rejected=rejected)
