"""The progress of a sweep: of the runs that its sweep.json lists, or of all runs in a folder without one.

What a run's own folder says goes before sweep.json, which is written at a sweep's start and end, by a search
with every trial, too: a run that failed and was tried again may be finished by now. Only sweep.json tells which runs
are still to come.
"""

import time
from pathlib import Path

from pipeline.runs.run_logs import number
from stages.watch.locks import is_held
from stages.watch.run_progress import FRESH_S, RECIPE, RunProgress, modified, read_json

REPORT = "sweep.json"  # see pipeline/runs/sweep_record.py
JOURNALS, TRIAL_LOCKS = "*.journal", "trials-*/*.lock"  # of a search, see stages/train_draft/sweep_study.py
ENDED = ("finished", "failed", "pruned")  # a run's state; no other comes behind it


class SweepProgress:
    """A folder of runs that is watched; `facts` looks again, and finds runs that were begun since."""

    kind = "sweep"

    def __init__(self, path: Path):
        self.path = path
        self._runs: dict[str, RunProgress] = {}

    def facts(self) -> dict:
        """Return what each run that has begun is at now, as JSON values. planned: how many runs there are to be; None
        without a sweep.json."""
        report = read_json(self.path / REPORT)
        listed = listed_runs(report)
        runs = self._facts_of_runs(listed)
        ended = {name for name, run in runs.items() if run["state"] in ENDED}
        search = report.get("search") if isinstance(report.get("search"), dict) else {}
        planned = int(number(search.get("trials")) or len(listed)) or None
        if any(run["state"] == "running" for run in runs.values()) or self._searches():
            state = "running"
        elif not runs:
            state = "waiting"
        elif ended < runs.keys():
            state = "stopped"
        elif planned and planned <= len(ended) and listed.keys() <= ended:
            state = "finished"
        elif time.time() - self._written() < FRESH_S:  # between two runs, as it seems
            state = "running" if planned else "waiting"
        else:  # for good; a search ends early where it finds no more settings
            state = "stopped" if planned and not (search and listed and listed.keys() <= ended) else "finished"
        return {
            "kind": self.kind,
            "path": str(self.path),
            "state": state,
            "planned": planned,
            "runs": list(runs.values()),
        }

    def _facts_of_runs(self, listed: dict[str, dict]) -> dict[str, dict]:
        """Return the facts of all runs that have begun, by the names of their folders, in order."""
        for folder in run_folders(self.path):
            self._runs.setdefault(folder.name, RunProgress(folder))
        for name, run in listed.items():
            folder = None if name in self._runs else run_folder(self.path, name, run["run"])
            if folder is not None:
                self._runs[name] = RunProgress(folder)
        found = {name: progress.facts() for name, progress in self._runs.items()}
        for name, run in listed.items():
            recorded = recorded_state(run)
            if name not in found and recorded in ENDED:  # its folder is not seen from here
                found[name] = RunProgress(self.path / name).facts() | {"state": recorded}
            elif name in found and found[name]["state"] == "stopped" and recorded in ENDED:
                found[name]["state"] = recorded
        return dict(sorted(found.items()))

    def _searches(self) -> bool:
        """Return whether a process of this machine is at a trial, as its lock says; its run may not be listed yet."""
        return any(is_held(lock) for lock in self.path.glob(TRIAL_LOCKS))

    def _written(self) -> float:
        """Return when something was last written, in seconds since the epoch."""
        of_runs = (run.written() for run in self._runs.values())
        return max([modified(self.path / REPORT), *map(modified, self.path.glob(JOURNALS)), *of_runs])


def listed_runs(report: dict) -> dict[str, dict]:
    """Return the runs in a sweep.json by the names of their folders."""
    runs = report.get("runs")
    found = [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
    named = {Path(str(run.get("run"))).name: run for run in found if isinstance(run.get("run"), str)}
    return {name: run for name, run in named.items() if name not in ("", "..")}


def recorded_state(run: dict) -> str | None:
    """Return the state of a run in a sweep.json, of an earlier version, too."""
    state = run.get("state") or ("failed" if run.get("failed") else None)
    return state if isinstance(state, str) else None


def run_folder(sweep: Path, name: str, path: str) -> Path | None:
    """Return the folder of a run: at its path in sweep.json, seen from here, or beside the sweep; None before it is
    there. Without --out a sweep has its runs beside its own folder."""
    return next((folder for folder in (Path(path), sweep.parent / name) if (folder / RECIPE).is_file()), None)


def run_folders(path: Path) -> list[Path]:
    """Return the folders of runs in a folder; none where it cannot be listed."""
    try:
        return [entry for entry in path.iterdir() if (entry / RECIPE).is_file()]
    except OSError:
        return []
