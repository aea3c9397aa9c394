"""Accept length against training steps: a plot, and after how many a draft is as good as another.

The figures are those of the table: seeds pooled, intervals over prompts. The plot says its own conventions, since it
is shown where no table is. The same reports give the same bytes, so it can be kept under version control.
"""

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipeline.drafts import DRAFTS
from pipeline.errors import RoomError, UsageError
from pipeline.evaluation.reports import (
    QUANTILES,
    Report,
    accept_length,
    load_reports,
    paired_accept_lengths,
    tokens_and_calls,
    variants,
)
from pipeline.visible_text import visible

# Okabe and Ito's colours, told apart with any kind of colour blindness; their yellow is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "os^Dv<>"
GREY, PALE = "#555555", "#BBBBBB"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "grid.color": "#E6E6E6",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "text.parse_math": False,  # a target may be called a$b$c
    "svg.hashsalt": "pipeline report",
}
UNDATED = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}  # by ending; what else would vary
PLOT_INCHES, LABEL_INCHES, NARROWEST = 4.8, 0.36, 3.4


@dataclass(frozen=True)
class Line:
    """Drafts that differ only in steps and seed: their name, block and size in words, and their reports by steps."""

    name: str
    conventions: str
    reports: dict[int, list[Report]]


def plot(paths: Sequence[Path], out: Path) -> None:
    """Draw the reports at `paths` into `out`, as SVG or PNG by its ending. UsageError, RoomError."""
    if out.suffix.lower() not in UNDATED:
        raise UsageError(f"--plot {out}: wanted a file that ends in .svg or .png")
    if out.exists() and not (out.is_file() or out.is_dir()):
        raise UsageError(f"--plot {out}: something that is no file has its name; name another file")
    reports = load_reports(paths)
    for path, report in zip(paths, reports, strict=True):
        _check(path, report)
    lines = plot_lines(reports)
    for line in lines:
        for steps, members in line.reports.items():
            if len(recipes := recipes_of(members)) > 1:
                several = " and ".join([*recipes.values()][:2])
                raise UsageError(
                    f"{line.name} of {steps:,} steps was trained by several recipes ({several}), and a line has one "
                    "value at a place; plot the reports of one of them"
                )
    title = f"{visible(reports[0].target)}: accept length by training steps"
    data = _rendered(lines, title, _note(reports), out.suffix.lower())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(data)
    except OSError as error:
        raise RoomError(f"--plot {out}: cannot be written ({error.strerror}); name another file") from error


def _check(path: Path, report: Report) -> None:
    if not report.draft.steps:
        raise UsageError(
            f"{path} does not say how long its draft was trained, as of an exported folder; evaluate the run itself "
            "(`pipeline evaluate --draft RUN`), or leave this report out of --plot"
        )
    if accept_length([report]) is None:
        raise UsageError(f"{path}: no reply took a target call, so there is no accept length; leave it out of --plot")


def plot_lines(reports: list[Report]) -> list[Line]:
    """Return the lines of a plot in the order their drafts come in. Every report says how many steps those took."""
    caches = {report.cache for report in reports}
    lines = defaultdict(lambda: defaultdict(list))
    for report in reports:
        draft, cache = report.draft, report.cache or "unknown"
        title = DRAFTS[draft.method].title if draft.method in DRAFTS else draft.method
        name = visible(", ".join([title, *variants(report)]))
        parts = [f"block {draft.block_size}", f"{draft.proposals} proposals", _size(draft.parameters)]
        parts += [visible(f"cache {cache[:8]}")] * (len(caches) > 1)
        lines[name, ", ".join(parts)][draft.steps].append(report)
    return [Line(*key, dict(sorted(by_steps.items()))) for key, by_steps in lines.items()]


def recipes_of(reports: list[Report]) -> dict[str | None, str]:
    """Return the recipes of reports, which are of one line and number of steps, and a draft's path for each."""
    return {report.draft.recipe: report.draft.path for report in reports}


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M parameters" if parameters >= 1e5 else f"{parameters:,} parameters"


def _note(reports: list[Report]) -> str:
    counts = sorted({len(report.samples) for report in reports})
    prompts = f"{counts[0]} prompts" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} prompts"
    return (
        f"greedy, replies of {reports[0].settings.max_new} tokens at most, {prompts}\n"
        "bars: 95 % intervals over prompts, seeds pooled; rings: single seeds"
    )


def _rendered(lines: list[Line], title: str, note: str, ending: str) -> bytes:
    """Return the plot as the bytes of a file."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # not pyplot: that asks for a display, and keeps state
    except ModuleNotFoundError as error:
        raise UsageError("--plot needs matplotlib; install it with `pip install 'draft-pipeline[plot]'`") from error
    file = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the user has: the same reports give the same bytes
        matplotlib.rcParams.update(STYLE)
        height = max(NARROWEST, LABEL_INCHES * len(lines))
        axes = Figure(figsize=(PLOT_INCHES, height)).add_axes((0, 0, 1, 1))  # the page is cut to what is drawn
        axes.set_title(title, loc="left", pad=31, fontsize=11, fontweight="bold")
        axes.annotate(note, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", color=GREY, size=8)
        _draw(axes, lines, LABEL_INCHES / height)
        axes.figure.savefig(
            file, format=ending[1:], dpi=200, bbox_inches="tight", pad_inches=0.15, metadata=UNDATED[ending]
        )
    return file.getvalue()


def _draw(axes, lines: list[Line], gap: float) -> None:
    """Draw lines, axes and names; `gap` is a name's height as a share of the plot's."""
    budgets = sorted({steps for line in lines for steps in line.reports})
    positions = mark_positions(budgets, len(lines))
    ends = []
    for number, line in enumerate(lines):
        x = [positions[steps][number] for steps in line.reports]
        mark = MARKS[(number + number // len(COLOURS)) % len(MARKS)]  # a colour comes again with another one
        ends.append(_draw_line(axes, line, x, COLOURS[number % len(COLOURS)], mark))
    axes.margins(x=0.08, y=0.07)
    axes.set_xscale("log")
    axes.set_xticks(budgets, _tick_labels(budgets))
    axes.minorticks_off()
    axes.set_xlabel("training steps" + " (log scale)" * (len(budgets) > 1))
    axes.set_ylabel("tokens gained per target call, its own included")
    _name(axes, lines, ends, gap)


def _draw_line(axes, line: Line, x: list[float], colour: str, mark: str) -> tuple[float, float, str]:
    """Draw one line, its bars and its seeds; return where it ends, and its colour."""
    y, low, high = zip(*(accept_length(members) for members in line.reports.values()), strict=True)
    axes.vlines(x, low, high, color=colour, linewidth=1.2)
    for at, members in zip(x, line.reports.values(), strict=True):
        seeds = [accept_length([member])[0] for member in members]
        ring = {"markersize": 3.5, "markerfacecolor": "white", "markeredgewidth": 0.8}
        axes.plot([at] * len(seeds), seeds, "o", color=colour, zorder=2.5, **ring)
    axes.plot(x, y, color=colour, marker=mark, linewidth=1.5, markersize=6.5, markeredgecolor="white", zorder=3)
    return x[-1], y[-1], colour


def mark_positions(budgets: list[int], lines: int) -> dict[int, list[float]]:
    """Return where to draw each line's mark for each budget, in steps: side by side, so that no bar hides another."""
    logs = np.log10(budgets)
    gaps = np.diff(logs)
    step = min(0.018 * gaps.sum(), 0.5 * gaps.min() / lines) if len(gaps) else 0.02
    aside = (np.arange(lines) - (lines - 1) / 2) * step
    return {budget: [*(10 ** (log + aside))] for budget, log in zip(budgets, logs, strict=True)}


def _tick_labels(budgets: list[int]) -> list[str]:
    """A label for every budget that is far enough from the last one with a label."""
    labels, distance = [], 0.1 * math.log10(budgets[-1] / budgets[0])
    last = -math.inf
    for budget in budgets:
        fits = math.log10(budget) - last >= distance
        last = math.log10(budget) if fits else last
        labels.append(f"{budget:,}" if fits else "")
    return labels


def _name(axes, lines: list[Line], ends: list[tuple[float, float, str]], gap: float) -> None:
    """Name each line at the right, near its end, which a thin line joins to the name."""
    low, high = axes.get_ylim()
    heights = space_labels([(y - low) / (high - low) for _, y, _ in ends], gap)
    beside = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    for line, (x, y, colour), height in zip(lines, ends, heights, strict=True):
        joint = {"arrowstyle": "-", "color": PALE, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5}
        axes.annotate("", (x, y), (1.02, height), "data", "axes fraction", arrowprops=joint, annotation_clip=False)
        axes.annotate(line.name, (1.02, height), (4, 0), color=colour, fontweight="bold", va="bottom", **beside)
        axes.annotate(line.conventions, (1.02, height), (4, -1), color=GREY, size=7.5, va="top", **beside)


def space_labels(wanted: Iterable[float], gap: float) -> list[float]:
    """Return heights in 0..1 close to those wanted, in their order, at least `gap` from one another if all fit so."""
    wanted = np.array([*wanted])
    order = wanted.argsort(kind="stable")
    steps = gap * np.arange(len(wanted))
    up = np.maximum.accumulate(wanted[order] - steps) + steps
    down = np.minimum.accumulate((wanted[order] - steps)[::-1])[::-1] + steps
    placed = np.empty(len(wanted))
    placed[order] = np.clip((up + down) / 2, steps, 1 - steps[::-1])
    return placed.tolist()


def steps_rows(reports: list[Report], base: list[Report]) -> list[list[str]]:
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
