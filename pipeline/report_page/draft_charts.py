"""What drafts gain, as charts: by domain, by slot, and compared with one of them prompt by prompt."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.errors import UsageError
from pipeline.evaluation.accept_length import bootstrap
from pipeline.evaluation.reports import Report, accept_length, pool_seeds
from pipeline.evaluation.tables import paired_ratio, sampled_at, temperature_text, temperatures_of
from pipeline.report_page.charts import (
    Chart,
    axis,
    draw,
    interval_layer,
    line_layers,
    palette,
)
from pipeline.report_page.contents import Run
from pipeline.visible_text import visible

ROW = 15  # pixels that a draft takes in a domain
MOST_DOMAINS = 30  # in a chart
TOTAL = "all"
GAINED = "tokens gained per target call"
Point = tuple[float, float | None, float | None]  # a figure and the ends of its 95 % interval


@dataclass(frozen=True)
class Measured:
    """What one draft gains. total: accept length over everything. domains: by domain, each with its number of target
    calls. slots: share of target calls that kept proposal 1, 2, ..."""

    name: str
    total: Point | None
    domains: dict[str, tuple[Point, int]]
    slots: list[Point]


def of_reports(reports: Sequence[Report]) -> dict[str, list[Measured]]:
    """Return what the drafts of evaluation reports gain, their seeds pooled: by how replies were decoded."""
    drafts = pool_seeds(reports)
    measured = {"greedy": [_pooled(visible(name), members) for name, members in drafts.items()]}
    for temperatures in temperatures_of(reports):
        drawn = {name: sampled_at(members, temperatures) for name, members in drafts.items()}
        found = [_pooled(visible(name), members) for name, members in drawn.items() if members]
        measured[f"T = {temperature_text(*temperatures)}"] = found
    return measured


def _pooled(name: str, members: Sequence[Report]) -> Measured:
    calls: dict[str, int] = defaultdict(int)
    for report in members:
        for domain, figures in report.domains.items():
            calls[domain] += figures.calls
    found = {domain: accept_length(members, domain) for domain in sorted(calls)}
    domains = {domain: (tuple(map(float, point)), calls[domain]) for domain, point in found.items() if point}
    total = accept_length(members)
    return Measured(name, total and tuple(map(float, total)), domains, _slots(members))


def _slots(members: Sequence[Report]) -> list[Point]:
    """Acceptance by slot with intervals over prompts; none of reports that do not say what each call kept."""
    count = min(report.verified_proposals for report in members)
    kept = [[sample.matched for sample in report.samples] for report in members]
    prompts = [[length for seed in seeds for length in seed] for seeds in zip(*kept, strict=True)]
    prompts = [np.array(matched) for matched in prompts if matched]
    if not prompts:
        return []
    calls_n = np.array([len(matched) for matched in prompts], float)
    points = []
    for slot in range(count):
        kept_n = np.array([(matched > slot).sum() for matched in prompts], float)
        points.append((kept_n.sum() / calls_n.sum(), *bootstrap(kept_n, calls_n, seed=0)))
    return points


def of_runs(runs: Sequence[Run]) -> list[Measured]:
    """Return what runs gain by their last evaluation on held-out samples."""
    return [_of_run(run) for run in runs if run.evaluations]


def _of_run(run: Run) -> Measured:
    _, last = run.evaluations[-1]
    domains = {
        name: ((figures.accept_len, *figures.interval), figures.calls)
        for name, figures in last.domains.items()
        if figures.calls
    }
    total = (last.accept_len, *last.interval)
    return Measured(visible(run.name), total, domains, [(share, None, None) for share in last.per_slot])


def most_gaining(drafts: Sequence[Measured], most: int) -> list[Measured]:
    """Return at most so many drafts, those with the longest accept lengths, in their own order."""
    kept = sorted(drafts, key=lambda draft: -draft.total[0] if draft.total else 0.0)[:most]
    return [draft for draft in drafts if draft in kept]


def point_text(point: Point, digits: int = 2) -> str:
    """Return a figure with its interval as text."""
    value, low, high = point
    interval = "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{interval}"


def by_domain(name: str, drafts: Sequence[Measured], how: str) -> Chart:
    """Draw the accept length of each draft over all prompts and in each domain, of many the MOST_DOMAINS with the most
    target calls. how: replies were decoded."""
    names = [draft.name for draft in drafts]
    calls: dict[str, int] = defaultdict(int)
    for draft in drafts:
        for domain, (_, count) in draft.domains.items():
            calls[domain] += count
    labels = unique_labels(sorted(calls))
    charted = set(sorted(calls, key=lambda domain: -calls[domain])[:MOST_DOMAINS])
    shown = [TOTAL, *(labels[domain] for domain in sorted(calls) if domain in charted)]
    points = {draft.name: {TOTAL: draft.total} if draft.total else {} for draft in drafts}
    for draft in drafts:
        points[draft.name] |= {labels[domain]: point for domain, (point, _) in draft.domains.items()}
    rows = [
        {"series": series, "domain": label, "value": value, "low": low, "high": high}
        for series, of_draft in points.items()
        for label, (value, low, high) in of_draft.items()
        if label in shown
    ]
    place = {
        "x": axis("value", f"accept length: {GAINED}", zero=False),
        "y": {"field": "domain", "type": "nominal", "sort": shown, "title": None},
        "yOffset": {"field": "series", "type": "nominal", "sort": names},
    }
    marks = {"mark": {"type": "point", "filled": True, "size": 70, "opacity": 1}, "encoding": place | palette(names)}
    layers = [interval_layer(names, horizontal=True, **place), marks]
    table = [
        [label, *(point_text(points[series][label]) if label in points[series] else "-" for series in names)]
        for label in [TOTAL, *labels.values()]
    ]
    title = f"Accept length by domain, {how}"
    note = (
        f"The {MOST_DOMAINS} of {len(calls)} domains with the most target calls." if len(calls) > len(charted) else ""
    )
    svg = draw(name, title, layers, rows, len(shown) * (ROW * len(names) + 8))
    return Chart(title, svg, ["domain", *names], table, note)


def unique_labels(domains: Sequence[str]) -> dict[str, str]:
    """Return what each domain is called on the page, no two alike and none as the total."""
    labels: dict[str, str] = {}
    for domain in domains:
        label = visible(domain) or "no domain"
        while label == TOTAL or label in labels.values():
            label += "*"
        labels[domain] = label
    return labels


def by_slot(name: str, drafts: Sequence[Measured], how: str) -> Chart | None:
    """Draw the share of target calls that kept proposal 1, 2, ... of a block; None where no draft's is known."""
    drafts = [draft for draft in drafts if draft.slots]
    if not drafts:
        return None
    names = [draft.name for draft in drafts]
    rows = [
        {"series": draft.name, "slot": slot, "value": value, "low": low, "high": high}
        for draft in drafts
        for slot, (value, low, high) in enumerate(draft.slots, 1)
    ]
    x = axis("slot", "proposal of a block (slot)", zero=False) | {"axis": {"tickMinStep": 1, "format": "d"}}
    y = axis("value", "target calls that kept it", domain=[0, 1]) | {"axis": {"format": "%"}}
    with_interval = [row for row in rows if row["low"] is not None]
    layers = line_layers(names, x, y, points=True)
    if with_interval:
        layers.insert(0, interval_layer(names, x=x, y=y) | {"data": {"values": with_interval}})
    most = max(len(draft.slots) for draft in drafts)
    shown = [[draft.name, *(f"{value:.0%}" for value, *_ in draft.slots)] for draft in drafts]
    shown = [row + ["-"] * (most + 1 - len(row)) for row in shown]
    title = f"Acceptance by slot, {how}"
    return Chart(title, draw(name, title, layers, rows), ["draft", *map(str, range(1, most + 1))], shown)


def compared(name: str, reports: Sequence[Report], baseline: Sequence[Report] = ()) -> Chart | None:
    """Draw each draft's ratio to the baseline's, paired by prompt; the first draft is the baseline where none is named.

    None for a single draft, and where prompts differ. UsageError where the baseline is several drafts.
    """
    drafts = pool_seeds([*reports, *(report for report in baseline if report not in reports)])
    bases = {title: members for title, members in drafts.items() if any(each in baseline for each in members)}
    bases = bases or dict([*drafts.items()][:1])
    if len(bases) > 1:
        raise UsageError(f"--against: {' and '.join(bases)} are several drafts; name the seeds of one")
    ((against, base),) = bases.items()
    others = {visible(title): members for title, members in drafts.items() if title != against}
    try:
        ratios = {title: found for title, members in others.items() if (found := paired_ratio(members, base))}
    except UsageError:
        return None
    if not ratios:
        return None
    names = [*ratios]
    rows = [
        {"series": title, "value": found["value"], "low": found["interval"][0], "high": found["interval"][1]}
        for title, found in ratios.items()
    ]
    place = {
        "x": axis("value", f"accept length, as a multiple of that of {visible(against)}", zero=False),
        "y": {"field": "series", "type": "nominal", "sort": names, "title": None},
    }
    ends = place | {"x": place["x"] | {"field": "low"}, "x2": {"field": "high"}}
    equal = {"data": {"values": [{"one": 1}]}, "mark": {"type": "rule", "strokeDash": [4, 4], "color": "var(--ink)"}}
    layers = [
        equal | {"encoding": {"x": {"field": "one", "type": "quantitative"}}},
        {"mark": {"type": "rule", "strokeWidth": 2, "color": "var(--c0)"}, "encoding": ends},
        {"mark": {"type": "point", "filled": True, "size": 90, "opacity": 1, "color": "var(--c0)"}, "encoding": place},
    ]
    ratio_text = partial("{:.3f} [{:.3f}, {:.3f}]".format)
    shown = [[title, ratio_text(found["value"], *found["interval"]), _seeds(found)] for title, found in ratios.items()]
    title = f"Compared with {visible(against)}, prompt by prompt"
    note = (
        "95 % intervals over prompts, both drafts on the same ones; greedy replies. Left of the dashed line is worse."
    )
    heads = ["draft", f"ratio to {visible(against)}", "seeds: lowest and highest"]
    return Chart(title, draw(name, title, layers, rows, height=40 * len(names)), heads, shown, note)


def _seeds(found: dict) -> str:
    return "{:.3f} to {:.3f}".format(*found["by_seed"]) if found["by_seed"] else "-"
