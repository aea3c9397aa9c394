"""Drafts against a baseline: a row a draft, how far it is ahead, and how few steps would have done.

What drafts gain differs far more from prompt to prompt than from draft to draft, so they are compared prompt by prompt:
every resample takes the same prompts of both. Seeds are pooled as in the other tables; how far they differ is shown
beside, since intervals over prompts say nothing of it.

    B resamples   n prompts
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.text import Text

from pipeline.console import Grid, grid
from pipeline.errors import UsageError
from pipeline.evaluation.accept_length import resamples
from pipeline.evaluation.plot import lines_of, recipes_of
from pipeline.evaluation.reports import (
    cell,
    columns_of,
    load_reports,
    prompt_set,
    prompts_of,
    sampling_temperatures,
    temperatures,
)
from pipeline.evaluation.tables import as_markdown
from pipeline.visible_text import escape_markdown, visible

EDGES = (0.025, 0.975)


@dataclass(frozen=True)
class Lengths:
    """Accept lengths of one draft, its seeds pooled: over all prompts, over each resample, and of each seed alone."""

    whole: float
    drawn_B: np.ndarray
    seeds: dict[int | None, float]


def against(paths: Sequence[Path], baseline: Sequence[Path], markdown: bool = False) -> Group | str:
    """Return the drafts of `paths` against the one of `baseline`, whose reports differ in their seed only.

    UsageError for several baselines, or replies to other prompts.
    """
    loaded = load_reports([*paths, *baseline])
    reports, base = loaded[: len(paths)], loaded[len(paths) :]
    if len(columns_of(base)) > 1:
        raise UsageError(f"--against: {' and '.join(columns_of(base))} are several drafts; name the seeds of one")
    shown = escape_markdown if markdown else visible
    (title,) = map(shown, columns_of(base))
    rows = [row for name, members in columns_of(reports).items() for row in _rows(shown(name), members, base)]
    tables = [[["draft", "seeds", "T", "accept length", f"ratio to {title}", "by seed"], *rows]]
    if reached := _reached(reports, base):
        tables.append(
            [
                [f"as good as {title}", "measured after", "steps", "of its own"],
                *([shown(kind), *rest] for kind, *rest in reached),
            ]
        )
    if markdown:
        return "\n\n".join(map(as_markdown, tables))
    note = (
        "accept length over all prompts, and its ratio paired by prompt, each with its 95 % interval over prompts; by "
        "seed: the lowest and highest ratio"
    )
    if reached:
        note += (
            "; as good as: after how many steps a draft's accept length, straight in the logarithm of steps, reaches "
            "the other's; of its own: these steps as a share of the other's"
        )
    return Group(*(part for table in tables for part in (_drawn_up(*table), "")), Text(note, style="dim"))


def _drawn_up(heads: list[str], *rows: list[str]) -> Grid:
    table = grid(heads[0], *(f">{head}" for head in heads[1:]))
    for row in rows:
        table.add_row(*row)
    return table


def _rows(name: str, members: list[dict], base: list[dict]) -> Iterator[list[str]]:
    """A draft's rows: of greedy replies, and of those drawn at each temperature."""
    seeds = str(len({report["draft"].get("seed") for report in members}))
    yield [name, seeds, "0", cell(members, None), *_ahead(members, base)]
    for of in sorted({sampling_temperatures(report) for report in members} - {None}):
        ours, theirs = (
            [
                report | {"samples": report["sampled"]["samples"]}
                for report in reports
                if sampling_temperatures(report) == of
            ]
            for reports in (members, base)
        )
        yield ["", "", temperatures(*of), cell(ours, None), *_ahead(ours, theirs)]


def _ahead(members: list[dict], base: list[dict]) -> tuple[str, str]:
    """The ratio with its interval, and the seeds' lowest and highest; a seed is compared with the baseline's own."""
    if not prompts_of(members) or not prompts_of(base):
        return "-", "-"
    one, other = accept_lengths_of(members, base)
    low, high = np.quantile(one.drawn_B / other.drawn_B, EDGES)
    pairs = [one.seeds[seed] / other.seeds[seed] for seed in one.seeds.keys() & other.seeds.keys()]
    spread = f"{min(pairs):.3f} - {max(pairs):.3f}" if len(pairs) > 1 else "-"
    return f"{one.whole / other.whole:.3f} [{low:.3f}, {high:.3f}]", spread


def accept_lengths_of(*drafts: list[dict]) -> list[Lengths]:
    """Return the accept lengths of drafts that decoded the same prompts, all over the same resamples. UsageError.

    Prompts that took no call of any are left out.
    """
    asked = {prompt_set(report) for reports in drafts for report in reports}
    if len(asked) > 1:
        counts = ", ".join(str(len(prompts)) for prompts in asked)
        raise UsageError(
            f"the reports are of other prompts ({counts} of them) and cannot be paired; evaluate each with the same "
            "--count, --prompts and cache"
        )
    places = sorted({place for reports in drafts for place in prompts_of(reports)})
    weights_Bn, found = resamples(len(places), seed=0), []
    for reports in drafts:
        by_seed = defaultdict(list)
        for report in reports:
            by_seed[report["draft"].get("seed")].append(report)
        tokens_n, calls_n = _counts(reports, places)
        drawn_B = (weights_Bn @ tokens_n) / np.maximum(weights_Bn @ calls_n, 1)
        seeds = {seed: np.divide(*_counts(members, places).sum(1)) for seed, members in by_seed.items()}
        found.append(Lengths(tokens_n.sum() / calls_n.sum(), drawn_B, seeds))
    return found


def _counts(reports: list[dict], places: Sequence[tuple[int, str]]) -> np.ndarray:
    """Tokens and calls of the prompts [2, n], seeds added up."""
    prompts = prompts_of(reports)
    return np.array([prompts.get(place, (0, 0)) for place in places], float).T


def _reached(reports: list[dict], base: list[dict]) -> list[list[str]]:
    """A row for each kind of draft that was trained for several numbers of steps, by one recipe each."""
    rows, own = [], base[0]["draft"].get("steps")
    lines = lines_of([report for report in reports if report["draft"].get("steps") and prompts_of([report])])
    names = [line.name for line in lines]
    for line in lines:
        several = any(len(recipes_of(members)) > 1 for members in line.reports.values())
        if len(line.reports) < 2 or several or not prompts_of(base):
            continue
        steps = list(line.reports)
        *curve, wanted = accept_lengths_of(*line.reports.values(), base)
        whole = crossing(steps, [of.whole for of in curve], wanted.whole)
        points_BC = np.stack([of.drawn_B for of in curve], axis=1)
        drawn = [crossing(steps, lengths, goal) for lengths, goal in zip(points_BC, wanted.drawn_B, strict=True)]
        low, high = (_count(steps, edge) for edge in np.quantile(drawn, EDGES, method="nearest"))
        share = f"{whole / own:.2f}" if own and steps[0] < whole < np.inf else "-"
        kind = line.name if names.count(line.name) == 1 else f"{line.name} ({line.conventions})"
        measured = ", ".join(f"{count:,}" for count in steps)
        rows.append([kind, measured, f"{_count(steps, whole)} [{low}, {high}]", share])
    return rows


def _count(steps: Sequence[int], found: float) -> str:
    """Outside of what was measured, only a bound is known."""
    return f"≤ {steps[0]:,}" if found <= steps[0] else f"> {steps[-1]:,}" if found == np.inf else f"{found:,.0f}"


def crossing(steps: Sequence[int], lengths: Sequence[float], wanted: float) -> float:
    """Return after how many steps a curve first reaches an accept length, straight between points in log(steps).

    The first number of steps where it is there already; infinity where it never is.
    """
    if lengths[0] >= wanted:
        return float(steps[0])
    for (start, low), (stop, high) in pairwise(zip(steps, lengths, strict=True)):
        if low < wanted <= high:
            return min(float(start * (stop / start) ** ((wanted - low) / (high - low))), float(stop))  # rounding
    return np.inf
