"""The engine's side of `pipeline/engine_process.py`: progress, requests, and the end with the process that started it.

Imports nothing but the standard library: an engine's environment has none of ours.
"""

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from importlib import metadata

MARK = "@engine "
GRACE_S = 5.0  # for the engine's workers to end
VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # leave the threads where they are
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def report(**facts) -> None:
    """Tell the starting process how far this one is."""
    print(MARK + json.dumps(facts), flush=True)


def fail(kind: str, what: str) -> None:
    """End, for a reason that a user can mend. kind: absent (the engine cannot be imported) or usage."""
    report(stage="failed", kind=kind, what=what)
    sys.exit(1)


def end_with_parent(
    heard: Callable[[bytes], None] = lambda line: None, leave: Callable[[], None] = lambda: None
) -> None:
    """End this process and all that it started when the one that started it is gone: standard input is then closed.

    heard: is given every line that comes before, in a thread of its own. leave: what to tidy up then.
    """

    def wait():
        rest = b""
        while data := os.read(0, 1 << 16):  # not sys.stdin, whose lock would be held when this process ends
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                heard(line)
        end_workers()
        leave()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def end_workers() -> None:
    """End the processes that the engine started, so that they and what tracks their shared memory remove it."""
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(GRACE_S / len(workers))
        worker.kill()


def import_vllm() -> str:
    """Import vLLM, telling how far that is; return the package and its version. The build for CPUs has another name."""
    report(stage="importing")
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        fail("absent", str(error))
    version = _vllm_version()
    report(stage="starting", engine=version)
    return version


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "vllm"
