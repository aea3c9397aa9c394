"""OpenMP's wait policy: waiting threads sleep at once instead of spinning.

OpenMP's runtimes let a waiting thread spin for milliseconds. On a shared core it then displaces the very thread that it
waits for: a capture on two cores beside one busy process took several times as long as with one thread.
`tests/bench/busy.py` measures that on two cores a spin count of 1,000 saves a few percent where nothing else runs, and
costs 10 to 20 % beside a busy process.
"""

import os
from collections.abc import MutableMapping

# GNU's runtime counts iterations, Intel's and LLVM's milliseconds.
NO_SPINNING = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
WAIT_VARIABLES = ("OMP_WAIT_POLICY", *NO_SPINNING, "KMP_LIBRARY")


def disable_spin_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make waiting threads sleep, here and in child processes, unless the environment already sets a wait policy.

    Call it before torch is imported: the runtime reads the environment once, when it is loaded.
    """
    if not any(name in environment for name in WAIT_VARIABLES):
        environment.update(NO_SPINNING)
