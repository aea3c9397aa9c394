"""A search's study as optuna keeps it: its journal in the sweep's folder, and how a trial's values are drawn."""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cache.atomic import try_lock
from pipeline.errors import UsageError
from stages.train_draft.sweep_settings import Axis, Range

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

JOURNAL = "search.journal"
DIGITS = 4  # of a number drawn from a range, so that a person can type it


def import_optuna():
    """Return optuna, which then says only errors. Raises UsageError with the command that installs it."""
    try:
        import optuna
    except ImportError:
        raise UsageError(
            "search = \"optuna\" needs the package optuna: pip install 'draft-pipeline[search]'; or leave it out and "
            "write lists: a grid"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class JournalLock:
    """The lock of optuna's journal. The system releases it when a process dies; optuna's own outlives one."""

    def __init__(self, path: Path):
        self.path, self.fd = path, None

    def acquire(self) -> bool:
        pause = 0.001
        while (fd := try_lock(self.path)) is None:
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        self.fd = fd
        return True

    def release(self) -> None:
        os.close(self.fd)


def open_study(folder: Path, name: str, prune: bool) -> "Study":
    """Return the study `name` of the journal in a folder, which is made if need be."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = folder / JOURNAL
    lock = JournalLock(folder / f"{JOURNAL}.lock")
    lock.acquire()
    try:
        drop_incomplete_line(path)
    finally:
        lock.release()
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path), lock_obj=lock)),
        study_name=name,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


def drop_incomplete_line(path: Path) -> None:
    """Cut off what a kill left of a last line, which nothing can be appended to."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def suggest_number(trial: "Trial", axis: Axis) -> int:
    """Return the number of one of an axis's values. The study knows plain values as they are, others as JSON."""
    plain = len(axis.keys) == 1 and all(isinstance(value, bool | int | float | str) for (value,) in axis.values)
    choices = [value[0] if plain else json.dumps(value) for value in axis.values]
    return choices.index(trial.suggest_categorical(" + ".join(axis.keys), choices))


def suggest_from(trial: "Trial", key: str, of: Range) -> int | float:
    """Return a value of a range, of a few digits."""
    if isinstance(of.low, int) and isinstance(of.high, int):
        return trial.suggest_int(key, of.low, of.high, log=of.log)
    drawn = trial.suggest_float(key, of.low, of.high, log=of.log)
    return min(max(float(f"{drawn:.{DIGITS}g}"), of.low), of.high)
