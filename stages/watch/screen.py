"""What `pipeline watch` shows: one frame, of the facts that --json prints."""

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.text import Text

from pipeline.duration_text import clock_text, pace_text
from pipeline.size_text import size_text
from pipeline.visible_tables import grid
from pipeline.visible_text import visible
from stages.watch.sweep_progress import ENDED

STYLES = {
    "running": "bold green",
    "finished": "bold green",
    "stopped": "bold yellow",
    "failed": "bold red",
    "pruned": "yellow",
}
BLOCKS = "▁▂▃▄▅▆▇█"
BAR = 30  # columns; of a sweep's runs a third
LINE = 40  # points of a spark line
# A machine does not know of others' locks.
NOT_HERE = {
    "run": " (no process of this machine trains it)",
    "capture": " (no worker of this machine writes a shard)",
}
COLUMN_GAP = "  "


def frame(facts: dict) -> RenderableType:
    """Return one frame, as wide as the terminal is."""
    return Group(*SHOWN[facts["kind"]](facts))


def waiting_lines(facts: dict) -> Iterator[RenderableType]:
    yield Text(f"waiting for {visible(facts['path'])}: neither a run, nor runs, nor a cache is there yet")
    if facts["nearest"]:
        yield Text(f"did you mean {visible(facts['nearest'])}?")


def run_lines(run: dict) -> Iterator[RenderableType]:
    """Yield the lines of a run."""
    yield heading(run, run["method"])
    yield progress_line(run["step"], run["steps"], "step", run["eta"])
    metrics = [
        labelled("loss", run["loss"], ".3f"),
        labelled("accept_len_tf", run["accept_len_tf"], ".2f"),
        labelled("lambda", run["lambda_base"], ".2f"),
        labelled("lr", run["lr"], ".1e"),
    ]
    yield from joined(metrics)
    speed = [
        run["tokens_s"] is not None and f"{run['tokens_s']:,.0f} tokens/s",
        run["step_seconds"] is not None and pace_text(run["step_seconds"]),
        labelled("data wait", run["data_wait"], ".0%"),
        run["peak_bytes"] is not None and f"peak memory {size_text(int(run['peak_bytes']))}",
    ]
    yield from joined(speed)
    if run["time"]:
        shares = [f"{visible(name)} {share:.0%}" for name, share in run["time"].items() if share >= 0.005]
        yield from joined(["time:", *shares])
    if run["evaluations"]:
        yield evaluations_line(run["evaluations"])


def sweep_lines(sweep: dict) -> Iterator[RenderableType]:
    """Yield the lines of a sweep: one a run."""
    runs = sweep["runs"]
    ended = sum(run["state"] in ENDED for run in runs)
    of_planned = f" of {sweep['planned']}" if sweep["planned"] else " (no sweep.json says whether more are to come)"
    yield heading(sweep, f"{ended} done, {len(runs)} begun{of_planned}")
    table = grid("run", "state", "", ">step", ">loss", ">accept length", ">ETA")
    for run in runs:
        last = run["evaluations"][-1]["accept_len"] if run["evaluations"] else None
        table.add_row(
            visible(run["path"]).rpartition("/")[2],
            Text(run["state"], STYLES.get(run["state"], "")),
            bar(run["step"], run["steps"], BAR // 3),
            f"{run['step']}/{run['steps'] or '?'}",
            "" if run["loss"] is None else f"{run['loss']:.3f}",
            "" if last is None else f"{last:.2f}",
            "" if run["eta"] is None else duration(run["eta"]),
        )
    yield table


def capture_lines(capture: dict) -> Iterator[RenderableType]:
    """Yield the lines of a capture."""
    count = capture["workers"]
    yield heading(capture, f"{count} {'worker' if count == 1 else 'workers'}" if count else None)
    yield progress_line(capture["shards"], capture["shards_planned"], "shard", capture["eta"])
    figures = [
        capture["rows_planned"] and f"{capture['rows'] or 0:,} of {capture['rows_planned']:,} rows",
        capture["bytes"] and size_text(capture["bytes"]),
        capture["bytes_being_written"] and f"{size_text(capture['bytes_being_written'])} being written",
        capture["tokens_s"] and f"{capture['tokens_s']:,.0f} tokens/s over the last shards",
    ]
    yield from joined(figures)
    planned = capture["shards_planned"] or "?"
    yield from joined(["columns:", *(f"{visible(name)} {of}/{planned}" for name, of in capture["columns"].items())])


SHOWN = {"waiting": waiting_lines, "run": run_lines, "sweep": sweep_lines, "capture": capture_lines}


def heading(facts: dict, what: str | None) -> Text:
    """Return the first line: what is watched, and its state."""
    text = Text(facts["state"], STYLES.get(facts["state"], ""))
    if facts["state"] == "stopped" and facts["kind"] != "sweep":
        text.append(NOT_HERE[facts["kind"]], "")
    if what:
        text.append(f"{COLUMN_GAP}{visible(what)}", "")
    text.append(f"{COLUMN_GAP}{visible(facts['path'])}", "")
    ago = facts.get("written_ago")
    if ago is not None and facts["state"] in ("running", "stopped"):
        text.append(f"{COLUMN_GAP}written {duration(ago)} ago", "dim")
    return text


def progress_line(done: int, total: int | None, unit: str, eta: float | None) -> Text:
    text = Text(f"{unit} {done:,}/{total or '?'}  ").append(bar(done, total, BAR))
    if total:
        text.append(f"{COLUMN_GAP}{min(1.0, done / total):.0%}")
    return text if eta is None else text.append(f"{COLUMN_GAP}ETA {duration(eta)}")


def bar(done: int, total: int | None, width: int) -> Text:
    filled = min(width, int(width * done / total)) if total else 0
    return Text("█" * filled, "green").append("░" * (width - filled), "dim")


def labelled(name: str, value: float | None, form: str) -> str | None:
    return None if value is None else f"{name} {value:{form}}"


def joined(parts: Sequence[str | bool | None]) -> Iterator["Parts"]:
    """Yield the parts that there are as one line; nothing without any."""
    found = [part for part in parts if part]
    if found:
        yield Parts(found)


class Parts:
    """Parts of a line, which a narrow terminal breaks between two of them and never within one."""

    def __init__(self, parts: Sequence[str]):
        self.parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        line = ""
        for part in self.parts:
            longer = f"{line}{COLUMN_GAP}{part}" if line else part
            if line and cell_len(longer) > options.max_width:
                yield Text(line)
                longer = part
            line = longer
        yield Text(line)


def evaluations_line(evaluations: Sequence[dict]) -> Text:
    """Return the exact accept lengths on held-out samples: a spark line, the first value and the last."""
    values = [found["accept_len"] for found in evaluations]
    first, last = evaluations[0], evaluations[-1]
    interval = " [{:.2f}, {:.2f}]".format(*last["interval"]) if last["interval"] else ""
    since = f"{first['accept_len']:.2f} at step {first['step']:,}, " if len(values) > 1 else ""
    return Text(f"accept length {spark(values)}  {since}{last['accept_len']:.2f}{interval} at step {last['step']:,}")


def spark(values: Sequence[float]) -> str:
    """Return the newest values as blocks, the lowest the smallest."""
    values = list(values)[-LINE:]
    low, high = min(values), max(values)
    height = (high - low) or 1.0
    return "".join(BLOCKS[int((value - low) / height * (len(BLOCKS) - 1))] for value in values)


def duration(seconds: float) -> str:
    """Return seconds as 0:01:05, or 12 s below a minute."""
    return f"{seconds:.0f} s" if seconds < 60 else clock_text(seconds)
