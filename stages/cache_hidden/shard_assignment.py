"""Which shards a process captures when several work on one cache: worker s mod N captures shard s.

Workers share nothing but the cache's folder. Shards that none of them captured (one was killed, or N changed) are
missing to the next run, which captures them.
"""

import re
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import UsageError

NAMED = re.compile(r"([0-9]+)/([0-9]+)")


@dataclass(frozen=True)
class Worker:
    """Worker `number` (from 0) of `count`. `local`: its number on this machine, None where unknown. Of workers numbered
    by hand (`--worker I/N`) it is I: so that eight on eight GPUs take one each, also on the second such machine.

    ranks: of torchrun, that are this one worker and share the target; this process is number `rank` of them, and
    `local` numbers processes, not workers.
    """

    number: int = 0
    count: int = 1
    local: int | None = None
    ranks: int = 1
    rank: int = 0

    def share(self, work: list) -> list:
        """Return the entries of a list of (shard, columns) that are this worker's."""
        return [entry for entry in work if entry[0].number % self.count == self.number]

    def device(self, named: str | None) -> str:
        """Return the device to use: the named one; for "cuda" or None, the GPU of the worker's local number, if any.

        UsageError where a GPU is named and there is none.
        """
        if named is not None and not named.startswith("cuda"):
            return named
        if not _built_for_gpus() or not _cuda().is_available():
            if named is not None:
                raise UsageError(f"--device {named}: torch sees no CUDA device; use --device cpu")
            return "cpu"
        if named not in (None, "cuda"):
            return named
        several = self.local is not None and _cuda().device_count() > 1
        return f"cuda:{self.local % _cuda().device_count()}" if several else "cuda"

    def __str__(self) -> str:
        return f"worker {self.number}/{self.count}"


def _built_for_gpus() -> bool:
    """Return whether the installed torch is a GPU build, by its version file, since importing it takes a second."""
    found = find_spec("torch")
    version = Path(found.origin).with_name("version.py") if found and found.origin else None
    built = runpy.run_path(str(version)) if version and version.is_file() else {}
    return not built or any(built.get(name) for name in ("cuda", "hip"))


def _cuda():
    import torch

    return torch.cuda


def find_worker(named: str | None, environment: Mapping[str, str], ranks: int = 1) -> Worker:
    """Return this process's worker number: from --worker, else torchrun's variables, else SLURM's, else 0 of 1.

    ranks: so many ranks of torchrun are one worker each time (`--tensor-parallel`).
    torchrun: RANK and WORLD_SIZE. SLURM: the tasks of `srun`, the jobs of an array, or both. The local number, which
    only chooses the GPU, is LOCAL_RANK or SLURM_LOCALID. Raises UsageError for a value that is no number or too large.
    """
    value = partial(_number, environment)
    local = next((value(name) for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in environment), None)
    if ranks > 1:
        return _several_ranks(named, environment, ranks, local)
    if named is not None:
        found = _named(named)
        return Worker(int(found[1]), int(found[2]), int(found[1]) if local is None else local)
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _make_worker(value("RANK"), value("WORLD_SIZE"), local, "RANK and WORLD_SIZE")
    return _slurm(environment, local)


def _named(worker: str) -> re.Match:
    """Return the parts of `--worker I/N`. UsageError for anything else."""
    found = NAMED.fullmatch(worker)
    if not found or int(found[1]) >= int(found[2]):
        raise UsageError(f"--worker {worker}: wanted I/N with I from 0 to N-1, such as 0/4")
    return found


def _several_ranks(named: str | None, environment: Mapping[str, str], ranks: int, local: int | None) -> Worker:
    """Number a worker of several ranks: ranks 0 to N-1 of torchrun are worker 0, and so on.

    UsageError without torchrun, and where its ranks do not make whole workers; then on one rank, which says it for all.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise UsageError(
            f"--tensor-parallel {ranks} takes {ranks} processes; start the same command with "
            f"`torchrun --nproc-per-node {ranks} -m pipeline cache-hidden ...`"
        )
    number = partial(_number, environment)
    of_all = _make_worker(number("RANK"), number("WORLD_SIZE"), local, "RANK and WORLD_SIZE")
    if of_all.count % ranks or (named and of_all.count != ranks):
        if of_all.number:
            raise SystemExit(UsageError.code)
        wanted = f"{ranks} with --worker {named}" if named else f"a multiple of {ranks}"
        raise UsageError(
            f"--tensor-parallel {ranks}: torchrun started {of_all.count} processes, wanted {wanted}; pass the right "
            "--nproc-per-node"
        )
    group, rank = divmod(of_all.number, ranks)
    parts = _named(named) if named else None
    worker, count = (int(parts[1]), int(parts[2])) if parts else (group, of_all.count // ranks)
    return Worker(worker, count, local, ranks, rank)


def _number(environment: Mapping[str, str], name: str) -> int:
    """Return an environment variable as a number of 0 or more. UsageError for anything else."""
    text = environment.get(name)
    if text is None or not text.isdecimal():
        raise UsageError(f"{name} = {text!r} in the environment: wanted a number; set it, or pass --worker I/N")
    return int(text)


def _slurm(environment: Mapping[str, str], local: int | None) -> Worker:
    """Number the worker by its job in the array and its task in the job's step (`srun`).

    A batch script without `srun` is no step: only SLURM_PROCID is set there, and one process runs whatever --ntasks
    says.
    """
    value, job, jobs, task, tasks = partial(_number, environment), 0, 1, 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        jobs, first = value("SLURM_ARRAY_TASK_COUNT"), value("SLURM_ARRAY_TASK_MIN")
        span = value("SLURM_ARRAY_TASK_MAX") - first
        stride = span // (jobs - 1) if jobs > 1 else 1
        job, rest = divmod(value("SLURM_ARRAY_TASK_ID") - first, stride or 1)
        if stride * (jobs - 1) != span or rest:
            raise UsageError(
                f"the SLURM array's {jobs} ids from {first} to {first + span} leave gaps, so it is open which shards "
                "each should take; pass --worker I/N"
            )
    if "SLURM_STEP_NUM_TASKS" in environment:
        task, tasks = value("SLURM_PROCID"), value("SLURM_STEP_NUM_TASKS")
    return _make_worker(job * tasks + task, jobs * tasks, local, "SLURM's array and task numbers")


def _make_worker(number: int, count: int, local: int | None, where: str) -> Worker:
    if not 0 <= number < count:
        raise UsageError(f"{where} say worker {number} of {count}: wanted 0 to {count - 1}; pass --worker I/N")
    return Worker(number, count, local)
