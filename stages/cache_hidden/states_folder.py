"""Where states lie on their way from an engine's process, and what captures left there that were killed. No torch."""

import os
import tempfile
from pathlib import Path

from pipeline.cache.atomic import check_free_space, clean_scratch_of, free_bytes

SHARED_MEMORY = Path("/dev/shm")
LABEL = "vllm-states"


def states_folder(need: int) -> Path:
    """Return where files of `need` bytes are to be: in shared memory where it has room twice, else in TMPDIR.

    RoomError where neither has.
    """
    clean_states()
    temporary = Path(tempfile.gettempdir())
    if "TMPDIR" not in os.environ and os.access(SHARED_MEMORY, os.W_OK) and free_bytes(SHARED_MEMORY) > 2 * need:
        return SHARED_MEMORY
    check_free_space(temporary, "states on their way from the engine", need)
    return temporary


def clean_states() -> None:
    """Remove the states of captures that were killed together with their engine."""
    for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        clean_scratch_of(folder, LABEL)
