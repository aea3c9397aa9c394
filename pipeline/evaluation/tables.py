"""Tables of several evaluations, as rich renderables or Markdown: side by side, and drafts compared with a baseline."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.console import Group
from rich.text import Text

from pipeline.errors import UsageError
from pipeline.evaluation.plot import steps_rows
from pipeline.evaluation.reports import (
    QUANTILES,
    Report,
    accept_length,
    load_reports,
    paired_accept_lengths,
    pool_seeds,
    tokens_and_calls,
)
from pipeline.visible_tables import Grid, grid
from pipeline.visible_text import escape_markdown, visible


def comparison(paths: Sequence[Path], markdown: bool = False, forced: bool = False) -> Group | str:
    """Return evaluations side by side: a column a draft, a row a domain, accept length with its 95 % interval.

    Reports that differ only in their seed are pooled into one column. Sampled replies have rows of their own.
    `forced` adds the teacher-forced figures.
    """
    columns = pool_seeds(load_reports(paths))
    reports = [report for members in columns.values() for report in members]
    domains = sorted({domain for report in reports for domain in report.domains})
    figures = {domain: partial(accept_length_text, domain=domain) for domain in domains}
    figures |= {"all": accept_length_text, "mean of domains": _mean_of_domains}
    for temperatures in temperatures_of(reports):
        figures |= _sampled_rows(temperatures)
    if forced:
        figures |= {f"{domain}, forced": partial(_forced, domain=domain) for domain in domains}
    name = escape_markdown if markdown else visible
    rows = [["accept length", *map(name, columns)]]
    rows += [[name(title), *map(figure, columns.values())] for title, figure in (figures | FACTS).items()]
    if markdown:
        return as_markdown(rows)
    first = next(iter(columns.values()))[0]
    note = (
        f"{visible(first.target)}, greedy where no T is named, replies of {first.settings.max_new} tokens at "
        "most; tokens gained per target call, the target's own included; 95 % intervals over prompts"
    )
    forced_note = "\nforced: teacher-forced, on the cache's replies" if forced else ""
    return Group(as_grid(rows), "", Text(note + forced_note, style="dim"))


def _sampled_rows(temperatures: tuple[float, float]) -> dict[str, Callable[[list[Report]], str]]:
    """Rows of sampled replies: over all prompts, and over domains."""
    title = f"T = {temperature_text(*temperatures)}"
    return {
        f"all, {title}": lambda reports: accept_length_text(sampled_at(reports, temperatures)),
        f"mean of domains, {title}": lambda reports: _mean_of_domains(sampled_at(reports, temperatures)),
    }


def _mean_of_domains(reports: list[Report]) -> str:
    """Each domain counts the same, as benchmarks average their sets; in "all" one counts as often as it needs calls."""
    lengths = [figures.accept_len for report in reports for figures in report.domains.values() if figures.calls]
    return f"{fmean(lengths):.2f}" if lengths else "-"


def _forced(reports: list[Report], domain: str) -> str:
    lengths = [report.teacher_forced[domain] for report in reports if domain in report.teacher_forced]
    return f"{fmean(lengths):.2f}" if lengths else "-"


def seed_count(reports: Sequence[Report]) -> str:
    """Return how many seeds reports are of, as text."""
    return str(len({report.draft.seed for report in reports}))


def sampled_at(reports: Sequence[Report], temperatures: tuple[float, float]) -> list[Report]:
    """Return the reports with replies sampled at these temperatures of target and draft, in place of greedy ones."""
    return [
        report.with_sampled_replies()
        for report in reports
        if report.sampled and report.sampled.temperatures == temperatures
    ]


def temperatures_of(reports: Sequence[Report]) -> list[tuple[float, float]]:
    """Return the temperatures of target and draft that any of the reports sampled at, ascending."""
    return sorted({report.sampled.temperatures for report in reports if report.sampled})


def temperature_text(temperature: float, of_draft: float) -> str:
    """Return how a row names two temperatures: the draft's only where it is another."""
    drafts = "" if of_draft == temperature else f", drafts at {of_draft:g}" if of_draft else ", greedy drafts"
    return f"{temperature:g}{drafts}"


def accept_length_text(reports: Sequence[Report], domain: str | None = None) -> str:
    """Return the accept length over one domain or all, with its interval, as a table shows it."""
    found = accept_length(reports, domain)
    return "{:.2f} [{:.2f}, {:.2f}]".format(*found) if found else "-"


def as_grid(rows: list[list[str]]) -> Grid:
    """Return rows, the first of them heads, as a table for a terminal."""
    table = grid(rows[0][0], *(f">{head}" for head in rows[0][1:]))
    for row in rows[1:]:
        table.add_row(*row)
    return table


def as_markdown(rows: list[list[str]]) -> str:
    """Return rows, the first of them heads, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])


def against_baseline(paths: Sequence[Path], baseline: Sequence[Path], markdown: bool = False) -> Group | str:
    """Return the drafts of `paths` compared with the one of `baseline`, whose reports differ in their seed only.

    UsageError for several baselines, or replies to other prompts.
    """
    loaded = load_reports([*paths, *baseline])
    reports, base = loaded[: len(paths)], loaded[len(paths) :]
    baselines = pool_seeds(base)
    if len(baselines) > 1:
        raise UsageError(f"--against: {' and '.join(baselines)} are several drafts; name the seeds of one")
    shown = escape_markdown if markdown else visible
    (title,) = map(shown, baselines)
    rows = [row for name, members in pool_seeds(reports).items() for row in _draft_rows(shown(name), members, base)]
    tables = [[["draft", "seeds", "T", "accept length", f"ratio to {title}", "by seed"], *rows]]
    if as_good := steps_rows(reports, base):
        heads = [f"as good as {title}", "measured after", "steps", "of its own"]
        tables.append([heads, *([shown(kind), *rest] for kind, *rest in as_good)])
    if markdown:
        return "\n\n".join(map(as_markdown, tables))
    note = (
        "accept length over all prompts, and its ratio paired by prompt, each with its 95 % interval over prompts; by "
        "seed: the lowest and highest ratio"
    )
    if as_good:
        note += (
            "; as good as: after how many steps a draft's accept length, straight in the logarithm of steps, reaches "
            "the other's; of its own: these steps as a share of the other's"
        )
    return Group(*(part for table in tables for part in (as_grid(table), "")), Text(note, style="dim"))


def _draft_rows(name: str, members: list[Report], base: list[Report]) -> Iterator[list[str]]:
    """A draft's rows: of greedy replies, and of those sampled at each temperature."""
    yield [name, seed_count(members), "0", accept_length_text(members), *_paired_ratio(members, base)]
    for temperatures in temperatures_of(members):
        sampled, sampled_base = sampled_at(members, temperatures), sampled_at(base, temperatures)
        ratio = _paired_ratio(sampled, sampled_base)
        yield ["", "", temperature_text(*temperatures), accept_length_text(sampled), *ratio]


def _paired_ratio(members: list[Report], base: list[Report]) -> tuple[str, str]:
    """The ratio with its interval, and the seeds' lowest and highest, as text."""
    found = paired_ratio(members, base)
    if found is None:
        return "-", "-"
    by_seed = "{:.3f} - {:.3f}".format(*found["by_seed"]) if found["by_seed"] else "-"
    return "{:.3f} [{:.3f}, {:.3f}]".format(found["value"], *found["interval"]), by_seed


def paired_ratio(members: list[Report], base: list[Report]) -> dict | None:
    """Return the ratio to a baseline, its interval, and the seeds' lowest and highest; None where nothing was decoded.

    A seed is compared with the baseline's own; by_seed is None where there are not several.
    """
    if not tokens_and_calls(members) or not tokens_and_calls(base):
        return None
    draft, baseline = paired_accept_lengths(members, base)
    low, high = np.quantile(draft.resampled_B / baseline.resampled_B, QUANTILES)
    ratios = [draft.by_seed[seed] / baseline.by_seed[seed] for seed in draft.by_seed.keys() & baseline.by_seed.keys()]
    by_seed = [float(min(ratios)), float(max(ratios))] if len(ratios) > 1 else None
    return {
        "value": float(draft.overall / baseline.overall),
        "interval": [float(low), float(high)],
        "by_seed": by_seed,
    }


def _speedup(reports: list[Report]) -> str:
    """The mean, where every report measured both loops side by side: with plain replies from a file none did."""
    speedups = [report.speed.speedup for report in reports]
    return "-" if None in speedups else f"{fmean(speedups):.2f}x"


def _engine_length(reports: list[Report]) -> str:
    """The mean over seeds; reports of earlier versions have none."""
    lengths = [report.overall.engine_accept_len for report in reports]
    return "-" if None in lengths else f"{fmean(lengths):.2f}"


def _lossless(reports: list[Report]) -> str:
    prompts, identical, near_ties = (
        sum(getattr(report.lossless, count) for report in reports) for count in ("prompts", "identical", "near_ties")
    )
    ties = f", {near_ties} near ties" if near_ties else ""
    return f"{identical} of {prompts} identical{ties}"


FACTS: dict[str, Callable[[list[Report]], str]] = {
    "block, proposals": lambda reports: f"{reports[0].draft.block_size}, {reports[0].verified_proposals}",
    "accept length as vLLM counts": _engine_length,
    "target calls saved": lambda reports: f"{fmean(report.overall.calls_saved for report in reports):.0%}",
    "speed-up on this machine": _speedup,
    "output against plain decoding": _lossless,
    "draft parameters": lambda reports: f"{reports[0].draft.parameters:,}",
    "seeds": seed_count,
}
