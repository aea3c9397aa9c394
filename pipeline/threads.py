"""How the threads of a forward wait for one another.

OpenMP's runtimes let a thread that waits spin, for milliseconds, on the core it holds. Beside any other process on that
core it so keeps off the very thread that it waits for: a capture on two cores beside one busy process took several
times as long as with one thread. So ours spin briefly and then sleep; `tests/bench/busy.py` measures what that costs.
"""

import os
from collections.abc import MutableMapping

# GNU's runtime counts turns, Intel's and LLVM's milliseconds; both would take the standard's OMP_WAIT_POLICY, which
# allows either no turn at all or no end of them.
BRIEFLY = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
POLICIES = ("OMP_WAIT_POLICY", *BRIEFLY, "KMP_LIBRARY")


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have threads sleep soon when they wait, here and in child processes, unless the user has chosen how they wait.

    To be called before torch is imported: the runtime reads the environment once, when it is loaded.
    """
    if not any(name in environment for name in POLICIES):
        environment.update(BRIEFLY)
