"""A sweep as it goes on, on a terminal: one line a run, read from the runs' own logs, in whatever process they train.

What the runs print goes to sweep.log meanwhile. Elsewhere than on a terminal nothing of this happens: they print lines.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pipeline.cache.atomic import write_errors
from pipeline.duration_text import clock_text
from pipeline.runs.folder import DONE
from pipeline.runs.run_logs import METRICS, TIMING, LogTail, number
from pipeline.runs.sweep_record import value_text
from pipeline.visible_tables import Grid, VisibleConsole, grid

LOG = "sweep.log"
REFRESHES = 2  # a second
STYLES = {"running": "bold", "finished": "green", "failed": "red", "pruned": "yellow", "waiting": "dim"}
IN_ORDER = ("running", "failed", "pruned", "waiting", "finished")  # which lines stay where a terminal has too few
FRAME = 4  # lines of a terminal that are no run's


@dataclass(frozen=True)
class Row:
    """A run to show. state: None where its folder tells whether it is finished."""

    name: str
    setting: dict
    path: Path | None
    steps: int
    state: str | None = None


class States:
    """What this process knows of its runs: which are running, and which ended early."""

    def __init__(self):
        self.of: dict[Path, str] = {}

    def begin(self, paths: Sequence[Path]) -> None:
        self.of |= dict.fromkeys(paths, "running")

    def end(self, paths: Sequence[Path], failed: Sequence[Path] = ()) -> None:
        for path in paths:
            self.of.pop(path, None)
        self.of |= dict.fromkeys(failed, "failed")


class LiveTable:
    """Draws the runs that `rows` returns."""

    def __init__(self, rows: Callable[[], Sequence[Row]]):
        self.rows, self.tails = rows, {}

    def _tail(self, path: Path, name: str) -> LogTail:
        tail = self.tails.setdefault((path, name), LogTail(path / name))
        tail.refresh()
        return tail

    def lines(self, rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
        """Return the state of each run and the cells of its line."""
        found = []
        for row in rows:
            done = row.path is not None and (row.path / DONE).exists()
            state = row.state or ("finished" if done else "waiting")
            cells = ["", "", "", ""] if row.path is None else self._figures(row.path, row.steps, state)
            found.append((state, [row.name, *map(value_text, row.setting.values()), state, *cells]))
        return found

    def _figures(self, path: Path, steps: int, state: str) -> list[str]:
        """Return a run's cells from its step on; "" for what its logs do not say, or not as a number."""
        metrics, timing = self._tail(path, METRICS), self._tail(path, TIMING)
        loss, eta = number(metrics.last.get("loss")), number(timing.last.get("eta"))
        newest = metrics.evaluations[-1] if metrics.evaluations else {}
        length = number(newest.get("accept_len")) if newest.get("calls") else None
        return [
            f"{metrics.step:,}/{steps:,}",
            "" if loss is None else f"{loss:.3f}",
            "" if length is None else f"{length:.2f}",
            "" if eta is None or state != "running" else clock_text(eta),
        ]

    def render(self, height: int) -> Group:
        """Return the table, of at most `height` lines: what runs, then what ended early, then the rest."""
        rows = self.rows()
        lines = self.lines(rows)
        fields = [key.partition(".")[2] for key in rows[0].setting] if rows else []
        table: Grid = grid(">run", *fields, "state", ">step", ">loss", ">accept", ">ETA")
        most = max(1, height - FRAME)
        kept = sorted(range(len(lines)), key=lambda n: (IN_ORDER.index(lines[n][0]), n))[:most]
        for n in sorted(kept):
            state, cells = lines[n]
            table.add_row(*cells, style=STYLES[state])
        counts = Counter(state for state, _ in lines)
        text = ", ".join(f"{counts[state]} {state}" for state in IN_ORDER if counts[state])
        more = f"; {len(lines) - len(kept)} lines not shown" if len(kept) < len(lines) else ""
        return Group(table, Text(f"{text}{more}", style="dim"))


@contextlib.contextmanager
def shown_live(rows: Callable[[], Sequence[Row]], folder: Path) -> Iterator[None]:
    """Show runs in a table while the block runs, where standard output is a terminal; their lines go to sweep.log."""
    if not sys.stdout.isatty():
        yield
        return
    console, table = VisibleConsole(), LiveTable(rows)
    console.file = sys.stdout  # not what standard output becomes within the block
    with contextlib.ExitStack() as held:
        with write_errors(folder, "a log"):
            folder.mkdir(parents=True, exist_ok=True)
            log = held.enter_context(open(folder / LOG, "a", buffering=1))
        held.enter_context(redirect_stdout(log))
        held.enter_context(_live(console, table))
        yield


def _live(console: Console, table: LiveTable) -> Live:
    return Live(
        get_renderable=lambda: table.render(console.height),
        console=console,
        refresh_per_second=REFRESHES,
        redirect_stdout=False,
        transient=True,  # the table at the end says it all
    )
