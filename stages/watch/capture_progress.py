"""The progress of a capture, from the cache's folder: nothing is written, locked or opened that the writer renames.

A shard's columns are there once their manifests are (shards/000000/aux.1.json). A look lists the shards' folder, and of
the shards only those that lacked a column at the last look, so that a cache of a thousand costs what its unfinished
ones cost. Bytes and rows are those of a few manifests, and in proportion for the rest.
"""

import os
import time
from pathlib import Path

from stages.watch.locks import is_held
from stages.watch.run_progress import number, read_json

CACHE, PLAN, SHARDS, LOG, SCRATCH = (
    "cache.json",
    "plan",
    "shards",
    "capture.log",
    "tmp-",
)  # see pipeline/cache/layout.py
RECENT = 8  # shards, of which the newest speed is
SAMPLES = "samples.arrow"  # of a shard, not of one column


class CaptureProgress:
    """A cache that is watched while it is captured; `facts` looks again."""

    kind = "capture"

    def __init__(self, path: Path):
        self.path = path
        self._finished: dict[str, float] = {}  # shards with every column -> when the last one came
        self._sizes: dict[tuple[str, str], tuple[int, int]] = {}  # (shard, column) -> rows, bytes
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
        workers = sum(bool(is_held(lock)) for lock in scratch_locks(self.path))
        state = "running" if workers else "stopped"
        if not segments or not shards:
            state = "running" if workers else "waiting"
        elif done >= shards and not workers:
            state = "finished"
        newest = max(self._finished.values(), default=0.0)
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
            "bytes": self._bytes(counts),
            "tokens_s": rate and round(rate, 1),
            "eta": round(tokens * (1 - done / shards) / rate, 1) if rate and shards else None,
            "workers": workers,
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

    def _bytes(self, counts: dict[str, int]) -> int | None:
        """Return about how many bytes the columns take: of each the mean of a few shards, times how many it has."""
        total = 0.0
        for name, count in counts.items():
            shards = [shard for shard in self._finished if (self.path / SHARDS / shard / f"{name}.json").exists()][:2]
            sizes = [self._size(shard, name) for shard in shards]
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


def scratch_locks(cache: Path) -> list[Path]:
    """Return the locks of the writers' scratch folders: each worker has one while it writes a shard."""
    try:
        with os.scandir(cache) as entries:
            return [Path(entry.path) / "lock" for entry in entries if entry.name.startswith(SCRATCH) and entry.is_dir()]
    except OSError:
        return []
