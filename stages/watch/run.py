"""`pipeline watch`: the progress of a run, a sweep or a capture, from another terminal, until it is finished.

It reads what is on disk, writes nothing and takes no lock, so it disturbs nobody. What is half written, replaced or not
there yet is looked at again. It imports neither torch nor what reads a cache, so that it is there at once.
"""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from pipeline.errors import UsageError
from pipeline.nearest_name import nearest
from pipeline.visible_tables import VisibleConsole
from stages.watch.capture_progress import CACHE, PLAN, CaptureProgress
from stages.watch.run_progress import RECIPE, RunProgress
from stages.watch.screen import frame
from stages.watch.sweep_progress import REPORT, SweepProgress, run_folders

Progress = RunProgress | SweepProgress | CaptureProgress


class Watched:
    """What lies at a path, which may come to be there later. UsageError for a file of another kind."""

    def __init__(self, path: Path):
        if path.name == REPORT and path.is_file():
            path = path.parent
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is no folder; name that of a run, of a sweep's runs, or a cache")
        self.path = path
        self._progress: Progress | None = None

    def facts(self) -> dict:
        """Return what it is at now, as JSON values."""
        self._progress = self._progress or progress_of(self.path)
        if self._progress is None:
            return {"kind": "waiting", "path": str(self.path), "state": "waiting", "nearest": nearest_beside(self.path)}
        return self._progress.facts()


def nearest_beside(path: Path) -> str | None:
    """Return the folder beside a missing one whose name is most like it: it may have been mistyped. None for none."""
    if path.exists() or not path.parent.is_dir():
        return None
    found = nearest(path.name, (entry.name for entry in path.parent.iterdir() if entry.is_dir()))
    return found and str(path.parent / found)


def progress_of(path: Path) -> Progress | None:
    """Return what watches a folder, by what is in it; None where that cannot be told yet."""
    if (path / CACHE).exists() or (path / PLAN).is_dir():
        return CaptureProgress(path)
    if (path / RECIPE).exists():
        return RunProgress(path)
    if (path / REPORT).exists() or run_folders(path):
        return SweepProgress(path)
    return None


def watch(path: Path, every: float, once: bool) -> None:
    """Show the progress every so many seconds until it is finished, or once.

    Where standard output is no terminal, a frame is printed when it says something else than the one before.
    """
    watched, console = Watched(path), VisibleConsole()
    if once:
        console.print(frame(watched.facts()))
        return
    if not sys.stdout.isatty():
        return watch_lines(watched, console, every)
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        while True:
            facts = watched.facts()
            live.update(frame(facts), refresh=True)
            if facts["state"] == "finished":
                return
            time.sleep(every)


def watch_lines(watched: Watched, console: Console, every: float) -> None:
    """As `watch`, for a pipe or a file."""
    before = None
    while True:
        facts = watched.facts()
        said = {name: value for name, value in facts.items() if name not in ("written_ago", "eta")}
        if said != before:
            before = said
            console.print(frame(facts))
        if facts["state"] == "finished":
            return
        time.sleep(every)
