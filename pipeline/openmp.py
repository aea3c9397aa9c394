"""How the threads of a forward wait for one another.

OpenMP's runtimes let a thread that waits spin, for milliseconds, on the core it holds. Beside any other process on that
core it so keeps off the very thread that it waits for: a capture on two cores beside one busy process took several
times as long as with one thread. So ours sleep at once: `tests/bench/busy.py` measures that on two cores 1,000 turns
of spinning save a few percent where nothing else runs, and cost 10 to 20 % beside a busy process.
"""

import os
from collections.abc import MutableMapping

# GNU's runtime counts turns, Intel's and LLVM's milliseconds.
SLEEPING = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
POLICIES = ("OMP_WAIT_POLICY", *SLEEPING, "KMP_LIBRARY")


def wait_asleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have threads sleep when they wait, here and in child processes, unless the user has chosen how they wait.

    To be called before torch is imported: the runtime reads the environment once, when it is loaded.
    """
    if not any(name in environment for name in POLICIES):
        environment.update(SLEEPING)
