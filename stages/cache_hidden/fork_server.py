"""The process that workers are forked from, and what a worker does.

Forking a process that has run torch is not safe, and starting a worker afresh costs seconds of imports. So one process
is started, imports what rows need, reads the target's tokenizer, runs no thread, and forks workers as it is asked to.
To it torch is not there: tokenizers and configs do without, and importing it takes longer than all the rest.
It ends when whoever asked is gone, or has not asked for a while. What a worker may take is in `row_limits.py`.
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

from stages.cache_hidden.row_limits import TEMPLATE_SECONDS

IDLE_SECONDS = 60.0
# Each worker is one thread, or N workers on N cores would be N * N.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main(control: int) -> None:
    """Answer what is asked through the socket `control`, until its other end is gone.

    A job: "ready", or the error that its template ends in. "fork", with a socket behind it: the worker's process id.
    A process id: how that worker ended, as `os.waitpid` has it.
    """
    _die_with(os.getppid())
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.modules["torch"] = None  # as Python has it: an import of it finds nothing
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # such as that it found none
    from pipeline.target.config import check_known
    from stages.cache_hidden.prepare_rows import Preparer

    def checked(job) -> Preparer:
        if job.model is not None:
            check_known(job.model, job.folder)
        return Preparer(job)

    asked, preparer, workers = socket.socket(fileno=control), None, 0
    # Whoever asks may leave between a question and its answer, too, as with Ctrl-C.
    with contextlib.suppress(EOFError, ConnectionError), Connection(os.dup(control)) as answers:
        while answers.poll(None if workers else IDLE_SECONDS):
            wanted = answers.recv()
            if isinstance(wanted, int):
                answers.send(os.waitpid(wanted, 0)[1])
                workers -= 1
            elif wanted == "fork":
                _, (socket_of_worker,), _, _ = socket.recv_fds(asked, 1, 1)
                answers.send(_forked(socket_of_worker, preparer, (asked.fileno(), answers.fileno())))
                os.close(socket_of_worker)
                workers += 1
            else:
                preparer, said = _made(checked, wanted)
                answers.send(said)


def _made(make: Callable, job: object) -> tuple:
    signal.setitimer(signal.ITIMER_PROF, TEMPLATE_SECONDS)  # a template's constants are computed as it is compiled
    limits = _limit_memory(job.row_bytes)
    try:
        preparer = make(job)
        gc.collect()
        gc.freeze()  # else a worker's first collection copies everything that it shares with us
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


def _forked(socket_of_worker: int, preparer, others: tuple[int, ...]) -> int:
    here = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _die_with(here)
        for other in others:
            os.close(other)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a dying allocator says is no row's
        _work(Connection(socket_of_worker), preparer)
    finally:
        os._exit(1)  # whatever happened: nothing of the nursery is this process's to clean up


def _work(asked: Connection, preparer) -> None:
    """Answer every (rows, which of them) with what they come to, until nobody asks."""
    job = preparer.job
    _limit_memory(job.row_bytes)
    while True:
        try:
            work, only = asked.recv()
        except EOFError:
            os._exit(0)
        signal.setitimer(signal.ITIMER_PROF, job.row_seconds)
        try:
            answer = preparer.outcomes(work, only)
        except MemoryError:
            os.kill(os.getpid(), signal.SIGUSR1)  # as if the system had refused it
        except Exception:
            answer = traceback.format_exc()  # a bug of ours
        signal.setitimer(signal.ITIMER_PROF, 0)
        asked.send(answer)


def _limit_memory(most: int | None, limits: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Let this process take `most` bytes more than it has, where that can be told; or put back `limits`.

    Returns those there were.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        before = resource.getrlimit(resource.RLIMIT_AS)
        if most is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits = pages * os.sysconf("SC_PAGE_SIZE") + most, before[1]
        if limits:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        return before
    return None


def _die_with(parent: int) -> None:
    """End this process when its parent ends, however that is; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
