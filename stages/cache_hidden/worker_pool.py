"""Workers that prepare the rows of a corpus, as many as there are cores, and what they made, in the corpus's order.

A worker that ends over some rows is given them again one by one, so that the row to blame is known: it is a fault, and
the others go on. Rows in flight are bounded in bytes.
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

from pipeline.corpus.conversation import Conversation, Fault
from pipeline.corpus.formats import Chunk
from pipeline.corpus.tally import REFUSED_SHARE
from pipeline.errors import DataError, RoomError, UsageError
from stages.cache_hidden.fork_server import ONE_THREAD
from stages.cache_hidden.row_limits import TEMPLATE_SECONDS
from stages.cache_hidden.row_outcome import Job, Outcome

IN_FLIGHT = 32 << 20  # bytes of rows that are with workers, or done before their turn
DEATHS = 16  # rows that ended a worker; beyond, and in more than REFUSED_SHARE of the rows, planning ends
KILLED = (
    "the process that prepares rows was killed, as a system does when memory runs out; free some, and run the same "
    "command again"
)
ROOT = Path(__file__).resolve().parents[2]

Work = Chunk | Sequence[Conversation | Fault]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(eq=False)
class _Task:
    """Some rows on their way: with a worker, or done (`made`), or to be done. `only`: the one row meant, of `work`."""

    work: Work
    only: int | None = None
    made: list | None = None
    given: bool = False
    again: bool = False  # it ended a worker before, for a reason that need not be its own

    @property
    def rows(self) -> int:
        return 1 if self.only is not None else len(self.work.lines if isinstance(self.work, Chunk) else self.work)

    @property
    def size(self) -> int:
        return self.work.size if isinstance(self.work, Chunk) else 2048 * len(self.work)


@dataclass(eq=False)
class _Worker:
    pid: int
    asked: Connection
    task: _Task | None = None


class _Nursery:
    """The process that workers are forked from; see `fork_server.py`."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = f"from stages.cache_hidden.fork_server import main; main({theirs.fileno()})"
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is ours alone, who end the others
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

    def ask(self, what: object) -> object:
        self.connection.send(what)
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


_idle: list[tuple[int, _Nursery]] = []  # kept for the next plan of a process, by its id; each ends by itself in time


def prepare() -> None:
    """Start the process that workers are forked from, to import while other things are seen to, unless one waits."""
    if all(of != os.getpid() for of, _ in _idle):
        _idle.append((os.getpid(), _Nursery()))


def _nursery_for(job: Job) -> _Nursery:
    """Return a nursery that has made what the job needs. Raises the error which that ended in."""
    while _idle:
        of, nursery = _idle.pop()
        try:
            said = nursery.ask(job) if of == os.getpid() else None
        except (EOFError, OSError):  # it has ended since
            nursery.close()
            continue
        if said is not None:
            return _answered(nursery, said)
    nursery = _Nursery()
    try:
        said = nursery.ask(job)
    except (EOFError, OSError) as error:
        nursery.close()
        if nursery.process.returncode == -signal.SIGPROF:
            raise UsageError(
                f"{job.folder}: its tokenizer and chat template take more than {TEMPLATE_SECONDS:.0f} s to be read; "
                "fetch the target's files again"
            ) from error
        raise RoomError(KILLED) from error
    return _answered(nursery, said)


def _answered(nursery: _Nursery, said: object) -> _Nursery:
    if isinstance(said, Exception):
        _idle.append((os.getpid(), nursery))
        raise said
    return nursery


@atexit.register
def _close_idle() -> None:
    for of, nursery in _idle:
        if of == os.getpid():
            nursery.process.kill()
            nursery.close()


@dataclass
class Pool:
    """Workers for one job. To be closed: they are killed then, whatever they are at."""

    job: Job
    most: int = field(default_factory=cores)  # workers; only as many are started as there is work for

    def __post_init__(self):
        self.nursery = _nursery_for(self.job)
        self.workers: list[_Worker] = []
        self.tasks: list[_Task] = []  # in the corpus's order, done or not
        self.seen, self.deaths = 0, 0  # rows handed on; rows that ended a worker

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            worker.asked.close()
        if kind is not None and not issubclass(kind, Exception):  # Ctrl-C, perhaps between a question and its answer
            self.nursery.process.kill()
        try:
            for worker in self.workers:
                self.nursery.ask(worker.pid)
            _idle.append((os.getpid(), self.nursery))
        except (EOFError, OSError):  # the nursery is gone, and its workers with it
            self.nursery.close()
        self.workers = []

    def outcomes(self, work: Iterable[Work]) -> Iterator[Outcome]:
        """Yield what the rows come to, in order. DataError when rows end workers all along."""
        source, more = iter(work), True
        while more or self.tasks:
            while more and sum(task.size for task in self.tasks) < IN_FLIGHT and self._is_free():
                piece = next(source, None)
                more = piece is not None
                if more:
                    self.tasks.append(_Task(piece))
                    self._give()
            while self.tasks and self.tasks[0].made is not None:
                task = self.tasks.pop(0)
                self.seen += task.rows
                yield from task.made
            self._give()
            if any(worker.task for worker in self.workers):
                self._take()

    def _is_free(self) -> bool:
        return len(self.workers) < self.most or any(worker.task is None for worker in self.workers)

    def _give(self) -> None:
        """Give what waits to whoever is free, starting another worker where nobody is."""
        for task in [task for task in self.tasks if not task.given]:
            free = next((worker for worker in self.workers if worker.task is None), None)
            if free is None and len(self.workers) < self.most:
                free = self._asked(self.nursery.fork)
                self.workers.append(free)
            if free is None:
                return
            free.task, task.given = task, True
            try:
                free.asked.send((task.work, task.only))
            except OSError:
                self._died(free)

    def _take(self) -> None:
        """Wait for a worker, and take what it made."""
        ready = wait([worker.asked for worker in self.workers if worker.task])
        for worker in [worker for worker in self.workers if worker.asked in ready]:
            try:
                made = worker.asked.recv()
            except (EOFError, OSError):
                self._died(worker)
                continue
            if isinstance(made, str):
                raise RuntimeError(made)
            worker.task.made, worker.task = made, None

    def _died(self, worker: _Worker) -> None:
        """Give the rows over which a worker ended again, one by one, or name the one it was."""
        self.workers.remove(worker)
        worker.asked.close()
        task, ended = worker.task, self._asked(lambda: self.nursery.ask(worker.pid))
        if task.rows > 1:
            at = self.tasks.index(task)
            self.tasks[at : at + 1] = [_Task(task.work, only) for only in range(task.rows)]
            return
        of_itself = os.WIFSIGNALED(ended) and os.WTERMSIG(ended) in (signal.SIGPROF, signal.SIGUSR1)
        if not task.again and not of_itself:  # somebody else may have ended it
            task.again, task.given = True, False
            return
        self.deaths += 1
        task.made = [_ended(self.job, task, ended)]
        if self.deaths > DEATHS and self.deaths > REFUSED_SHARE * (self.seen + len(self.tasks)):
            last = task.made[0]
            raise DataError(
                f"{self.deaths} of the first {self.seen + len(self.tasks)} rows cannot be prepared, such as "
                f"{last.file}:{last.line} ({last.fault[1]}); look at the target's chat template, or leave them out"
            )

    def _asked(self, question: Callable[[], object]):
        try:
            return question()
        except (EOFError, OSError) as error:
            raise RoomError(KILLED) from error


def _ended(job: Job, task: _Task, status: int) -> Outcome:
    """Return the outcome of the row over which a worker ended, `status` as `os.waitpid` has it."""
    row = task.only or 0
    if isinstance(task.work, Chunk):
        file, line = task.work.file, task.work.lines[row]
    else:
        file, line = task.work[row].file, task.work[row].line
    code = -os.waitstatus_to_exitcode(status)
    if code == signal.SIGPROF:
        fault = "too slow", f"takes more than {job.row_seconds:.0f} s to prepare"
    elif code == signal.SIGUSR1:
        fault = "too large", f"takes more than {job.row_bytes / 2**30:.1f} GiB to prepare"
    else:
        how = f"signal {code}, {signal.strsignal(code)}" if code > 0 else f"exit code {-code}"
        fault = "ended its process", f"ends the process that prepares it ({how})"
    return Outcome(file, line, fault=fault)
