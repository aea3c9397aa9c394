"""Runs `make_cache` in children that kill themselves at their n-th step on disk, n = 1, 2, ... until one is not killed.

A step is a sync, a rename or a write. Usage: killed_writer.py CACHE STRIDE; CACHE.<n> is what the n-th child left.
A script of its own, because a fork wants a process without threads.
"""

import os
import signal
import sys
from itertools import count
from pathlib import Path

from cache_maker import COLUMNS, make_cache, random_samples


def die_at(step: int) -> None:
    """From now on, count the calls that change the disk, and end this process without a word before the n-th."""
    steps = count(1)

    def dying(call):
        def before(*arguments, **named):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return before

    os.fsync = lambda fd: None  # counted below; a killed process loses no page that it wrote
    for name in ("fsync", "rename", "replace", "write", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))


def main(cache: str, stride: int) -> None:
    for step in range(1, 1_000_000, stride):
        child = os.fork()
        if not child:
            die_at(step)
            make_cache(Path(f"{cache}.{step}"), random_samples(2, longest=8), COLUMNS[1:])
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
