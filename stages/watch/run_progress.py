"""The progress of a training run, from its folder alone."""

import contextlib
import time
import tomllib
from pathlib import Path

from pipeline.json_files import parse_json, read_file
from pipeline.runs.run_logs import METRICS, TIMING, LogTail, number
from stages.watch.locks import is_held

RECIPE, DONE, LOCK = "recipe.toml", "done.json", "lock"  # see pipeline/runs/folder.py, which brings torch
MAX_BYTES = 64 << 20
FRESH_S = 60.0  # a log is written that often, where the system does not say who has a lock
SHOWN = ("loss", "accept_len_tf", "lambda_base", "lr")
TIMED = ("tokens_s", "step_seconds", "data_wait", "peak_bytes", "time")


class RunProgress:
    """A run that is watched; `facts` looks again."""

    kind = "run"

    def __init__(self, path: Path):
        self.path = path
        self._metrics, self._timing = LogTail(path / METRICS), LogTail(path / TIMING)

    def facts(self) -> dict:
        """Return what the run is at now, as JSON values; what is not there yet is None."""
        self._metrics.refresh()
        self._timing.refresh()
        recipe = read_recipe(self.path / RECIPE)
        draft, train = (recipe.get(name) if isinstance(recipe.get(name), dict) else {} for name in ("draft", "train"))
        metrics, timing, done = self._metrics.last, self._timing.last, read_json(self.path / DONE)
        evaluations = [found for line in self._metrics.evaluations if (found := evaluation(line))]
        step = self._metrics.step
        written = max(self._metrics.written, self._timing.written)
        state = self._state(recipe, done, step, written)
        total = number(train.get("steps"))
        facts = {
            "kind": self.kind,
            "path": str(self.path),
            "state": state,
            "method": draft.get("method") if isinstance(draft.get("method"), str) else None,
            "step": int(total or step) if state == "finished" else step,
            "steps": int(total) if total else None,
            "written_ago": round(max(0.0, time.time() - written), 1) if written else None,
        }
        facts |= {name: number(metrics.get(name)) for name in SHOWN}
        facts |= {name: number(timing.get(name)) for name in TIMED if name != "time"}
        shares = timing.get("time")
        shares = shares if isinstance(shares, dict) else {}
        facts["time"] = {name: share for name, share in shares.items() if number(share) is not None} or None
        facts["eta"] = self._eta(state, number(timing.get("eta")), written)
        return facts | {"evaluations": evaluations}

    def written(self) -> float:
        """Return when the run last wrote, in seconds since the epoch, as of the last look; 0 where it has not yet."""
        return max(self._metrics.written, self._timing.written, modified(self.path / DONE))

    def _state(self, recipe: dict, done: dict, step: int, written: float) -> str:
        if done:
            return "finished"
        held = is_held(self.path / LOCK)
        if held or (held is None and time.time() - written < FRESH_S):
            return "running"
        return "stopped" if recipe or step else "waiting"

    def _eta(self, state: str, eta: float | None, written: float) -> float | None:
        """Return the seconds still to go of a run that goes: those of the newest line, less its age."""
        if state != "running" or eta is None:
            return None
        return round(max(0.0, eta - max(0.0, time.time() - written)), 1)


def evaluation(line: dict) -> dict | None:
    """Return step, accept length and interval of an evaluation; None where nothing was measured."""
    value, interval = number(line.get("accept_len")), line.get("interval")
    if value is None or not line.get("calls"):
        return None
    bounds = [number(bound) for bound in interval] if isinstance(interval, list) else []
    return {"step": line["step"], "accept_len": value, "interval": bounds if len(bounds) == 2 and all(bounds) else None}


def modified(path: Path) -> float:
    """Return when a file was written, in seconds since the epoch; 0 where it is not there."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def read_json(path: Path) -> dict:
    """Return the object in a JSON file; {} where it is not there, or not whole."""
    with contextlib.suppress(OSError, ValueError):
        found = parse_json(read_file(path, MAX_BYTES))
        return found if isinstance(found, dict) else {}
    return {}


def read_recipe(path: Path) -> dict:
    """Return the tables of a recipe; {} where it is not there, or not whole."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return tomllib.loads(read_file(path, 1 << 20).decode())
    return {}
