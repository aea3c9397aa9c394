"""Drafts against a baseline: a row a draft, how far it is ahead, and how few steps would have done.

What two drafts gain differs far more from prompt to prompt than between the drafts, so they are compared prompt by
prompt: every resample takes the same prompts of both. Seeds are pooled as in the other tables; how far they differ is
shown beside, since intervals over prompts say nothing of it.

    B resamples   n prompts
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.accept import RESAMPLES
from pipeline.errors import UsageError
from pipeline.report import (
    as_markdown,
    cell,
    columns_of,
    drawn_at,
    grid,
    load_reports,
    name_of,
    prompts_of,
)

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
    drawn = sorted({drawn_at(report) for report in [*reports, *base]} - {None})
    rows = [row for name, members in columns_of(reports).items() for row in _rows(name, members, base, drawn)]
    tables = [[["draft", "seeds", "T", "accept length", "ratio", "by seed"], *rows]]
    if reached := _reached(reports, base):
        tables.append([["as good after", "measured after", "steps", "of its own"], *reached])
    if markdown:
        return "\n\n".join(map(as_markdown, tables))
    note = (
        f"accept length over all prompts, and its ratio to that of {name_of(base[0])}, paired by prompt, each with its "
        "95 % interval over prompts; by seed: the lowest and highest ratio"
    )
    if reached:
        note += (
            "; as good after: where a draft's accept length, straight in the logarithm of steps, crosses the other's; "
            "of its own: these steps as a share of the other's"
        )
    return Group(*(part for table in tables for part in (_drawn_up(*table), "")), Text(note, style="dim"))


def _drawn_up(heads: list[str], *rows: list[str]) -> Table:
    table = grid(heads[0], *(f">{head}" for head in heads[1:]))
    for row in rows:
        table.add_row(*row)
    return table


def _rows(
    name: str, members: list[dict], base: list[dict], drawn: Sequence[tuple[float, float]]
) -> Iterator[list[str]]:
    """A draft's rows: of greedy replies, and of those drawn at each temperature."""
    seeds = str(len({report["draft"].get("seed") for report in members}))
    yield [name, seeds, "0", cell(members, None), *_ahead(members, base)]
    for of in drawn:
        ours, theirs = (
            [report["sampled"] | {"draft": report["draft"]} for report in reports if drawn_at(report) == of]
            for reports in (members, base)
        )
        yield ["", "", f"{of[0]:g}", cell(ours, None), *_ahead(ours, theirs)]


def _ahead(members: list[dict], base: list[dict]) -> tuple[str, str]:
    """The ratio with its interval, and the seeds' lowest and highest; a seed is compared with the baseline's own."""
    if not prompts_of(members) or not prompts_of(base):
        return "-", "-"
    one, other = lengths_of(members, base)
    low, high = np.quantile(one.drawn_B / other.drawn_B, EDGES)
    pairs = [one.seeds[seed] / other.seeds[seed] for seed in one.seeds.keys() & other.seeds.keys()]
    spread = f"{min(pairs):.3f} - {max(pairs):.3f}" if len(pairs) > 1 else "-"
    return f"{one.whole / other.whole:.3f} [{low:.3f}, {high:.3f}]", spread


def lengths_of(*drafts: list[dict]) -> list[Lengths]:
    """Return the accept lengths of drafts that decoded the same prompts, all over the same resamples. UsageError."""
    asked = {tuple(sample["domain"] for sample in report["samples"]) for reports in drafts for report in reports}
    if len(asked) > 1:
        counts = sorted({len(domains) for domains in asked})
        raise UsageError(
            f"the reports are of other prompts ({' and '.join(map(str, counts))} of them) and cannot be paired; "
            "evaluate each with the same --count, --prompts and cache"
        )
    (domains,) = asked
    count = len(domains)
    weights_Bn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    found = []
    for reports in drafts:
        by_seed = defaultdict(list)
        for report in reports:
            by_seed[report["draft"].get("seed")].append(report)
        tokens_n, calls_n = _counts(reports, count)
        seeds = {seed: np.divide(*_counts(members, count).sum(1)) for seed, members in by_seed.items()}
        drawn_B = (weights_Bn @ tokens_n) / np.maximum(weights_Bn @ calls_n, 1)
        found.append(Lengths(tokens_n.sum() / calls_n.sum(), drawn_B, seeds))
    return found


def _counts(reports: list[dict], count: int) -> np.ndarray:
    """Tokens and calls of every prompt [2, n], seeds added up."""
    counts_2n = np.zeros((2, count))
    for (number, _), of_prompt in prompts_of(reports).items():
        counts_2n[:, number] = of_prompt
    return counts_2n


def _reached(reports: list[dict], base: list[dict]) -> list[list[str]]:
    """A row for each kind of draft that was trained for several numbers of steps."""
    kinds = defaultdict(lambda: defaultdict(list))
    for report in reports:
        if report["draft"].get("steps"):
            kinds[name_of(report, steps=False)][report["draft"]["steps"]].append(report)
    own, rows = base[0]["draft"].get("steps"), []
    for kind, by_steps in kinds.items():
        if len(by_steps) < 2:
            continue
        steps = sorted(by_steps)
        *curve, wanted = lengths_of(*(by_steps[count] for count in steps), base)
        whole = crossing(steps, [of.whole for of in curve], wanted.whole)
        drawn = [
            crossing(steps, points, goal)
            for points, goal in zip(np.stack([of.drawn_B for of in curve]).T, wanted.drawn_B, strict=True)
        ]
        low, high = (_count(steps, edge) for edge in np.quantile(drawn, EDGES, method="nearest"))
        share = f"{whole / own:.2f}" if own and steps[0] < whole < np.inf else "-"
        rows.append(
            [kind, ", ".join(f"{count:,}" for count in steps), f"{_count(steps, whole)} [{low}, {high}]", share]
        )
    return rows


def _count(steps: Sequence[int], found: float) -> str:
    """Outside of what was measured, only a bound is known."""
    return f"< {steps[0]:,}" if found <= steps[0] else f"> {steps[-1]:,}" if found == np.inf else f"{found:,.0f}"


def crossing(steps: Sequence[int], lengths: Sequence[float], wanted: float) -> float:
    """Return after how many steps a curve first reaches an accept length, straight between points in log(steps).

    The first number of steps where it is there already; infinity where it never is.
    """
    if lengths[0] >= wanted:
        return float(steps[0])
    for (start, low), (stop, high) in pairwise(zip(steps, lengths, strict=True)):
        if low < wanted <= high:
            return float(start * (stop / start) ** ((wanted - low) / (high - low)))
    return np.inf
