"""Drafts compared with a baseline: a row a draft, its paired ratio, and the training steps that reach the baseline.

What drafts gain differs far more from prompt to prompt than from draft to draft, so they are compared prompt by prompt:
every bootstrap resample takes the same prompts of both. Seeds are pooled as in the other tables; how far they differ is
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
from rich.text import Text

from pipeline.errors import UsageError
from pipeline.evaluation.accept_length import resamples
from pipeline.evaluation.plot import plot_lines, recipes_of
from pipeline.evaluation.reports import Report, load_reports, pool_seeds, prompt_set, tokens_and_calls
from pipeline.evaluation.tables import (
    accept_length_text,
    as_grid,
    as_markdown,
    sampled_at,
    seed_count,
    temperature_text,
    temperatures_of,
)
from pipeline.visible_text import escape_markdown, visible

QUANTILES = (0.025, 0.975)  # of a 95 % interval


@dataclass(frozen=True)
class AcceptLengths:
    """Accept lengths of one draft: over all prompts, over those of each resample [B], and of each seed alone."""

    overall: float
    resampled_B: np.ndarray
    by_seed: dict[int | None, float]


def compare(paths: Sequence[Path], baseline: Sequence[Path], markdown: bool = False) -> Group | str:
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
    if steps_rows := _steps_rows(reports, base):
        heads = [f"as good as {title}", "measured after", "steps", "of its own"]
        tables.append([heads, *([shown(kind), *rest] for kind, *rest in steps_rows)])
    if markdown:
        return "\n\n".join(map(as_markdown, tables))
    note = (
        "accept length over all prompts, and its ratio paired by prompt, each with its 95 % interval over prompts; by "
        "seed: the lowest and highest ratio"
    )
    if steps_rows:
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
    """The ratio with its interval, and the seeds' lowest and highest; a seed is compared with the baseline's own."""
    if not tokens_and_calls(members) or not tokens_and_calls(base):
        return "-", "-"
    draft, baseline = paired_accept_lengths(members, base)
    low, high = np.quantile(draft.resampled_B / baseline.resampled_B, QUANTILES)
    ratios = [draft.by_seed[seed] / baseline.by_seed[seed] for seed in draft.by_seed.keys() & baseline.by_seed.keys()]
    by_seed = f"{min(ratios):.3f} - {max(ratios):.3f}" if len(ratios) > 1 else "-"
    return f"{draft.overall / baseline.overall:.3f} [{low:.3f}, {high:.3f}]", by_seed


def paired_accept_lengths(*drafts: list[Report]) -> list[AcceptLengths]:
    """Return the accept lengths of drafts that decoded the same prompts, all over the same resamples.

    Prompts that took no call of any are left out. UsageError where the prompts differ.
    """
    prompt_sets = {prompt_set(report) for reports in drafts for report in reports}
    if len(prompt_sets) > 1:
        counts = ", ".join(str(len(prompts)) for prompts in prompt_sets)
        raise UsageError(
            f"the reports are of other prompts ({counts} of them) and cannot be paired; evaluate each with the same "
            "--count, --prompts and cache"
        )
    prompts = sorted({prompt for reports in drafts for prompt in tokens_and_calls(reports)})
    weights_Bn, accept_lengths = resamples(len(prompts), seed=0), []
    for reports in drafts:
        seeds = defaultdict(list)
        for report in reports:
            seeds[report.draft.seed].append(report)
        tokens_n, calls_n = _counts(reports, prompts)
        resampled_B = (weights_Bn @ tokens_n) / np.maximum(weights_Bn @ calls_n, 1)
        by_seed = {seed: np.divide(*_counts(members, prompts).sum(1)) for seed, members in seeds.items()}
        accept_lengths.append(AcceptLengths(tokens_n.sum() / calls_n.sum(), resampled_B, by_seed))
    return accept_lengths


def _counts(reports: list[Report], prompts: Sequence[tuple[int, str]]) -> np.ndarray:
    """Tokens and calls of the prompts [2, n], seeds added up."""
    counts = tokens_and_calls(reports)
    return np.array([counts.get(prompt, (0, 0)) for prompt in prompts], float).T


def _steps_rows(reports: list[Report], base: list[Report]) -> list[list[str]]:
    """A row for each kind of draft that was trained for several numbers of steps, by one recipe each."""
    rows, base_steps = [], base[0].draft.steps
    lines = plot_lines([report for report in reports if report.draft.steps and tokens_and_calls([report])])
    names = [line.name for line in lines]
    for line in lines:
        several = any(len(recipes_of(members)) > 1 for members in line.reports.values())
        if len(line.reports) < 2 or several or not tokens_and_calls(base):
            continue
        steps = list(line.reports)
        *curve, wanted = paired_accept_lengths(*line.reports.values(), base)
        overall = steps_to_reach(steps, [point.overall for point in curve], wanted.overall)
        curve_BC = np.stack([point.resampled_B for point in curve], axis=1)
        reached_B = [
            steps_to_reach(steps, curve_C, goal) for curve_C, goal in zip(curve_BC, wanted.resampled_B, strict=True)
        ]
        low, high = (_steps_text(steps, edge) for edge in np.quantile(reached_B, QUANTILES, method="nearest"))
        share = f"{overall / base_steps:.2f}" if base_steps and steps[0] < overall < np.inf else "-"
        kind = line.name if names.count(line.name) == 1 else f"{line.name} ({line.conventions})"
        measured = ", ".join(f"{count:,}" for count in steps)
        rows.append([kind, measured, f"{_steps_text(steps, overall)} [{low}, {high}]", share])
    return rows


def _steps_text(steps: Sequence[int], reached: float) -> str:
    """Outside of what was measured, only a bound is known."""
    return f"≤ {steps[0]:,}" if reached <= steps[0] else f"> {steps[-1]:,}" if reached == np.inf else f"{reached:,.0f}"


def steps_to_reach(steps: Sequence[int], accept_lengths: Sequence[float], wanted: float) -> float:
    """Return after how many steps a curve first reaches an accept length, straight between points in log(steps).

    The first number of steps where it is there already; infinity where it never is.
    """
    if accept_lengths[0] >= wanted:
        return float(steps[0])
    for (start, low), (stop, high) in pairwise(zip(steps, accept_lengths, strict=True)):
        if low < wanted <= high:
            return min(float(start * (stop / start) ** ((wanted - low) / (high - low))), float(stop))  # rounding
    return np.inf
