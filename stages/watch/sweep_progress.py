"""The progress of a sweep: of every run in its folder."""

from pathlib import Path

from stages.watch.run_progress import RECIPE, RunProgress, read_json

REPORT = "sweep.json"  # what `pipeline sweep --json` prints, where it was kept in the folder


class SweepProgress:
    """A folder of runs that is watched; `facts` looks again, and finds runs that were begun since."""

    kind = "sweep"

    def __init__(self, path: Path):
        self.path = path
        self._runs: dict[str, RunProgress] = {}

    def facts(self) -> dict:
        """Return what each run is at now, as JSON values."""
        for folder in run_folders(self.path):
            self._runs.setdefault(folder.name, RunProgress(folder))
        listed = read_json(self.path / REPORT).get("runs")
        listed = [run for run in listed if isinstance(run, dict)] if isinstance(listed, list) else []
        failed = {Path(str(run.get("run"))).name for run in listed if run.get("failed")}
        runs = [self._runs[name].facts() for name in sorted(self._runs)]
        for run in runs:
            if Path(run["path"]).name in failed and run["state"] != "running":
                run["state"] = "failed"
        states = [run["state"] for run in runs]
        state = "running" if "running" in states else "stopped"
        if runs and {*states} <= {"finished", "failed"} and len(runs) >= len(listed):
            state = "finished"
        planned = {"planned": len(listed) or None}
        return {
            "kind": self.kind,
            "path": str(self.path),
            "state": state if runs else "waiting",
            **planned,
            "runs": runs,
        }


def run_folders(path: Path) -> list[Path]:
    """Return the folders of runs in a folder; none where it cannot be listed."""
    try:
        return [entry for entry in path.iterdir() if (entry / RECIPE).is_file()]
    except OSError:
        return []
