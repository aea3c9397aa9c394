"""A sweep on a report page: its settings by accept length, their ratios, and what became of every run."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.report_page.charts import Chart, axis, draw, palette
from pipeline.report_page.draft_charts import GAINED, point_text
from pipeline.report_page.table import Table
from pipeline.runs.sweep_record import PooledSetting, Ratio, Setting, SweepRecord, SweptRun, read_sweep, setting_text
from pipeline.visible_text import visible

MOST_SETTINGS = 40  # in a chart, the best ones


@dataclass(frozen=True)
class SweepSection:
    """A sweep for the template."""

    title: str
    facts: list[tuple[str, str]]
    warnings: list[str]
    charts: list[Chart]
    runs: Table
    ratios: Table


def sweep_section(name: str, path: Path) -> SweepSection:
    """Return a sweep's section. name: a word of its own on the page, for its charts. UsageError, CacheError."""
    sweep = read_sweep(path)
    charts = [_settings_chart(f"{name}-settings", sweep.pooled), _ratios_chart(f"{name}-ratios", sweep)]
    return SweepSection(
        title=visible(path),
        facts=_facts(sweep),
        warnings=[visible(warning) for warning in sweep.warnings],
        charts=[chart for chart in charts if chart],
        runs=_runs(sweep.runs),
        ratios=_ratios(sweep.ratios),
    )


def _text(setting: Setting) -> str:
    return visible(setting_text(setting)) or "as it is"


def _facts(sweep: SweepRecord) -> list[tuple[str, str]]:
    search = sweep.search
    facts = {
        "recipe": sweep.recipe,
        "target": sweep.target,
        "cache": f"{sweep.cache}, identity {sweep.cache_digest}",
        "first weights": sweep.init_from or "drawn at random",
        "runs": f"{len(sweep.runs)}, {sum(run.state == 'finished' for run in sweep.runs)} of them finished",
        "search": f"{search.sampler}, seed {search.seed}, {search.trials} trials" if search else "all combinations",
        "version": f"draft-pipeline {sweep.version}",
        "command": shlex.join(sweep.command),
    }
    return [(name, visible(value)) for name, value in facts.items()]


def _settings_chart(name: str, pooled: Sequence[PooledSetting]) -> Chart | None:
    """Draw the accept length of each setting, and of each of its seeds."""
    measured = [entry for entry in pooled if entry.accept_len is not None]
    if not measured:
        return None
    shown = measured[:MOST_SETTINGS]
    labels = [_text(entry.setting) for entry in shown]
    first = [_text(dict([*entry.setting.items()][:1])) for entry in shown]
    rows = [
        {
            "series": kind,
            "setting": label,
            "value": entry.accept_len,
            "low": entry.interval[0],
            "high": entry.interval[1],
        }
        for entry, label, kind in zip(shown, labels, first, strict=True)
    ]
    seeds = [
        {"series": kind, "setting": label, "value": length}
        for entry, label, kind in zip(shown, labels, first, strict=True)
        for length in entry.seeds
    ]
    kinds = [*dict.fromkeys(first)]
    place = {
        "x": axis("value", GAINED, zero=False),
        "y": {"field": "setting", "type": "nominal", "sort": labels, "title": None},
    }
    colour = {"color": palette(kinds)["color"]}
    ends = {"x": place["x"] | {"field": "low"}, "x2": {"field": "high"}}
    rings = {"type": "point", "size": 28, "filled": False, "opacity": 0.9}
    layers = [
        {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": place | ends | colour},
        {"mark": {"type": "point", "filled": True, "size": 80, "opacity": 1}, "encoding": place | palette(kinds)},
        {"data": {"values": seeds}, "mark": rings, "encoding": place | colour},
    ]
    table = [
        [
            _text(entry.setting),
            point_text((entry.accept_len, *entry.interval)) if entry.interval else "-",
            f"{entry.measured} of {entry.runs}",
            ", ".join(f"{length:.2f}" for length in entry.seeds),
        ]
        for entry in pooled
    ]
    title = "Accept length by setting"
    note = "On held-out samples, seeds pooled; bars: 95 % intervals over replies; small rings: single seeds."
    note += f" The best {len(shown)} of {len(measured)}." if len(shown) < len(measured) else ""
    svg = draw(name, title, layers, rows, height=22 * len(shown))
    return Chart(title, svg, ["setting", "accept length", "runs measured", "by seed"], table, note)


def _ratios_chart(name: str, sweep: SweepRecord) -> Chart | None:
    """Draw each setting's accept length as a share of the best one's, paired by reply."""
    best = sweep.pooled[0].setting if sweep.pooled else None
    found = [ratio for ratio in sweep.ratios if ratio.to == best][:MOST_SETTINGS]
    if not found:
        return None
    labels = [_text(ratio.setting) for ratio in found]
    rows = [
        {"setting": label, "value": ratio.value, "low": ratio.interval[0], "high": ratio.interval[1]}
        for label, ratio in zip(labels, found, strict=True)
    ]
    place = {
        "x": axis("value", "accept length, as a share of the best setting's", zero=False),
        "y": {"field": "setting", "type": "nominal", "sort": labels, "title": None},
    }
    ends = place | {"x": place["x"] | {"field": "low"}, "x2": {"field": "high"}}
    layers = [
        {"mark": {"type": "rule", "strokeWidth": 2, "color": "var(--c0)"}, "encoding": ends},
        {"mark": {"type": "point", "filled": True, "size": 80, "opacity": 1, "color": "var(--c0)"}, "encoding": place},
    ]
    title = f"Compared with the best: {_text(best)}"
    note = "Paired by reply and by seed; 95 % intervals over replies."
    table = [[label, point_text((ratio.value, *ratio.interval), 3)] for label, ratio in zip(labels, found, strict=True)]
    return Chart(title, draw(name, title, layers, rows, height=22 * len(rows)), ["setting", "ratio"], table, note)


def _runs(runs: Sequence[SweptRun]) -> Table:
    heads = ["run", "setting", "state", "accept length", "steps", "seconds", "samples and order"]
    rows = []
    for run in runs:
        ended = f": {run.failed}" if run.failed else f" at step {run.pruned.step:,}" if run.pruned else ""
        length = "-" if None in (run.accept_len, run.interval) else point_text((run.accept_len, *run.interval))
        seconds = "-" if run.seconds is None else f"{run.seconds:,.0f}"
        name = visible(Path(run.run).name)
        state = visible(f"{run.state}{ended}")
        rows.append([name, _text(run.setting), state, length, f"{run.steps:,}", seconds, visible(run.data[:8])])
    return Table(heads, rows)


def _ratios(ratios: Sequence[Ratio]) -> Table:
    heads = ["setting", "compared with", "ratio", "by seed", "replies", "same samples and order"]
    rows = [
        [
            _text(ratio.setting),
            _text(ratio.to),
            point_text((ratio.value, *ratio.interval), 3),
            ", ".join(f"{value:.3f}" for value in ratio.by_seed),
            f"{ratio.replies:,}",
            "yes" if ratio.same_data else "no",
        ]
        for ratio in ratios
    ]
    return Table(heads, rows)
