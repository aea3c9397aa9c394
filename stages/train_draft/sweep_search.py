"""`search = "optuna"`: settings chosen one after the other by what the runs before gained, and runs given up early.

Each setting is a trial of one study in optuna's journal, a file in the sweep's folder, which any number of processes
and `pipeline sweep` commands may work on at once. A trial belongs to the process that has its lock. One whose process
is gone is taken by the next that looks, with its setting and its run, which goes on from its checkpoint; the fourth
time from one checkpoint it fails, since it may be what ends them. Asked is under one lock, and a trial's sampler is
seeded by the study's seed and the trial's number: one process alone makes the same trials however often it is stopped.

Runs are compared, and given up, by the exact accept length on held-out replies, as evaluated during the training.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.cache.atomic import process_lock, try_lock, write_errors
from pipeline.errors import PipelineError, ProofError, UsageError
from pipeline.runs import checkpoint
from pipeline.runs.folder import Evaluation, run_lock
from pipeline.runs.run_logs import METRICS, read_log
from pipeline.runs.sweep_record import PrunedAt, SearchFacts, setting_text
from pipeline.tensors import free_cached_memory
from pipeline.visible_text import print_visible, visible
from stages.train_draft.logs import Display, summary
from stages.train_draft.ranks import Ranks
from stages.train_draft.run import open_run
from stages.train_draft.stop import GracefulStop
from stages.train_draft.sweep_figures import Facts, refused_facts, run_facts
from stages.train_draft.sweep_live_table import Row
from stages.train_draft.sweep_plan import PlannedRun, Planner
from stages.train_draft.sweep_processes import ends_all, failure
from stages.train_draft.sweep_settings import Setting, SweepFile
from stages.train_draft.sweep_study import JOURNAL, import_optuna, open_study, suggest_from, suggest_number
from stages.train_draft.training_run import TrainingRun

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

MOST_ATTEMPTS = 3  # that a trial ends its process, before it is given up
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
        self._planned: dict[str, PlannedRun | UsageError] = {}
        self._planning = threading.Lock()  # runs are shown by a thread of their own
        self.locks = folder / f"trials-{name}"
        with write_errors(folder, "the journal of a search"):
            self.locks.mkdir(parents=True, exist_ok=True)
            self.study = open_study(folder, name, file.search.prune)

    def plan(self, setting: Setting) -> PlannedRun:
        """Return the run of a setting, which is made once. Raises UsageError for one that no run can be made of."""
        key = json.dumps(setting, sort_keys=True)
        with self._planning:
            if key not in self._planned:
                try:
                    self._planned[key] = self.planner(setting)
                except UsageError as error:
                    self._planned[key] = error
            found = self._planned[key]
        if isinstance(found, UsageError):
            raise UsageError(str(found))
        return found

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

    def train(self, device: torch.device, before_each: Callable[[], object]) -> None:
        """Work on trials until there are as many as were asked for; call `before_each` once one is taken. Raises what
        ends every run: `ends_all`, signals."""
        while True:
            with self.claim() as claim:
                if claim is None:
                    break
                title = f"trial {claim.trial.number}: {setting_text(claim.setting)}"
                print_visible(f"\n{visible(title)}{', which another process began' * claim.resumed}")
                before_each()
                self._train(claim, device)
        short = self.file.search.trials - len(self.trials())
        if short > 0:
            print_visible(f"the search proposes nothing new: {short} of {self.file.search.trials} trials are left out")

    def _train(self, claim: Claim, device: torch.device) -> None:
        states = self.optuna.trial.TrialState
        try:
            run = self.plan(claim.setting)
            with self._attempt(claim.trial, run):
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

    @contextmanager
    def _attempt(self, trial: "Trial", run: PlannedRun) -> Iterator[None]:
        """Count an attempt to train a run from its newest checkpoint on, unless the block ends. Raises ProofError where
        so many ended the process: with too little memory, for example, it would end every process that takes it."""
        step = max(checkpoint.steps(run.path), default=0)
        began, count = trial.user_attrs.get("attempts", (step, 0))
        count = count if began == step else 0
        if count >= MOST_ATTEMPTS:
            raise ProofError(
                f"{run.path}: {count} processes that trained it from step {step} on were killed, or crashed, without a "
                "word; is there enough memory?"
            )
        trial.set_user_attr("attempts", (step, count + 1))
        try:
            yield
        finally:
            with suppress(OSError):  # no room: then it counts
                trial.set_user_attr("attempts", (step, count))

    def _train_run(self, trial: "Trial", run: PlannedRun, device: torch.device) -> tuple[float | None, PrunedAt | None]:
        """Train a run, or go on with it; return its accept length, or where it was given up."""
        ranks, store = Ranks(device), self.planner.store
        with run_lock(run.path):
            opened = open_run(run.path, store, run.split, run.resolved, ranks, run.start)
            if isinstance(opened, TrainingRun):
                shown = Display(opened.step, opened.train.steps)
                with GracefulStop() as ranks.stop, shown as display, closing(opened):
                    display.print_line(opened.description)
                    opened.announce_time(display)
                    for step in evaluated_steps(opened):
                        opened.fit(display, until=step)
                        lines = [line for line in opened.metrics.lines if line.eval]
                        newest = self._report(trial, [(line.step, line.eval) for line in lines])
                        if newest == step < opened.train.steps and trial.should_prune():
                            opened.save()
                            return None, PrunedAt(step=step, accept_len=lines[-1].eval.accept_len)
                opened = opened.finish()
            else:  # by a process that was killed before it told, or for another study
                self._report(trial, logged_evaluations(run.path))
        print_visible(summary(run.path, store, opened))
        return opened.accept_len, None

    def _report(self, trial: "Trial", evaluations: Sequence[tuple[int, Evaluation]]) -> int:
        """Tell the study of each evaluation, by its step, that it does not know yet; return the newest step that it
        knows, which is farther than a run is that went on from there before."""
        known = {0, *self.study.get_trials(deepcopy=False)[trial.number].intermediate_values}
        for step, figures in evaluations:
            if figures.calls and step not in known:
                trial.report(figures.accept_len, step)
                known.add(step)
        return max(known)

    def left(self) -> list[int]:
        """Return the numbers of trials that are not finished and that no process has."""
        found = []
        with process_lock(self.folder, "search"):
            for trial in self.trials():
                if not trial.state.is_finished() and (fd := try_lock(self.locks / f"{trial.number}.lock")) is not None:
                    os.close(fd)
                    found.append(trial.number)
        return found

    # What is known of them

    def run_facts(self) -> list[Facts]:
        """Return the facts of every trial's run."""
        found = []
        for trial in self.trials():
            attributes, state = trial.user_attrs, trial.state.name  # a kill may have come between the two
            pruned = PrunedAt(**attributes["pruned"]) if state == "PRUNED" else None
            failed = attributes.get("failed") if state == "FAIL" else None
            try:
                run = self.plan(attributes["setting"])
            except UsageError as error:
                found.append(refused_facts(attributes["setting"], self.folder, failed or str(error), trial.number))
                continue
            found.append(run_facts(run, failed, pruned, trial.number))
        return found

    def planned_runs(self) -> dict[int, PlannedRun]:
        """Return the run of every trial that has one, by the trial's number."""
        found = {}
        for trial in self.trials():
            with suppress(UsageError):
                found[trial.number] = self.plan(trial.user_attrs["setting"])
        return found

    def rows(self) -> list[Row]:
        """Return a line for each trial, to show."""
        states = {"RUNNING": "running", "COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
        found = []
        for trial in self.trials():
            setting = trial.user_attrs["setting"]
            try:
                run = self.plan(setting)
                path, steps = run.path, run.steps
            except UsageError:
                path, steps = None, 0
            found.append(Row(str(trial.number), setting, path, steps, states[trial.state.name]))
        return found


def evaluated_steps(training: TrainingRun) -> list[int]:
    """Return the steps after which a run is evaluated, from where it is: a kill may have come before what follows."""
    train = training.train
    steps = [*range(train.eval_every, train.steps, train.eval_every), train.steps]
    return [step for step in steps if step >= training.step]


def logged_evaluations(run: Path) -> list[tuple[int, Evaluation]]:
    """Return the step and figures of each evaluation in a run's log; none where it is damaged: only pruning asks."""
    try:
        lines = read_log(run / METRICS)
    except PipelineError:
        return []
    return [(line["step"], Evaluation.model_validate(line["eval"])) for line in lines if line.get("eval")]
