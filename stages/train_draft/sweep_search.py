"""`search = "optuna"`: settings chosen one after the other by what the runs before gained, and runs given up early.

Each setting is a trial of one study in optuna's journal, a file in the sweep's folder, which any number of processes
and `pipeline sweep` commands may work on at once. A trial belongs to the process that has its lock. One whose process
is gone is taken by the next that looks, with its setting and its run, which goes on from its checkpoint. Asked is under
one lock, and a trial's sampler is seeded by the study's seed and the trial's number: one process alone makes the same
trials however often it is stopped.

Runs are compared, and given up, by the exact accept length on held-out replies, as evaluated during the training.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.cache.atomic import process_lock, try_lock, write_errors
from pipeline.errors import UsageError
from pipeline.runs.folder import run_lock
from pipeline.runs.sweep_record import PrunedAt, SearchFacts, setting_text
from pipeline.tensors import free_cached_memory
from pipeline.visible_text import print_visible, visible
from stages.train_draft.logs import Display, summary
from stages.train_draft.ranks import Ranks
from stages.train_draft.run import open_run
from stages.train_draft.stop import GracefulStop
from stages.train_draft.sweep_figures import Facts, run_facts
from stages.train_draft.sweep_live import Row
from stages.train_draft.sweep_plan import PlannedRun, Planner
from stages.train_draft.sweep_processes import ends_all, failure
from stages.train_draft.sweep_settings import Setting, SweepFile
from stages.train_draft.sweep_study import JOURNAL, import_optuna, open_study, suggest_from, suggest_number
from stages.train_draft.training_run import TrainingRun

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

MOST_REPEATS = 100  # proposals in a row that were tried before: then nothing new is to be expected


@dataclass(frozen=True)
class Claim:
    """A trial that this process has the lock of. resumed: another process began it."""

    trial: "Trial"
    setting: Setting
    resumed: bool


class Search:
    """One study, as this process works on it. folder: the sweep's."""

    def __init__(self, folder: Path, file: SweepFile, planner: Planner, name: str):
        self.optuna = import_optuna()
        self.folder, self.file, self.planner, self.name = folder, file, planner, name
        self.locks = folder / f"trials-{name}"
        with write_errors(folder, "the journal of a search"):
            self.locks.mkdir(parents=True, exist_ok=True)
            self.study = open_study(folder, name, file.search.prune)

    def facts(self) -> SearchFacts:
        search = self.file.search
        return SearchFacts(
            sampler="optuna TPE",
            seed=search.seed,
            trials=search.trials,
            prune=search.prune,
            study=self.name,
            journal=str(self.folder / JOURNAL),
        )

    def trials(self) -> list["FrozenTrial"]:
        """Return the trials with a setting of their own, in order."""
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if "setting" in trial.user_attrs and "repeats" not in trial.user_attrs
        ]

    # Trials

    @contextmanager
    def claim(self) -> Iterator[Claim | None]:
        """Take a trial whose process is gone, else ask for a new one; None where there are enough. Its lock is held
        for the block."""
        claim, fd = None, None
        with process_lock(self.folder, "search"):
            for trial in self.study.get_trials(deepcopy=False):
                if trial.state.is_finished() or (fd := try_lock(self.locks / f"{trial.number}.lock")) is None:
                    continue
                claim = self._suggest(self._again(trial), resumed=True)
                if claim is not None:
                    break
                os.close(fd)
                fd = None
            while claim is None and len(self.trials()) < self.file.search.trials and self._repeats() < MOST_REPEATS:
                fd = try_lock(self.locks / f"{len(self.study.get_trials(deepcopy=False))}.lock")
                claim = self._suggest(self._ask(), resumed=False)
                if claim is None:
                    os.close(fd)
                    fd = None
        try:
            yield claim
        finally:
            if fd is not None:
                os.close(fd)

    def _ask(self) -> "Trial":
        self._seed(len(self.study.get_trials(deepcopy=False)))
        return self.study.ask()

    def _again(self, trial: "FrozenTrial") -> "Trial":
        self._seed(trial.number)
        return self.optuna.trial.Trial(self.study, trial._trial_id)

    def _seed(self, number: int) -> None:
        """Have a trial drawn by its own seed: what a stop forgets decides nothing."""
        seed = np.random.SeedSequence([self.file.search.seed, number]).generate_state(1)
        self.study.sampler = self.optuna.samplers.TPESampler(seed=int(seed[0]))

    def _repeats(self) -> int:
        """Return how many of the newest trials in a row had settings that were tried before."""
        count = 0
        for trial in reversed(self.study.get_trials(deepcopy=False)):
            if "repeats" not in trial.user_attrs:
                break
            count += 1
        return count

    def _suggest(self, trial: "Trial", resumed: bool) -> Claim | None:
        """Return a trial with its setting; None, the trial being told what came of it, for one that another has."""
        numbers = tuple(suggest_number(trial, axis) for axis in self.file.axes)
        drawn = {key: suggest_from(trial, key, of) for key, of in self.file.ranges.items()}
        setting = self.file.setting(numbers, drawn)
        first = next((each for each in self.trials() if each.user_attrs["setting"] == setting), None)
        if first is None or first.number == trial.number:
            trial.set_user_attr("setting", setting)
            return Claim(trial, setting, resumed)
        trial.set_user_attr("repeats", first.number)
        state = first.state if first.state.is_finished() else self.optuna.trial.TrialState.FAIL
        self.study.tell(trial, values=first.value if state.name == "COMPLETE" else None, state=state)
        return None

    # Training

    def train(self, device: torch.device) -> None:
        """Work on trials until there are as many as were asked for. Raises what ends every run: `ends_all`, signals."""
        while True:
            with self.claim() as claim:
                if claim is None:
                    break
                title = f"trial {claim.trial.number}: {setting_text(claim.setting)}"
                print_visible(f"\n{visible(title)}{', which another process began' * claim.resumed}")
                self._train(claim, device)
        short = self.file.search.trials - len(self.trials())
        if short > 0:
            print_visible(f"the search proposes nothing new: {short} of {self.file.search.trials} trials are left out")

    def _train(self, claim: Claim, device: torch.device) -> None:
        states = self.optuna.trial.TrialState
        try:
            run = self.planner(claim.setting)
            accept_len, pruned = self._train_run(claim.trial, run, device)
        except Exception as error:
            if ends_all(error):
                raise  # its trial is not finished: the same command goes on with it
            claim.trial.set_user_attr("failed", str(failure(error, self.folder)))
            free_cached_memory(device)
            self.study.tell(claim.trial, state=states.FAIL)
            return
        if pruned is not None:
            claim.trial.set_user_attr("pruned", pruned.model_dump())
            print_visible(f"pruned at step {pruned.step}: accept length {pruned.accept_len:.2f} is below the median")
            self.study.tell(claim.trial, state=states.PRUNED)
        elif accept_len is None:
            claim.trial.set_user_attr("failed", "no accept length: no held-out reply is the target's own")
            self.study.tell(claim.trial, state=states.FAIL)
        else:
            self.study.tell(claim.trial, accept_len)

    def _train_run(self, trial: "Trial", run: PlannedRun, device: torch.device) -> tuple[float | None, PrunedAt | None]:
        """Train a run, or go on with it; return its accept length, or where it was given up."""
        ranks, store = Ranks(device), self.planner.store
        with run_lock(run.path):
            opened = open_run(run.path, store, run.split, run.resolved, ranks, run.start)
            if isinstance(opened, TrainingRun):
                with GracefulStop() as ranks.stop, Display(opened.step, opened.train.steps) as display:
                    display.print_line(opened.description)
                    opened.announce_time(display)
                    for step in evaluated_steps(opened):
                        opened.fit(display, until=step)
                        pruned = self._report(trial, opened)
                        if pruned is not None:
                            opened.save()
                            return None, pruned
                opened = opened.finish()
        print_visible(summary(run.path, store, opened))
        return opened.accept_len, None

    def _report(self, trial: "Trial", training: TrainingRun) -> PrunedAt | None:
        """Tell the study of each evaluation; return where the run is to be given up, None where it goes on."""
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        evaluated = [line for line in training.metrics.lines if line.eval and line.eval.calls]
        for line in evaluated:
            if line.step not in known:
                trial.report(line.eval.accept_len, line.step)
        if not evaluated or training.step >= training.train.steps or not trial.should_prune():
            return None
        return PrunedAt(step=evaluated[-1].step, accept_len=evaluated[-1].eval.accept_len)

    # What is known of them

    def run_facts(self) -> list[Facts]:
        """Return the facts of every trial's run."""
        found = []
        for trial in self.trials():
            attributes, state = trial.user_attrs, trial.state.name  # a kill may have come between the two
            pruned = PrunedAt(**attributes["pruned"]) if state == "PRUNED" else None
            failed = attributes.get("failed") if state == "FAIL" else None
            try:
                run = self.planner(attributes["setting"])
            except UsageError:  # its trial failed for that, before it had a run
                continue
            found.append(run_facts(run, failed, pruned, trial.number))
        return found

    def rows(self) -> list[Row]:
        """Return a line for each trial, to show."""
        states = {"RUNNING": "running", "COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
        found = []
        for trial in self.trials():
            setting = trial.user_attrs["setting"]
            try:
                run = self.planner(setting)
                path, steps = run.path, run.steps
            except UsageError:
                path, steps = None, 0
            found.append(Row(str(trial.number), setting, path, steps, states[trial.state.name]))
        return found


def evaluated_steps(training: TrainingRun) -> list[int]:
    """Return the steps after which a run is evaluated, those to come; the last one at least."""
    train = training.train
    steps = [*range(train.eval_every, train.steps, train.eval_every), train.steps]
    return [step for step in steps if step > training.step] or [train.steps]
