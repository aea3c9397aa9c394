"""What a report page is of: evaluation reports, runs, sweeps and caches, found at the paths that were named.

A report leads to the run that it is of, and a run to its cache, where these are still there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pipeline.cache import HiddenCache
from pipeline.cache.layout import IDENTITY
from pipeline.errors import PipelineError, UsageError
from pipeline.evaluation.reports import Report, load_reports
from pipeline.runs.folder import RUN, Evaluation, Result, RunRecord, read_recipe, read_result, read_run
from pipeline.runs.recipe import Recipe
from pipeline.runs.run_logs import METRICS, TIMING, read_log
from pipeline.runs.sweep_record import SWEEP, read_sweep, setting_text

KINDS = "evaluation reports, runs, sweeps and caches"


@dataclass(frozen=True)
class Run:
    """A run's folder, read. name: what the page calls it."""

    path: Path
    name: str

    @cached_property
    def record(self) -> RunRecord:
        return read_run(self.path)

    @cached_property
    def recipe(self) -> Recipe:
        return read_recipe(self.path)

    @cached_property
    def result(self) -> Result | None:
        """None while the run is not finished."""
        return read_result(self.path)

    @cached_property
    def steps(self) -> list[dict]:
        """The logged steps, of each its metrics."""
        return [line for line in read_log(self.path / METRICS) if "loss" in line]

    @cached_property
    def evaluations(self) -> list[tuple[int, Evaluation]]:
        """Accept lengths on held-out samples, each with the step after which it was measured."""
        found = [line for line in read_log(self.path / METRICS) if (line.get("eval") or {}).get("calls")]
        return [(line["step"], Evaluation.model_validate(line["eval"])) for line in found]

    @cached_property
    def timing(self) -> list[dict]:
        return read_log(self.path / TIMING)

    def hours_after(self, step: int) -> float | None:
        """Return the hours of training until a step, over all restarts; None where the log does not reach it.

        A restarted run counts its seconds from nothing again. Evaluations and checkpoints are not in them.
        """
        total = last = 0.0
        for line in self.timing:
            if line["seconds"] < last:
                total += last
            last = line["seconds"]
            if line["step"] >= step:
                return (total + last) / 3600
        return None


@dataclass
class Contents:
    """What was found. runs: those of sweeps, too. sweeps, caches: folders, in the order they were met."""

    reports: list[Report] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    sweeps: list[Path] = field(default_factory=list)
    caches: list[Path] = field(default_factory=list)


def find_contents(paths: Sequence[Path]) -> Contents:
    """Read what is at `paths`. UsageError for what is nothing of ours, CacheError for damage."""
    found = Contents(reports=load_reports([path for path in paths if not path.is_dir()]))
    folders: dict[Path, Run] = {}  # by where they really are; a run without a name is called by its folder
    for path in paths:
        if (path / RUN).is_file():
            folders[path.resolve()] = Run(path, "")
        elif (path / SWEEP).is_file():
            found.sweeps.append(path)
            swept = [Run(Path(run.run), setting_text(run.setting)) for run in read_sweep(path).runs]
            folders |= {run.path.resolve(): run for run in swept if (run.path / RUN).is_file()}
        elif (path / IDENTITY).is_file():
            found.caches.append(path)
        elif path.is_dir():
            raise UsageError(f"{path} is none of {KINDS}; name one, such as runs/domino-… or hs_cache")
    for report in found.reports:
        run = Path(report.draft.path)
        if (run / RUN).is_file() and _is_of(report, run):
            folders.setdefault(run.resolve(), Run(run, ""))
    found.runs = _named(list(folders.values()))
    known = {path.resolve() for path in found.caches}
    for run in found.runs:
        cache = Path(run.record.cache.path)
        if cache.resolve() not in known and _is_cache_of(run, cache):
            known.add(cache.resolve())
            found.caches.append(cache)
    return found


def _is_of(report: Report, path: Path) -> bool:
    """Return whether a report is of the run that has its path now: another may have taken it since."""
    try:
        train = read_recipe(path).train
    except PipelineError:
        return False
    return (report.draft.steps, report.draft.seed) == (train.steps, train.seed)


def _is_cache_of(run: Run, cache: Path) -> bool:
    try:
        return (cache / IDENTITY).is_file() and HiddenCache.open(cache).digest == run.record.cache.digest
    except PipelineError:
        return False


def _named(runs: list[Run]) -> list[Run]:
    """Return runs with names: of those without one their folders', or whole paths where folders have the same name."""
    names = [run.name or run.path.resolve().name for run in runs]
    return [
        run if run.name else Run(run.path, name if names.count(name) == 1 else str(run.path))
        for run, name in zip(runs, names, strict=True)
    ]
