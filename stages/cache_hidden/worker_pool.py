"""A pool of worker processes, one a core, that prepare the records of a corpus; outcomes come in the corpus's order.

When a worker dies, its records are sent again one by one to find the one that killed it, which is rejected while the
others go on. Records in flight are bounded in bytes.
Forking a process that has run torch is not safe, and a newly started worker spends seconds on imports. So a fork server
is started (`main`): it imports what records need, reads the target's tokenizer, runs no thread, and forks workers on
request. It hides torch: tokenizers and configs do without, and importing it takes longer than everything else. It ends
when its client is gone, or has sent no request for a while.
"""

import atexit
import contextlib
import ctypes
import gc
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from pipeline.corpus.file_formats import Chunk
from pipeline.corpus.rejections import REFUSED_SHARE
from pipeline.errors import DataError, RoomError, UsageError
from stages.cache_hidden.prepare_records import (
    LIMIT_SIGNALS,
    Job,
    RecordOutcome,
    RecordPreparer,
    Work,
    answer_requests,
    limit_memory,
    outcome_of_death,
)

IN_FLIGHT = 32 << 20  # bytes of records that are with workers, or done but behind one that is not
MAX_DEATHS = 16  # records that killed a worker; more, if also more than REFUSED_SHARE of the records, end planning
TEMPLATE_SECONDS = 120.0  # of CPU, to read a tokenizer and compile a chat template, constants and all
IDLE_SECONDS = 60.0
# Each worker is one thread, or N workers on N cores would be N * N.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)
ROOT = Path(__file__).resolve().parents[2]
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(eq=False)
class _Task:
    """Records in flight: waiting, with a worker, or done (`outcomes`)."""

    work: Work
    outcomes: list[RecordOutcome] | None = None
    assigned: bool = False
    retried: bool = False  # a worker died over this one record before, perhaps for another reason

    @property
    def size(self) -> int:
        return self.work.size if isinstance(self.work, Chunk) else 2048 * len(self.work)

    def split(self) -> "list[_Task]":
        """Return a task for each record."""
        if isinstance(self.work, Chunk):
            return [_Task(self.work.single_record(at)) for at in range(len(self.work))]
        return [_Task([record]) for record in self.work]


@dataclass(eq=False)
class _Worker:
    pid: int
    connection: Connection
    task: _Task | None = None


class WorkerPool:
    """Workers for one job, one a core by default. A context manager: leaving it kills them, busy or not."""

    def __init__(self, job: Job, max_workers: int | None = None):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.job, self.max_workers = job, max_workers or cores  # only as many are started as there is work for
        self.fork_server = _fork_server_for(job)
        self.workers: list[_Worker] = []
        self.tasks: list[_Task] = []  # in the corpus's order, done or not
        self.yielded, self.deaths = 0, 0  # records yielded; records that killed a worker

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
            _idle.append(self.fork_server)
        except RoomError:  # the fork server is gone, and its workers with it
            self.fork_server.close()
        self.workers = []

    def outcomes(self, work: Iterable[Work]) -> Iterator[RecordOutcome]:
        """Yield the records' outcomes in order. DataError when too many records kill their worker."""
        source, more = iter(work), True
        while more or self.tasks:
            while more and sum(task.size for task in self.tasks) < IN_FLIGHT and self._has_free_worker():
                piece = next(source, None)
                more = piece is not None
                if more:
                    self.tasks.append(_Task(piece))
                    self._assign()
            while self.tasks and self.tasks[0].outcomes is not None:
                outcomes = self.tasks.pop(0).outcomes
                self.yielded += len(outcomes)
                yield from outcomes
            self._assign()
            if any(worker.task for worker in self.workers):
                self._collect()

    def _has_free_worker(self) -> bool:
        return len(self.workers) < self.max_workers or any(worker.task is None for worker in self.workers)

    def _assign(self) -> None:
        """Send waiting tasks to free workers, starting further workers where none is free."""
        for task in [task for task in self.tasks if not task.assigned]:
            if not self._has_free_worker():
                return
            free = next((worker for worker in self.workers if worker.task is None), None)
            if free is None:
                free = self.fork_server.fork()
                self.workers.append(free)
            free.task, task.assigned = task, True
            try:
                free.connection.send(task.work)
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
        """Split the task of a dead worker into single records; a single record is retried once, then rejected."""
        self.workers.remove(worker)
        worker.connection.close()
        task, exit_code = worker.task, self.fork_server.ask(worker.pid)
        if len(task.work) > 1:
            at = self.tasks.index(task)
            self.tasks[at : at + 1] = task.split()
            return
        if not task.retried and -exit_code not in LIMIT_SIGNALS:  # another process may have killed it
            task.retried, task.assigned = True, False
            return
        self.deaths += 1
        last = outcome_of_death(self.job, task.work, exit_code)
        task.outcomes = [last]
        if self.deaths > MAX_DEATHS and self.deaths > REFUSED_SHARE * (self.yielded + len(self.tasks)):
            raise DataError(
                f"{self.deaths} of the first {self.yielded + len(self.tasks)} rows cannot be prepared, such as "
                f"{last.file}:{last.line} ({last.rejected[1]}); look at the target's chat template, or leave them out"
            )


class _ForkServer:
    """The client's end of the fork server, see `main`."""

    def __init__(self):
        self.owner = os.getpid()
        ours, theirs = socket.socketpair()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = f"from stages.cache_hidden.worker_pool import main; main({theirs.fileno()})"
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

    def ask(self, request: object, *sent_fds: int) -> object:
        """Return the answer to a request. Raises RoomError when the server is gone."""
        try:
            self.connection.send(request)
            if sent_fds:
                socket.send_fds(self.socket, [b"."], sent_fds)
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise RoomError(
                "the process that prepares rows was killed, as a system does when memory runs out; free some, and run "
                "the same command again"
            ) from error

    def fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            return _Worker(self.ask("fork", theirs.fileno()), Connection(ours.detach()))

    def close(self) -> None:
        self.connection.close()
        self.socket.close()
        self.process.wait()


_idle: list[_ForkServer] = []  # for the next plan; each ends after some idle time


def start_fork_server() -> None:
    """Start a fork server in advance, unless one is idle, so that its imports run while this process works on."""
    if all(fork_server.owner != os.getpid() for fork_server in _idle):
        _idle.append(_ForkServer())


def _fork_server_for(job: Job) -> _ForkServer:
    """Return a fork server that has loaded the job's tokenizer and template. Raises the error of loading them."""
    while True:
        was_idle = bool(_idle)
        fork_server = _idle.pop() if was_idle else _ForkServer()
        if fork_server.owner != os.getpid():  # of the process that we were forked from
            continue
        try:
            answer = fork_server.ask(job)
        except RoomError as error:
            fork_server.close()
            if was_idle:  # it has ended since
                continue
            if fork_server.process.returncode == -signal.SIGPROF:
                raise UsageError(
                    f"{job.folder}: its tokenizer and chat template take more than {TEMPLATE_SECONDS:.0f} s to be "
                    "read; fetch the target's files again"
                ) from error
            raise
        if isinstance(answer, Exception):
            _idle.append(fork_server)
            raise answer
        return fork_server


@atexit.register
def _close_idle() -> None:
    for fork_server in _idle:
        if fork_server.owner == os.getpid():
            fork_server.process.kill()
            fork_server.close()


def main(control: int) -> None:
    """Run the fork server: answer requests on the socket with this file descriptor, until its other end is gone.

    Requests and answers: a Job -> "ready", or the exception that loading its template raised; "fork", followed by the
    worker's socket -> the worker's process id; a process id -> that worker's exit code.
    """
    _die_with_parent(os.getppid())
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.modules["torch"] = None  # importing it raises ImportError
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # such as the one about a missing torch
    import pipeline.target.config  # noqa: F401
    import stages.cache_hidden.tokenise  # noqa: F401  both bring transformers, while no limit of time runs

    requests, preparer, workers = socket.socket(fileno=control), None, 0
    # The client may leave between a request and its answer, as with Ctrl-C.
    with contextlib.suppress(EOFError, ConnectionError), Connection(os.dup(control)) as connection:
        while connection.poll(None if workers else IDLE_SECONDS):
            request = connection.recv()
            if isinstance(request, int):
                connection.send(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]))
                workers -= 1
            elif request == "fork":
                _, (socket_of_worker,), _, _ = socket.recv_fds(requests, 1, 1)
                connection.send(_fork_worker(socket_of_worker, preparer, (requests.fileno(), connection.fileno())))
                os.close(socket_of_worker)
                workers += 1
            else:
                preparer, answer = _make_preparer(request)
                connection.send(answer)


def _make_preparer(job: Job) -> tuple[RecordPreparer | None, str | Exception]:
    """Return (preparer, "ready"), or (None, the exception) where it cannot be made; within limits, too."""
    signal.setitimer(signal.ITIMER_PROF, TEMPLATE_SECONDS)  # a template's constants are computed as it is compiled
    before = limit_memory(job.record_bytes)
    try:
        preparer = RecordPreparer(job)
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
        resource.setrlimit(resource.RLIMIT_AS, before)


def _fork_worker(socket_of_worker: int, preparer: RecordPreparer, inherited: tuple[int, ...]) -> int:
    here = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _die_with_parent(here)
        for fd in inherited:
            os.close(fd)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides the last words of an allocator out of memory
        answer_requests(Connection(socket_of_worker), preparer)
    finally:
        os._exit(1)  # whatever happened: this process must not clean up anything of the fork server's


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
