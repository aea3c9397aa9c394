"""Processes that train side by side, one on each device: each takes the next piece of work once it has done one.

A process is started anew (spawned): CUDA does not survive a fork. What it prints comes here as whole lines, and is
printed with a prefix. Only this process hears Ctrl-C and a closed terminal: it stops the others by SIGTERM, so that
each saves a checkpoint once; a second signal ends them at once. A process whose parent is gone saves and ends, too.
"""

import errno
import io
import os
import pickle
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from pipeline.errors import DiskError, PipelineError, UsageError, first_line, limit_error
from pipeline.secret_masking import masked
from pipeline.tensors import find_device
from pipeline.visible_text import print_visible, visible
from stages.train_draft.stop import GracefulStop
from stages.train_draft.sweep_live_table import States

POLL_SECONDS = 0.5  # between two looks at whether a signal came
PARENT_ONLY = (signal.SIGINT, signal.SIGHUP)  # a terminal sends them to all its processes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Errors = dict[Path, Exception]  # what ended a run early, by its folder


def ends_all(error: Exception) -> bool:
    """Return whether what ended one run would end every other, too: no room on the disk, or no right to write."""
    return isinstance(error, DiskError) or (isinstance(error, OSError) and error.errno in FULL)


def failure(error: Exception, where: Path, say: Callable[[str], None] = print_visible) -> PipelineError:
    """Return what ended a run as one line, without the frames, which keep the memory of a run alive; print it, and the
    trace of a bug. Secrets are masked."""
    known = error if isinstance(error, PipelineError) else limit_error(where, error)
    text = masked(known if known is not None else f"bug: {type(error).__name__}: {first_line(error)}")
    say(f"failed: {visible(text)}")
    if known is None:
        say(masked("".join(traceback.format_exception(error))))
    return PipelineError(text)


@dataclass(frozen=True)
class Work:
    """A piece of work. title: what it is. name: what each line of its output begins with, such as "run 3". runs: the
    folders of its runs."""

    title: str
    name: str
    runs: tuple[Path, ...]


Train = Callable[[Work], Errors]


def named_devices(device: str | None, devices: str | None, jobs: int) -> list[str]:
    """Return the device of each process: those of `devices`, separated by commas, else `device`, else all CUDA devices,
    else the CPU; `jobs` times each.

    Raises UsageError for a device that is not there.
    """
    if device and devices:
        raise UsageError(f"--device {device} and --devices {devices} both say where to train; leave one out")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbered = [f"cuda:{number}" for number in range(count)]
    names = [name.strip() for name in devices.split(",")] if devices else [device] if device else numbered or ["cpu"]
    if not all(names):
        raise UsageError(f"--devices {devices}: write names separated by commas, such as cuda:0,cuda:1")
    for name in {*names} - {"cuda" if count else "cpu", *numbered}:  # looking at a GPU takes memory of it
        find_device(name)
    return names * jobs


@dataclass(eq=False)
class _Worker:
    device: str
    process: BaseProcess
    connection: Connection
    work: Work | None = None


def train_on_devices(
    devices: Sequence[str], todo: Sequence[Work], prepare: Callable[[str], Train], states: States | None = None
) -> Errors:
    """Have one process a device do all the work; return what ended runs early, whatever it was: the others go on,
    unless it would end them all (`ends_all`): then each saves and ends.

    prepare: a picklable function, called in each process with its device, which returns what does a piece of work.
    states: hears which runs are in work. Raises what a signal raises, once every process has ended.
    """
    left, errors, told, states = deque(todo), {}, False, states or States()
    workers = [_start(device, prepare) for device, _ in zip(devices, todo, strict=False)]
    with GracefulStop() as stop:
        try:
            for worker in workers:
                _hand_out(worker, left, states)
            while workers:
                for connection in wait([worker.connection for worker in workers], POLL_SECONDS):
                    worker = next(worker for worker in workers if worker.connection is connection)
                    if _listen(worker, errors, states):
                        if any(map(ends_all, errors.values())):
                            left.clear()
                        if worker.work is None:
                            _hand_out(worker, left, states)
                        continue
                    workers.remove(worker)
                    if worker.work is not None and not (stop.received or told):
                        errors |= _death(worker)
                        states.end(worker.work.runs, worker.work.runs)
                        if left:
                            workers.append(_start(worker.device, prepare))
                            _hand_out(workers[-1], left, states)
                if (stop.received or any(map(ends_all, errors.values()))) and not told:
                    told = True
                    left.clear()
                    _terminate(workers)
        except BaseException:  # a second signal, for example
            _terminate(workers)
            raise
    return errors


def _start(device: str, prepare: Callable) -> _Worker:
    here, there = (context := get_context("spawn")).Pipe()
    arguments = there, device, prepare, torch.get_num_threads()
    process = context.Process(target=_work, args=arguments, daemon=True)
    with _ignored(PARENT_ONLY):
        process.start()
    there.close()
    return _Worker(device, process, here)


@contextmanager
def _ignored(numbers: Sequence[int]) -> Iterator[None]:
    """Ignore signals in the block, and so in processes that are started in it, for as long as they live."""
    here = threading.current_thread() is threading.main_thread()  # no other one may
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (numbers if here else ())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hand_out(worker: _Worker, left: deque[Work], states: States) -> None:
    """Give a process the next piece of work; None, with which it ends, where there is none."""
    worker.work = left.popleft() if left else None
    try:
        worker.connection.send(worker.work)
    except OSError:  # it has ended: `_listen` finds that
        return
    if worker.work is not None:
        states.begin(worker.work.runs)
        print_visible(visible(f"{worker.work.title}, on {worker.device}"))


def _listen(worker: _Worker, errors: Errors, states: States) -> bool:
    """Take one message of a process: lines to print, or what ended its runs early. Return False when it has ended."""
    try:
        message = worker.connection.recv()
    except (EOFError, OSError):
        worker.connection.close()
        worker.process.join()
        return False
    if isinstance(message, str):
        name = worker.work.name if worker.work else worker.device
        for line in message.splitlines():
            print_visible(f"[{visible(name)}] {line}")
        return True
    errors |= message
    states.end(worker.work.runs, list(message))
    worker.work = None
    return True


def _death(worker: _Worker) -> Errors:
    """Return the error of each run that a process had in work when it ended."""
    code = worker.process.exitcode
    how = f"signal {-code} ended its process" if code < 0 else f"its process ended with {code}"
    remedy = "the same command goes on from its last checkpoint"
    errors = {path: PipelineError(f"{path}: {how}; {remedy}") for path in worker.work.runs}
    print_visible(f"[{visible(worker.work.name)}] failed: {visible(how)}; {remedy}")
    return errors


def _terminate(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()


# In the processes


class _Lines(io.TextIOBase):
    """A text stream whose whole lines are sent to the parent; while it is gone, they are dropped."""

    def __init__(self, connection: Connection):
        self.connection, self.begun, self.lock = connection, "", threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self.lock:
            lines, end, self.begun = (self.begun + text).rpartition("\n")
            if end:
                try:
                    self.connection.send(lines + end)
                except OSError:
                    self.begun = ""
        return len(text)


def _work(connection: Connection, device: str, prepare: Callable[[str], Train], threads: int) -> None:
    """Do one piece of work after the other, until there is none. The main function of a process."""
    torch.set_num_threads(threads)
    handed_out: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, handed_out), daemon=True).start()
    lines = _Lines(connection)
    with redirect_stdout(lines), redirect_stderr(lines):
        train = None
        while (work := handed_out.get()) is not None:
            try:
                train = train or prepare(device)
                errors = train(work)
            except Exception as error:  # which the parent raises at the end
                print_visible(f"failed: {visible(masked(error))}")
                errors = dict.fromkeys(work.runs, _picklable(error))
            with lines.lock:
                connection.send(errors)


def _receive(connection: Connection, handed_out: queue.SimpleQueue) -> None:
    """Take what the parent hands out. When it is gone, stop as by SIGTERM: save, and end."""
    try:
        while True:
            handed_out.put(connection.recv())
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)


def _picklable(error: Exception) -> Exception:
    """Return an error as it can be sent: with its trace as a note, and as a plain one where it cannot be rebuilt."""
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(trace)
    return error
