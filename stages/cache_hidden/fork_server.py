"""The fork server: a process that imports once and forks the workers that prepare rows; and the workers' loop.

Forking a process that has run torch is not safe, and a newly started worker spends seconds on imports. So one process
is started, imports what rows need, reads the target's tokenizer, runs no thread, and forks workers on request. It hides
torch: tokenizers and configs do without, and importing it takes longer than everything else.
It ends when its client is gone, or has sent no request for a while. The workers' limits are in `prepare_rows.py`.
"""

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from stages.cache_hidden.prepare_rows import TEMPLATE_SECONDS, RowPreparer

IDLE_SECONDS = 60.0
# Each worker is one thread, or N workers on N cores would be N * N.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


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
