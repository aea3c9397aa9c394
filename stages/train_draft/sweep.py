"""`pipeline sweep`: a grid of recipe fields' values, or a search among them, on one cache: one run after the other, or
one on each device. sweep_settings.py says what its file may hold.

Every setting is an ordinary run in an ordinary folder, named by a digest of all that decides its draft, the initial
weights included. So a stopped sweep goes on where it was, a longer list adds only the new runs, and what `train-draft`
finished is not trained again. What ends one run does not end the others, but for what would end them all.
"""

import contextlib
import hashlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline import __version__, torchrun
from pipeline.cache import HiddenCache
from pipeline.errors import ProofError, UsageError
from pipeline.runs.folder import read_result
from pipeline.runs.sweep_record import SWEEP, SweepRecord, setting_text
from pipeline.secret_masking import masked, masked_command
from pipeline.tensors import find_device, free_cached_memory
from pipeline.visible_text import print_visible, visible
from stages.train_draft.run import train_resolved
from stages.train_draft.shared_read import group_runs, room_for_drafts, sharing_lines, train_together
from stages.train_draft.sweep_figures import (
    Facts,
    data_warnings,
    pool_seeds,
    rank_by_accept_length,
    ratios,
    run_facts,
)
from stages.train_draft.sweep_files import write_files
from stages.train_draft.sweep_live_table import Row, States, shown_live
from stages.train_draft.sweep_plan import PlannedRun, Planner, plan_grid
from stages.train_draft.sweep_processes import Errors, Work, ends_all, failure, named_devices, train_on_devices
from stages.train_draft.sweep_search import Search
from stages.train_draft.sweep_settings import read_sweep_file

if TYPE_CHECKING:
    from pipeline.published.init_from import InitialDraft


def sweep(
    cache: Path,
    recipe: Path,
    sets: tuple[str, ...] = (),
    out: Path | None = None,
    device: str | None = None,
    init_from: "InitialDraft | None" = None,
    devices: str | None = None,
    jobs: int = 1,
    shared_read: bool = False,
) -> dict:
    """Train every setting that is not finished yet; write sweep.json and sweep.csv, and return what is in the first,
    best run first, as --json prints it.

    init_from: a checkpoint, run or published draft whose weights are the initial ones of every run. device, devices,
    jobs: see `named_devices`; where they name several, as many processes share the runs. shared_read: read the cache
    once for all runs that learn from the same samples, see shared_read.py.

    A run that fails is recorded as failed and the others go on. Raises UsageError, before the first run, for an invalid
    setting; and at once, with the files written, what would end every run: DiskError, and what a signal raises; and
    ProofError, with the files written, where processes of a search ended early.
    """
    if torchrun.several():
        raise UsageError("a sweep gives its runs to the devices itself; start it without torchrun, see --devices")
    planned = Planned(cache, recipe, sets, out, init_from)
    if shared_read and planned.search:
        raise UsageError("--shared-read is of a grid: a search chooses its runs one after the other; leave it out")
    places = named_devices(device, devices, jobs)
    prepare = partial(prepare_training, cache, recipe, sets, out, init_from)
    failed: dict[Path, str] = {}
    try:
        _train(planned, places, prepare, shared_read, failed)
    except BaseException:
        with contextlib.suppress(Exception):  # what stops the sweep is what its user has to hear
            planned.write(failed)
        raise
    record = planned.write(failed)
    if planned.search:
        planned.search_ended(failed)
    return record.model_dump()


def _train(planned: "Planned", places: list[str], prepare: partial, shared_read: bool, failed: dict) -> None:
    """Do all the work of a sweep. failed: gets what ended a run early."""
    work = planned.search_work(places) if planned.search else planned.grid_work(places, shared_read)
    for line in planned.warnings():
        print_visible(visible(f"warning: {line}"))
    if work:
        planned.write({})  # those who watch it learn of all runs to come, or of how many trials
    states = States()
    with shown_live(partial(planned.rows, states), planned.folder):
        if min(len(places), len(work)) > 1:
            _note(train_on_devices(places, work, prepare, states), failed)
        else:
            train = Training(planned, find_device(places[0]))
            for each in work:
                states.begin(each.runs)
                print_visible(f"\n{visible(each.title)}")
                errors = train(each)
                states.end(each.runs, list(errors))
                _note(errors, failed)


def _note(errors: Errors, failed: dict[Path, str]) -> None:
    for path, error in errors.items():
        if ends_all(error):
            raise error
        failed[path] = masked(error)


class Planned:
    """A sweep before its first run: its file, cache and folder, and a grid's runs, by their folders, in grid order. The
    same in every process. Raises UsageError."""

    def __init__(
        self,
        cache: Path,
        recipe: Path,
        sets: tuple[str, ...] = (),
        out: Path | None = None,
        init_from: "InitialDraft | None" = None,
    ):
        self.store = HiddenCache.open(cache)
        self.made_of = {"cache": str(cache), "recipe": str(recipe), "init_from": init_from and str(init_from.path)}
        self.file = read_sweep_file(recipe, sets)
        planner = Planner(self.store, self.file, out, init_from)
        runs = plan_grid(planner, self.file.combinations()) if self.file.search is None else []
        self.runs = {run.path: run for run in runs}
        self.names = {path: f"run {number}" for number, path in enumerate(self.runs, 1)}
        digests = self.file.digest(), self.store.digest, str(init_from and init_from.path)
        name = hashlib.blake2b("".join(digests).encode(), digest_size=5).hexdigest()
        self.folder = out or Path("runs") / f"sweep-{name}"
        self.search = None
        if self.file.search is not None:
            self._check_search(planner)
            self.search = Search(self.folder, self.file, planner, name)

    def _check_search(self, planner: Planner) -> None:
        """Refuse what no trial could be made of: values that do not fit the cache, or a cache to measure nothing on."""
        for setting in self.file.examples():
            run = planner(setting)
            if not self.store.has_final or not len(run.split.heldout):
                raise UsageError(
                    f"{self.store.path} has no held-out samples with final states: a search compares accept lengths on "
                    "them; set train.heldout, or capture them with --final needed"
                )

    def search_work(self, places: Sequence[str]) -> list[Work]:
        """Return a piece of work for each process: to take trials until there are enough."""
        done = len(self.search.trials())
        print_visible(f"{self.file.search.trials} trials, {done} of them begun before; study {self.search.name}")
        return [Work(f"search {n}", f"search {n}", (self.folder,)) for n in range(1, len(places) + 1)]

    def search_ended(self, failed: Mapping[Path, str]) -> None:
        """Raise ProofError where a process of a search ended early, or left a trial that is not finished."""
        left, reason = self.search.left(), failed.get(self.folder)
        if not left and reason is None:
            return
        trials, run = self.file.search.trials, len(self.search.trials())
        unfinished = f", of which unfinished: {', '.join(map(str, left))}" if left else ""
        raise ProofError(
            f"{self.folder}: a process of the search ended early ({reason or 'without a word'}); {run} of {trials} "
            f"trials were begun{unfinished}; the same command goes on with them, {SWEEP} has what there is"
        )

    def grid_work(self, places: Sequence[str], shared_read: bool) -> list[Work]:
        """Return the runs that are not finished yet, those that share what they read together."""
        todo = [run for run in self.runs.values() if read_result(run.path) is None]
        print_visible(f"{len(self.runs)} runs, {len(self.runs) - len(todo)} of them finished before")
        groups = self.share(todo, places) if shared_read else [[run] for run in todo]
        return [self.work([run.path for run in group]) for group in groups]

    def work(self, paths: Sequence[Path]) -> Work:
        """Return runs that are trained together as a piece of work."""
        names = [self.names[path].removeprefix("run ") for path in paths]
        name = f"{'runs' if len(paths) > 1 else 'run'} {', '.join(names)}"
        settings = "; ".join(setting_text(self.runs[path].setting) for path in paths)
        return Work(f"{name} of {len(self.runs)}: {settings}", name, tuple(paths))

    def share(self, runs: Sequence[PlannedRun], places: Sequence[str]) -> list[list[PlannedRun]]:
        """Return the runs in groups that are trained from one read, and print them. No device is left without work."""
        room = room_for_drafts(torch.device(places[0]))
        groups = group_runs(runs, room, most=-(-len(runs) // len(places)))
        for line in sharing_lines(groups, self.names):
            print_visible(visible(line))
        return groups

    def rows(self, states: States) -> list[Row]:
        """Return a line for each run, to show."""
        if self.search:
            return self.search.rows()
        return [
            Row(self.names[path].removeprefix("run "), run.setting, path, run.steps, states.of.get(path))
            for path, run in self.runs.items()
        ]

    def warnings(self) -> list[str]:
        """Return what makes the runs hard to compare; of a search those of its trials so far."""
        if not self.search:
            return data_warnings(list(self.runs.values()), self.names)
        runs = self.search.planned_runs()
        return data_warnings(list(runs.values()), {run.path: f"run {number}" for number, run in runs.items()})

    def facts(self, failed: Mapping[Path, str]) -> list[Facts]:
        """Return what is known of each run."""
        if self.search:
            return self.search.run_facts()
        return [run_facts(run, failed.get(path)) for path, run in self.runs.items()]

    def write(self, failed: Mapping[Path, str]) -> SweepRecord:
        """Write the sweep's files and return what is in them. failed: what ended runs early."""
        facts = self.facts(failed)
        record = SweepRecord(
            version=__version__,
            command=masked_command(sys.argv),
            cache_digest=self.store.digest,
            target=self.store.identity.target.name,
            search=self.search and self.search.facts(),
            runs=[{key: fact[key] for key in fact if key != "replies"} for fact in rank_by_accept_length(facts)],
            pooled=rank_by_accept_length(pool_seeds(facts)),
            ratios=ratios(facts, [] if self.search else self.file.axes),
            warnings=self.warnings(),
            **self.made_of,
        )
        write_files(self.folder, record)
        return record


class Training:
    """Trains pieces of a sweep's work on one device: called with one, returns what ended its runs early."""

    def __init__(self, planned: Planned, device: torch.device):
        self.planned, self.device = planned, device

    def __call__(self, work: Work) -> Errors:
        if self.planned.search:
            self.planned.search.train(self.device, before_each=partial(self.planned.write, {}))
            return {}
        store, runs = self.planned.store, [self.planned.runs[path] for path in work.runs]
        if len(runs) > 1:
            return train_together(runs, self.planned.names, store, self.device)
        (run,) = runs
        try:
            train_resolved(run.path, store, run.split, run.resolved, self.device, run.start)
        except Exception as error:  # a learning rate too high, for example: a result, too
            if ends_all(error):
                raise
            failed = failure(error, run.path)
        else:
            return {}
        free_cached_memory(self.device)  # outside the except clause: the exception keeps the run's tensors alive
        return {run.path: failed}


def prepare_training(
    cache: Path, recipe: Path, sets: tuple[str, ...], out: Path | None, init_from: "InitialDraft | None", device: str
) -> Training:
    """Plan a sweep in one of the processes that train it."""
    return Training(Planned(cache, recipe, sets, out, init_from), find_device(device))
