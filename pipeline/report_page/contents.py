"""What a report page is of: evaluation reports, runs, sweeps and caches, found at the paths that were named.

A report leads to the run that it is of, and a run to its cache, where these are still there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.cache import HiddenCache
from pipeline.cache.layout import IDENTITY
from pipeline.draft_folders import run_of
from pipeline.errors import PipelineError, UsageError
from pipeline.evaluation.reports import Report, load_reports
from pipeline.runs.folder import DONE, RUN
from pipeline.runs.recorded_run import RecordedRun
from pipeline.runs.run_logs import cumulative_seconds
from pipeline.runs.sweep_record import SWEEP, read_sweep, setting_text

KINDS = "evaluation reports, runs, sweeps and caches"


@dataclass
class Run(RecordedRun):
    """A run. name: what the page calls it. swept: its state, in a sweep."""

    name: str
    swept: str | None = None

    @property
    def state(self) -> str:
        """Whether it is finished; in a sweep, what became of it."""
        return self.swept or ("finished" if (self.path / DONE).is_file() else "not finished")

    def hours_after(self, step: int) -> float | None:
        """Return the hours of training until a step, over all restarts; None where the log does not reach it.

        Evaluations and checkpoints are not in them.
        """
        return next((seconds / 3600 for at, seconds in cumulative_seconds(self.timings) if at >= step), None)


@dataclass
class Contents:
    """What was found. runs: those of sweeps, too. sweeps, caches: folders, in the order they were met. followed: those
    of the caches that nobody named. warnings: what a reader has to know, a line each."""

    reports: list[Report] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    sweeps: list[Path] = field(default_factory=list)
    caches: list[Path] = field(default_factory=list)
    followed: set[Path] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)


def find_contents(paths: Sequence[Path]) -> Contents:
    """Read what is at `paths`, and what that leads to.

    Raises UsageError for what is nothing of ours, and for runs of several targets; CacheError for damage of what was
    named. What was only followed and is damaged is left out, with a warning.
    """
    found = Contents(reports=load_reports([path for path in paths if not path.is_dir()]))
    runs: dict[Path, Run] = {}  # by where they really are; a run without a name is called by its folder
    for path in paths:
        if (path / RUN).is_file():
            runs[path.resolve()] = Run(path, "")
        elif (path / SWEEP).is_file():
            found.sweeps.append(path)
            runs |= {run.path.resolve(): run for run in _runs_of_sweep(path, found)}
        elif (path / IDENTITY).is_file():
            found.caches.append(path)
        elif path.is_dir():
            raise UsageError(f"{path} is none of {KINDS}; name one, such as runs/domino-… or hs_cache")
    for report in found.reports:
        run = _run_of_report(report, found)
        if run is not None:
            runs.setdefault(run.path.resolve(), run)
    found.runs = _named(list(runs.values()))
    _check_comparable(found)
    known = {path.resolve() for path in found.caches}
    for run in found.runs:
        cache = Path(run.record.cache.path)
        if cache.resolve() not in known and _is_cache_of(run, cache):
            known.add(cache.resolve())
            found.caches.append(cache)
            found.followed.add(cache)
    return found


def _runs_of_sweep(folder: Path, found: Contents) -> list[Run]:
    """Return a sweep's runs where they were written, or beside or in its folder, if that was moved."""
    runs, swept = [], read_sweep(folder).runs
    for each in swept:
        written = Path(each.run)
        places = [written, folder / written.name, folder.resolve().parent / written.name]
        there = next((place for place in places if (place / RUN).is_file()), None)
        if there is not None:
            runs.append(Run(there, setting_text(each.setting), each.state))
    if len(runs) < len(swept):
        found.warnings.append(f"{folder}: of {len(swept) - len(runs)} of its {len(swept)} runs there is no folder here")
    return runs


def _run_of_report(report: Report, found: Contents) -> Run | None:
    """Return the run that a report is of, where that is still there: another may have taken its path since."""
    if report.draft.recipe is None:
        return None
    try:
        run = Run(run_of(Path(report.draft.path)), "")
        if (run.path / RUN).is_file() and _is_of(report, run):
            _ = run.record, run.result, run.evaluations, run.timings
            return run
    except UsageError:  # nothing is there, or something else
        pass
    except PipelineError as error:
        found.warnings.append(f"the run of {report.draft.path} is left out: {error}")
    return None


def _is_of(report: Report, run: Run) -> bool:
    found = run.recipe.seedless_digest(), run.recipe.train.seed
    return found == (report.draft.recipe, report.draft.seed)


def _check_comparable(found: Contents) -> None:
    """Refuse runs of several targets, and warn of runs whose accept lengths are not of the same replies."""
    targets = {run.record.target for run in found.runs} | {report.target for report in found.reports}
    if len(targets) > 1:
        raise UsageError(f"these are of several targets, {sorted(targets)}; put those of one on a page")
    for what, digests in (
        ("caches", {run.record.cache.digest for run in found.runs}),
        ("samples trained on and held out", {run.record.split.digest for run in found.runs}),
    ):
        if len(digests) > 1:
            found.warnings.append(
                f"the runs are of {len(digests)} different {what}: accept lengths measured during training are not of "
                "the same replies, and differ not by the drafts alone"
            )


def _is_cache_of(run: Run, cache: Path) -> bool:
    try:
        return (cache / IDENTITY).is_file() and HiddenCache.open(cache).digest == run.record.cache.digest
    except PipelineError:
        return False


def _named(runs: list[Run]) -> list[Run]:
    """Return runs with names of their own: folders' for those without one, whole paths where names are the same."""
    names = [run.name or run.path.resolve().name for run in runs]
    return [
        replace(run, name=name if names.count(name) == 1 else f"{name} ({run.path})")
        for run, name in zip(runs, names, strict=True)
    ]
