"""Processes (ranks) that torchrun started together: how they meet, which of them prints an error, how they end.

Training on several devices and a target that several ranks share use it. Imports nothing heavy.
"""

import atexit
import contextlib
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import timedelta

import xxhash

from pipeline.errors import PipelineError, UsageError, first_line, limit_error

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(minutes=30)  # for a rank that starts, evaluates, saves, or has more to compute
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
CODE, ENDED = "exit code", "ended"  # in the store: of the first error, and how many have met one

_chosen = False  # whether this rank was the first of those that have met to end with an error


def several(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this is one of several ranks. UsageError where the environment says so, and not which one."""
    if "RANK" not in environment or environment.get("WORLD_SIZE", "1") == "1":
        return False
    missing = [name for name in VARIABLES if name not in environment]
    if missing:
        raise UsageError(
            f"WORLD_SIZE = {environment['WORLD_SIZE']} in the environment, and no {' or '.join(missing)}; start the "
            "ranks with torchrun, which sets them all, or unset WORLD_SIZE"
        )
    rank, size, _ = (number(environment, name) for name in VARIABLES[:3])
    if rank >= size:
        raise UsageError(f"RANK = {rank} in the environment: wanted less than WORLD_SIZE = {size}")
    return True


def number(environment: Mapping[str, str], name: str) -> int:
    """Return a variable of the environment as a number. UsageError for anything else."""
    if not environment[name].isdecimal():
        raise UsageError(f"{name} = {environment[name]!r} in the environment: wanted a number, as torchrun sets it")
    return int(environment[name])


def join(backend: str, rank: int, size: int, within: str = "", timeout: timedelta = PATIENCE):
    """Make the process group of `size` ranks; return the store that they share.

    within: the name of the group, where there are several. timeout: for any of what the ranks then do together.
    Raises UsageError where the others cannot be reached.
    """
    import torch.distributed as dist  # here: it takes a second

    try:
        with _signals_at_once():
            store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
            store = dist.PrefixStore(within, store) if within else store
            store = dist.PrefixStore(meet(store, rank, size), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        place = ":".join(os.environ.get(name, "") for name in VARIABLES[3:])
        raise UsageError(
            f"rank {rank} of {size} cannot reach the others through {place} ({first_line(error)}); start them "
            "together with torchrun"
        ) from error
    return store


def meet(store, rank: int, size: int) -> str:
    """Return a name that the processes of this start have agreed on, and no earlier start has had.

    torchrun keeps the store over its restarts, with the addresses of dead processes in it, and tells no number of the
    start that is the same on all machines. So every process says that it is there, rank 0 writes a list of all, anew
    when one comes that is not on it, and each confirms the list on which it finds itself.
    """
    own, until, listed = uuid.uuid4().hex, time.monotonic() + PATIENCE.total_seconds(), ""
    store.set(f"here/{rank}", own)
    while time.monotonic() < until:
        if rank == 0 and store.check([f"here/{other}" for other in range(size)]):
            listed = " ".join(store.get(f"here/{other}").decode() for other in range(size))
            store.set("list", listed)
        elif rank > 0 and store.check(["list"]):
            listed = store.get("list").decode()
        if own in listed:
            name = xxhash.xxh3_64_hexdigest(listed.encode())
            store.set(f"{name}/{rank}", own)
            if store.check([f"{name}/{other}" for other in range(size)]):
                return name
        time.sleep(0.02)
    raise RuntimeError(f"not all came within {PATIENCE}")


@contextlib.contextmanager
def _signals_at_once() -> Iterator[None]:
    """Let stop signals end the process within the block: in C++, where a rank waits for others, Python hears none."""
    before = {}
    with contextlib.suppress(ValueError):  # not the main thread
        for stop in STOP_SIGNALS:
            if signal.getsignal(stop) not in (signal.SIG_IGN, None):
                before[stop] = signal.signal(stop, signal.SIG_DFL)
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


# Errors


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process prints what every rank of a machine hears, such as a signal or a wrong option: before
    they have met the first one, then the one that `one_error` has chosen."""
    return _chosen or environment.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def one_error(store, lost: PipelineError) -> Iterator[None]:
    """Have an error end all ranks with one line, that of the first that met one; the others end with its exit code.

    store: of the ranks. lost: what is raised where another rank ended without a word.
    """
    global _chosen
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(ValueError):  # not the main thread
            for stop in STOP_SIGNALS:  # torchrun sends one when it has seen another rank end
                signal.signal(stop, signal.SIG_IGN)
        _chosen, code = report(store, error)
        if not _chosen:
            leave(code)
        atexit.register(leave, code)
        if lost_rank(error):
            lost.args = (f"{lost} ({first_line(error)})",)
            raise lost from error
        raise


def report(store, error: BaseException) -> tuple[bool, int]:
    """Return whether this rank is the first to end with an error, which is then the one to print, and the code that it
    ends with: its own, or that of another rank's error, if this one only misses it or was told to stop."""
    lost, code = lost_rank(error), exit_code(error)
    try:
        if (lost or isinstance(error, SystemExit)) and store.check([CODE]):
            return False, int(store.get(CODE))
        before = store.add(ENDED, 1) - 1
        if before == 0:
            store.set(CODE, str(code))
    except RuntimeError:  # the process that keeps the store is gone
        return True, code
    return before == 0, code


def lost_rank(error: BaseException) -> bool:
    """Return whether an error says that another rank of the process group has gone, or does not answer."""
    from torch.distributed import DistError  # here: one process alone has no need of it

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that ends with this error."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    known = error if isinstance(error, PipelineError) else limit_error("", error)
    return known.code if known else PipelineError.code


def leave(code: int) -> None:
    """End the process now: at Python's own end one in four aborts, in a thread of gloo that is still there."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
