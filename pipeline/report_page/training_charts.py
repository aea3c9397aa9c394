"""How runs were trained, as charts: accept length against steps and hours, losses, schedules, and where time went."""

from collections.abc import Iterable, Sequence

from pipeline.report_page.charts import HEIGHT, Chart, axis, draw, interval_layer, line_layers, palette
from pipeline.report_page.contents import Run
from pipeline.report_page.draft_charts import GAINED, point_text
from pipeline.visible_text import visible

MOST_POINTS = 400  # of a line; a longer log is thinned out evenly
PARTS = {
    "data": "waiting for data",
    "forward": "forward",
    "head": "head and loss",
    "backward": "backward",
    "optimizer": "optimiser",
    "other": "other",
}


def thinned(lines: Sequence[dict]) -> list[dict]:
    """Return at most MOST_POINTS of a log's lines, evenly spaced, the last one among them."""
    gap = -(-len(lines) // MOST_POINTS) or 1
    return [*reversed([*reversed(lines)][::gap])]


def accept_lengths(name: str, runs: Sequence[Run]) -> list[Chart]:
    """Draw the accept length on held-out samples against steps, and against hours; nothing where none was measured."""
    runs = [run for run in runs if run.evaluations]
    if not runs:
        return []
    names = [visible(run.name) for run in runs]
    rows = [
        {
            "series": shown,
            "step": step,
            "hours": run.hours_after(step),
            "value": figures.accept_len,
            "low": figures.interval[0],
            "high": figures.interval[1],
        }
        for shown, run in zip(names, runs, strict=True)
        for step, figures in run.evaluations
    ]
    table = [
        [row["series"], f"{row['step']:,}", _hours(row["hours"]), point_text((row["value"], row["low"], row["high"]))]
        for row in rows
    ]
    heads = ["run", "steps", "hours", "accept length"]
    y = axis("value", GAINED, zero=False)
    note = "Measured on held-out samples without the target, exactly; bars: 95 % intervals over replies."
    charts = []
    for along, title, told in (
        ("step", "optimiser steps", note),
        ("hours", "hours of training", f"{note} Evaluations and checkpoints are left out of the hours."),
    ):
        known = [row for row in rows if row[along] is not None]
        if known:
            x = axis(along, title)
            layers = [interval_layer(names, x=x, y=y), *line_layers(names, x, y, points=True)]
            about = f"Accept length by {title}"
            charts.append(Chart(about, draw(f"{name}-{along}", about, layers, known), heads, table, told))
    return charts


def _hours(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:.3f}"


def curve(name: str, title: str, label: str, lines: Iterable[tuple[str, dict]], key: str, **scale) -> Chart | None:
    """Draw one metric of logged steps. lines: of each its series and its record. None where no line has it."""
    rows = [
        {"series": series, "step": line["step"], "value": line[key]}
        for series, line in lines
        if isinstance(line.get(key), int | float)
    ]
    return lines_chart(name, title, label, rows, **scale) if rows else None


def lines_chart(name: str, title: str, label: str, rows: list[dict], **scale) -> Chart:
    """Draw rows of `series`, `step` and `value` as lines, with each series' first and last value as a table."""
    names = [*dict.fromkeys(row["series"] for row in rows)]
    layers = line_layers(names, axis("step", "optimiser steps"), axis("value", label, **scale), points=False)
    ends = {series: [row["value"] for row in rows if row["series"] == series] for series in names}
    table = [[series, *(f"{value:.4g}" for value in (values[0], values[-1]))] for series, values in ends.items()]
    return Chart(title, draw(name, title, layers, rows, HEIGHT - 40), ["curve", "first", "last"], table)


def curves(name: str, runs: Sequence[Run]) -> list[Chart]:
    """Draw what all runs log: the teacher-forced accept length, lambda where a method has one, the learning rate."""
    lines = [(visible(run.name), line) for run in runs for line in thinned(run.steps)]
    forced = "accept length, teacher-forced"
    drawn = [
        curve(f"{name}-forced", "Teacher-forced accept length", forced, lines, "accept_len_tf", zero=False),
        curve(f"{name}-lambda", "Lambda, the weight of the base loss", "lambda", lines, "lambda_base"),
        curve(f"{name}-rate", "Learning rate", "learning rate", lines, "lr"),
    ]
    return [chart for chart in drawn if chart]


def losses(name: str, run: Run) -> Chart | None:
    """Draw the loss of one run, and its terms by themselves."""
    rows = [
        {"series": _term(key), "step": line["step"], "value": value}
        for line in thinned(run.steps)
        for key, value in line.items()
        if (key == "loss" or key.endswith("_loss")) and isinstance(value, int | float)
    ]
    if not rows:
        return None
    scale = {"type": "log"} if min(row["value"] for row in rows) > 0 else {"zero": False}
    title = f"{visible(run.name)}: loss and its terms"
    return lines_chart(name, title, "loss" + " (log scale)" * ("type" in scale), rows, **scale)


def _term(key: str) -> str:
    return "loss" if key == "loss" else key.replace("_", " ")


def time_parts(run: Run) -> dict[str, float]:
    """Return the shares of training time by what it was spent on, as the newest line of the log has them."""
    last = run.timings[-1] if run.timings else {}
    if "time" in last:
        return {PARTS.get(key, key): share for key, share in last["time"].items()}
    waited = last.get("data_wait")
    return {} if waited is None else {PARTS["data"]: waited, "computing": 1 - waited}


def where_time_went(name: str, runs: Sequence[Run]) -> Chart | None:
    """Draw the share of each run's time that went into data, forward, head, backward and optimiser."""
    parts = {visible(run.name): found for run in runs if (found := time_parts(run))}
    if not parts:
        return None
    kinds = [*dict.fromkeys(kind for found in parts.values() for kind in found)]
    rows = [
        {"run": run, "series": kind, "at": at, "share": found.get(kind, 0.0)}
        for run, found in parts.items()
        for at, kind in enumerate(kinds)
    ]
    colour = palette(kinds)["color"]
    bars = {
        "mark": {"type": "bar", "stroke": "var(--page)", "strokeWidth": 1},
        "encoding": {
            "x": {"field": "share", "type": "quantitative", "title": "share of training time", "axis": {"format": "%"}},
            "y": {"field": "run", "type": "nominal", "sort": [*parts], "title": None},
            "color": colour | {"legend": colour["legend"] | {"columns": 3}},
            "order": {"field": "at", "type": "quantitative"},
        },
    }
    title = "Where the time went"
    table = [[run, *(f"{found.get(kind, 0.0):.1%}" for kind in kinds)] for run, found in parts.items()]
    note = "Since the run was last started, evaluations and checkpoints left out."
    return Chart(title, draw(name, title, [bars], rows, height=34 * len(parts)), ["run", *kinds], table, note)
