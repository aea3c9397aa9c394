"""The progress of a capture, from the cache's folder: nothing is written, locked or opened that the writer renames.

A shard's columns are there once their manifests are (shards/000000/aux.1.json). A look lists the shards' folder, and of
the shards only those that lacked a column at the last look, so that a cache of a thousand costs what its unfinished
ones cost. Bytes and rows are those of a few manifests, and in proportion for the rest.
"""

import contextlib
import itertools
import os
import re
import time
from pathlib import Path

from pipeline.runs.run_logs import number
from stages.watch.locks import is_held
from stages.watch.run_progress import modified, read_json

CACHE, PLAN, SHARDS, LOG, SCRATCH = (
    "cache.json",
    "plan",
    "shards",
    "capture.log",
    "tmp-",
)  # see pipeline/cache/layout.py
FRESH_S = 60.0  # since something was written, by a worker whose locks are not seen
SHARD_SCRATCH = re.compile(r"tmp-[0-9]+-")  # the folder of a worker, while it writes a shard
RECENT = 8  # shards, of which the newest speed is
SIZED = 16  # shards, whose manifests are read for the bytes of each column
SAMPLES = "samples.arrow"  # of a shard, not of one column


class CaptureProgress:
    """A cache that is watched while it is captured; `facts` looks again."""

    kind = "capture"

    def __init__(self, path: Path):
        self.path = path
        self._finished: dict[str, float] = {}  # shards with every column -> when the last one came
        self._sizes: dict[tuple[str, str], int] = {}  # (shard, column) -> bytes
        self._wanted: frozenset[str] = frozenset()

    def facts(self) -> dict:
        """Return what the capture is at now, as JSON values; what is not there yet is None."""
        segments = [read_json(path) for path in plan_manifests(self.path)]
        shards, tokens = (sum(int(number(each.get(name)) or 0) for each in segments) for name in ("shards", "tokens"))
        wanted = columns_wanted(read_json(self.path / LOG))
        there = self._list(wanted)
        every = sorted({name for names in there.values() for name in names} | wanted)
        counts = {name: sum(name in names for names in there.values()) for name in every}
        done = len(self._finished)
        scratch = [folder for folder in scratch_folders(self.path) if is_held(folder / "lock")]
        writing = [folder for folder in scratch if SHARD_SCRATCH.match(folder.name)]
        newest = max([*self._finished.values(), modified(self.path / LOG), modified(self.path / CACHE)])
        state = "running" if scratch or time.time() - newest < FRESH_S else "stopped"
        if shards and done >= shards and not scratch:
            state = "finished"
        rate = self._rate(tokens / shards if shards else 0.0) if state == "running" else None
        return {
            "kind": self.kind,
            "path": str(self.path),
            "state": state,
            "shards": done,
            "shards_planned": shards or None,
            "columns": counts,
            "rows": round(tokens * done / shards) if shards else None,
            "rows_planned": tokens or None,
            "bytes": self._bytes(there, counts),
            "tokens_s": rate and round(rate, 1),
            "eta": round(tokens * (1 - done / shards) / rate, 1) if rate and shards else None,
            "workers": len(writing),
            "bytes_being_written": sum(map(folder_bytes, writing)) or None,
            "written_ago": round(max(0.0, time.time() - newest), 1) if newest else None,
        }

    def _list(self, wanted: frozenset[str]) -> dict[str, set[str]]:
        """Return the columns of every shard that has some, looking only where some may be lacking."""
        if wanted != self._wanted:  # another command captures more
            self._wanted, self._finished = wanted, {}
        there = {}
        for shard in numbered(self.path / SHARDS):
            if shard in self._finished:
                there[shard] = set(wanted)
                continue
            found = manifests(self.path / SHARDS / shard)
            there[shard] = {*found}
            if found and wanted <= found.keys():
                self._finished[shard] = max(found.values())
        return there

    def _rate(self, tokens_a_shard: float) -> float | None:
        """Return the tokens a second of the newest shards, by the times at which they were there."""
        times = sorted(self._finished.values())[-RECENT:]
        if len(times) < 2 or times[-1] <= times[0]:
            return None
        return (len(times) - 1) * tokens_a_shard / (times[-1] - times[0])

    def _bytes(self, there: dict[str, set[str]], counts: dict[str, int]) -> int | None:
        """Return how many bytes the columns take: of each the mean of SIZED shards at most, times how many have it."""
        total = 0.0
        for name, count in counts.items():
            sized = itertools.islice((shard for shard, names in there.items() if name in names), SIZED)
            sizes = [self._size(shard, name) for shard in sized]
            if sizes:
                total += sum(sizes) / len(sizes) * count
        return round(total) or None

    def _size(self, shard: str, column: str) -> int:
        if (shard, column) not in self._sizes:
            files = read_json(self.path / SHARDS / shard / f"{column}.json").get("files")
            files = files.items() if isinstance(files, dict) else ()
            own = [fact for name, fact in files if name != SAMPLES and isinstance(fact, dict)]
            self._sizes[shard, column] = sum(int(number(fact.get("size")) or 0) for fact in own)
        return self._sizes[shard, column]


def plan_manifests(cache: Path) -> list[Path]:
    """Return the manifests of the plan's segments; none where it cannot be listed."""
    try:
        names = os.listdir(cache / PLAN)
    except OSError:
        return []
    return [cache / PLAN / name for name in sorted(names) if name.endswith(".json") and not name.startswith(SCRATCH)]


def numbered(folder: Path) -> list[str]:
    """Return the names of the shards that have a folder."""
    try:
        return sorted(name for name in os.listdir(folder) if name.isdigit())
    except OSError:
        return []


def manifests(folder: Path) -> dict[str, float]:
    """Return the columns of a shard with a manifest, and when that was written."""
    found = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".json") and not entry.name.startswith(SCRATCH):
                    found[entry.name.removesuffix(".json")] = entry.stat().st_mtime
    except OSError:  # removed or replaced meanwhile
        pass
    return found


def columns_wanted(log: dict) -> frozenset[str]:
    """Return the columns that the last command captures, none where its log does not say."""
    columns = log.get("columns")
    named = [column.get("name") for column in columns if isinstance(column, dict)] if isinstance(columns, list) else []
    return frozenset(name for name in named if isinstance(name, str))


def scratch_folders(cache: Path) -> list[Path]:
    """Return the folders of unfinished work, each with the lock of the process that it belongs to."""
    try:
        with os.scandir(cache) as entries:
            return [Path(entry.path) for entry in entries if entry.name.startswith(SCRATCH) and entry.is_dir()]
    except OSError:
        return []


def folder_bytes(folder: Path) -> int:
    """Return the bytes of a folder's files, as far as they are still there."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total
