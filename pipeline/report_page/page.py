"""`pipeline report --page`: everything that is known of drafts, runs and caches on one HTML page.

The page is one file: no script, no font and no picture from elsewhere. Its policy forbids browsers to run or to fetch
anything, and every text in it is escaped, so that no domain's name and no reply can do more than be read.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pipeline import __version__
from pipeline.cache.atomic import write_errors, write_file
from pipeline.errors import PipelineError, UsageError
from pipeline.evaluation.reports import Report, load_reports, pool_seeds
from pipeline.evaluation.tables import FACTS, accept_length_text, sampled_at, temperature_text, temperatures_of
from pipeline.report_page.cache_section import CacheSection, cache_section
from pipeline.report_page.charts import Chart
from pipeline.report_page.coloured_replies import SHADES, Reply, replies
from pipeline.report_page.contents import Contents, Run, find_contents
from pipeline.report_page.draft_charts import (
    by_domain,
    by_slot,
    compared,
    most_gaining,
    of_reports,
    of_runs,
    point_text,
)
from pipeline.report_page.sweep_section import sweep_section
from pipeline.report_page.table import Table
from pipeline.report_page.training_charts import accept_lengths, curve, curves, losses, thinned, where_time_went
from pipeline.runs.sweep_record import read_sweep
from pipeline.secret_masking import masked_command
from pipeline.visible_text import visible

GENERATOR = "pipeline report"
MOST_RUNS = 6  # that share a chart; more cannot be told apart
MOST_DETAILS = 12  # runs with a section of their own
SHOWN_TOKENS = 12_000  # of all sample replies together, about 100 bytes each


@dataclass(frozen=True)
class RunSection:
    """One run for the template."""

    name: str
    facts: list[tuple[str, str]]
    charts: list[Chart]
    recipe: str


def write_page(
    paths: Sequence[Path], out: Path, against: Sequence[Path] = (), command: Sequence[str] | None = None
) -> None:
    """Write a page about evaluation reports, runs, sweeps and caches.

    against: reports of the draft that the others are compared with. command: the command line that asked for the page,
    which it then states. Raises UsageError for what is none of these, and where `out` is something else than a page;
    CacheError for damage; RoomError where the page cannot be written.
    """
    check_out(out)
    text = render(find_contents(paths), load_reports(against), command)
    with write_errors(out, "a page"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, text.encode())


def check_out(out: Path) -> None:
    """Refuse to write a page over anything else: the word behind --page may be meant as a report to read."""
    if out.is_dir():
        raise UsageError(f"--page {out} is a folder; name a file in it, such as {out / 'report.html'}")
    if out.exists() and GENERATOR.encode() not in read_start(out):
        raise UsageError(f"--page {out} would replace a file that is no page of ours; name another file behind --page")


def read_start(path: Path) -> bytes:
    """Return a file's first bytes; none of what is no regular file."""
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(1000)


def render(found: Contents, baseline: Sequence[Report] = (), command: Sequence[str] | None = None) -> str:
    """Return the page as HTML."""
    folder = resources.files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(folder.joinpath("page.html.jinja").read_text("utf-8"))
    shown, caches = best(found.runs, MOST_RUNS), cache_sections(found)
    return template.render(
        style=Markup(folder.joinpath("page.css").read_text("utf-8")),
        title=_title(found),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, draft-pipeline {__version__}",
        generator=GENERATOR,
        command=command and visible(shlex.join(masked_command(command))),
        summary=summary(found),
        warnings=[visible(line) for line in found.warnings],
        decoded=bool(found.reports),
        gains=gain_charts(found, baseline),
        replies={visible(name): shown for name, shown in _replies(found.reports).items() if shown},
        shades=SHADES,
        training=training_charts(shown),
        charted=len(shown),
        run_count=len(found.runs),
        runs=[run_section(f"run{number}", run) for number, run in enumerate(best(found.runs, MOST_DETAILS))],
        sweeps=[sweep_section(f"sweep{number}", path) for number, path in enumerate(found.sweeps)],
        caches=caches,
    )


def cache_sections(found: Contents) -> list[CacheSection]:
    """Return a section a cache; a damaged one that nobody named becomes a warning."""
    sections = []
    for number, path in enumerate(found.caches):
        try:
            sections.append(cache_section(f"cache{number}", path))
        except PipelineError as error:
            if path not in found.followed:
                raise
            found.warnings.append(f"the cache {path} is left out: {error}")
    return sections


def _title(found: Contents) -> str:
    targets = [report.target for report in found.reports] + [run.record.target for run in found.runs]
    targets += [read_sweep(path).target for path in found.sweeps]
    return visible(f"Drafts for {', '.join(dict.fromkeys(targets))}") if targets else "A cache of hidden states"


def gain_charts(found: Contents, baseline: Sequence[Report]) -> list[Chart]:
    """Return what drafts gain: as evaluated with the target, else as measured by their runs on held-out samples."""
    ways = of_reports(found.reports) if found.reports else {"held-out samples": of_runs(found.runs)}
    charts = [compared("pairs", found.reports, baseline)] if found.reports else []
    for number, (how, drafts) in enumerate(ways.items()):
        if drafts:
            shown = most_gaining(drafts, MOST_RUNS)
            drawn = [by_domain(f"domains{number}", shown, how), by_slot(f"slots{number}", shown, how)]
            left_out = f" Of {len(drafts)} drafts those that gain most." if len(shown) < len(drafts) else ""
            charts += [replace(chart, note=f"{chart.note}{left_out}".strip()) for chart in drawn if chart]
    return [chart for chart in charts if chart]


def _replies(reports: Sequence[Report]) -> dict[str, list[Reply]]:
    """Return sample replies of the first drafts, of each its first seed; cut, so that the page stays small."""
    firsts = {name: members[0] for name, members in [*pool_seeds(reports).items()][:MOST_RUNS]}
    most = SHOWN_TOKENS // max(1, sum(len(report.replies) for report in firsts.values()))
    return {name: replies(report, most) for name, report in firsts.items()}


def summary(found: Contents) -> Table | None:
    """Return one row a draft, None where there is none: a sweep has a table of its runs."""
    if found.reports:
        return report_summary(found.reports)
    alone = [run for run in found.runs if run.swept is None]
    return run_summary(alone) if alone else None


def report_summary(reports: Sequence[Report]) -> Table:
    """Return a row for each evaluated draft: what `pipeline report` prints as columns."""
    temperatures = temperatures_of(reports)
    drawn = [f"accept length, T = {temperature_text(*pair)}" for pair in temperatures]
    rows = [
        [
            visible(name),
            accept_length_text(members),
            *(accept_length_text(sampled_at(members, pair)) for pair in temperatures),
            *(figure(members) for figure in FACTS.values()),
        ]
        for name, members in pool_seeds(reports).items()
    ]
    return Table(["draft", "accept length", *drawn, *FACTS], rows)


def run_summary(runs: Sequence[Run]) -> Table:
    """Return a row for each run, with the accept length of its last evaluation."""
    rows = []
    for run in runs:
        step, last = run.evaluations[-1] if run.evaluations else (0, None)
        length = point_text((last.accept_len, *last.interval)) if last else "not measured"
        done = f"{run.steps[-1]['step']:,} of {run.recipe.train.steps:,}" if run.steps else "none yet"
        parameters = f"{run.result.parameters:,}" if run.result else "-"
        rows.append([visible(run.name), run.recipe.draft.method, length, f"{step:,}", done, parameters])
    return Table(["run", "method", "accept length", "after steps", "steps trained", "parameters"], rows)


def best(runs: Sequence[Run], most: int) -> list[Run]:
    """Return at most so many runs, those with the longest accept lengths, in their own order."""

    def length(run: Run) -> float:
        return run.evaluations[-1][1].accept_len if run.evaluations else 0.0

    kept = sorted(runs, key=length, reverse=True)[:most]
    return [run for run in runs if run in kept]


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return what runs have in common, in charts that they share."""
    found = [*accept_lengths("lengths", runs), *curves("curves", runs), where_time_went("time", runs)]
    return [chart for chart in found if chart]


def run_section(name: str, run: Run) -> RunSection:
    """Return a run's section. name: a word of its own on the page, for its charts."""
    norms = [("gradient norm", line) for line in thinned(run.steps)]
    title = f"{visible(run.name)}: gradient norm"
    drawn = [losses(f"{name}-loss", run), curve(f"{name}-norm", title, "gradient norm", norms, "grad_norm")]
    return RunSection(visible(run.name), run_facts(run), [chart for chart in drawn if chart], run.recipe.toml())


def run_facts(run: Run) -> list[tuple[str, str]]:
    """Return what a run is: target, cache, samples, start, versions, machine and command line."""
    record = run.record
    start = record.start and f"{record.start.place}, digest {record.start.digest}"
    facts = {
        "folder": run.path,
        "state": run.state,
        "target": record.target,
        "cache": f"{record.cache.path}, identity {record.cache.digest}",
        "rounded columns": ", ".join(record.cache.rounded),
        "samples": f"{record.split.train:,} to train on, {record.split.heldout:,} held out",
        "first weights": start or "drawn at random",
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "machine": ", ".join(f"{name} {value}" for name, value in record.machine.items()),
        "command": shlex.join(record.command),
    }
    return [(name, visible(value)) for name, value in facts.items() if value]
