"""Writing the columns of a shard: rows in order into a scratch folder, then names put in place, the manifest last.

A killed writer leaves a scratch folder that `disk.clean` removes, and nothing else: what has no valid manifest does
not exist and is replaced by the next writer.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.cache.codecs import CODECS, DTYPES
from pipeline.cache.columns import BlockHasher, Column, ColumnSpec, committed, sums_bytes
from pipeline.cache.disk import Scratch, committing, need_room, room, sync_file, sync_folder, write_file
from pipeline.cache.layout import IDENTITY, SAMPLES, SHARDS, numbered, shard_folder
from pipeline.cache.manifest import FileFact, canonical, read_canonical
from pipeline.cache.samples import ShardPlan, batch_bytes
from pipeline.errors import RoomError


class _Stream:
    """One column on its way to disk."""

    def __init__(self, folder: Path, spec: ColumnSpec, shard: ShardPlan):
        assert spec.is_valid(), f"{spec}"
        self.spec = spec
        self.bounds = spec.bounds(shard)
        self.hasher = BlockHasher(self.bounds)
        rows = int(self.bounds[-1])
        self.values = CODECS[spec.codec].writer(folder / spec.name, rows, spec.width, spec.dtype)

    def write(self, rows: np.ndarray, refused: dict[int, str]) -> None:
        self._check(rows)
        rows = self._without(np.ascontiguousarray(rows), refused)
        self.hasher.update(rows)
        self.values.write(rows)

    def _check(self, rows: np.ndarray) -> None:
        spec, end = self.spec, self.hasher.position + len(rows)
        wanted = DTYPES[spec.dtype]
        assert rows.dtype == wanted and rows.shape[1:] == (spec.width,), f"{spec.name}: {rows.dtype} {rows.shape}"
        assert end <= self.bounds[-1], f"{spec.name}: row {end} of {self.bounds[-1]}"

    def _without(self, rows: np.ndarray, refused: dict[int, str]) -> np.ndarray:
        """The rows, those of refused samples zero."""
        start, stop = self.hasher.position, self.hasher.position + len(rows)
        spans = [(max(int(self.bounds[row]), start), min(int(self.bounds[row + 1]), stop)) for row in refused]
        spans = [(first - start, end - start) for first, end in spans if first < end]
        if spans:
            rows = rows.copy()
        for first, end in spans:
            rows[first:end] = 0
        return rows


class ShardWriter:
    """Writes columns of one shard. Use it from one thread, in this order: write / refuse, seal, (read), commit.

    After `abort`, a RoomError or leaving the `with` block without a commit, nothing of it is left.
    """

    def __init__(self, cache: Path, shard: ShardPlan, columns: list[ColumnSpec]):
        self.cache = cache
        self.shard = shard
        self.refused: dict[int, str] = {}
        self._identity = read_canonical(cache / IDENTITY)["hash"]
        self._need = sum(int(spec.bounds(shard)[-1]) * spec.row_bytes for spec in columns)
        need_room(cache, self._what, self._need)
        self._scratch = Scratch(cache, numbered(shard.number))
        self._streams: dict[str, _Stream] = {}
        self._sealed: dict[str, Column] = {}
        try:
            with room(cache, self._what, self._need):
                for spec in columns:
                    self._streams[spec.name] = _Stream(self._scratch.path, spec, shard)
        except BaseException:
            self.abort()
            raise

    @property
    def _what(self) -> str:
        return f"shard {numbered(self.shard.number)}"

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self.abort()

    def write(self, column: str, rows: np.ndarray) -> None:
        """Append rows [m, D] to a column, in the plan's order: uint16 bits for bfloat16, or float32.

        Rows of refused samples are needed to keep the place; whatever they hold, zeros are stored.
        """
        try:
            with room(self.cache, self._what, self._need):
                self._streams[column].write(rows, self.refused)
        except RoomError:
            self.abort()
            raise

    def refuse(self, row: int, reason: str) -> None:
        """Leave sample `row` of the shard out, before any of its rows is written."""
        assert 0 <= row < len(self.shard) and reason, f"sample {row}: {reason!r}"
        for stream in self._streams.values():
            first, end = stream.bounds[row : row + 2]
            assert first == end or stream.hasher.position <= first, f"sample {row} is already written"
        self.refused[row] = reason

    def seal(self) -> None:
        """Finish and sync every file, after the last row; from here on `read` works."""
        try:
            with room(self.cache, self._what, self._need):
                for name, stream in self._streams.items():
                    stream.values.finish()
                    path = self._scratch.path / f"{name}.arrow"
                    path.write_bytes(sums_bytes(stream.bounds, stream.hasher.digests, self.refused))
                    sync_file(path)
        except RoomError:
            self.abort()
            raise
        for name, stream in self._streams.items():
            self._sealed[name] = Column(self._scratch.path, stream.spec, stream.bounds, f"{self.cache}, {self._what}")

    def read(self, column: str, row: int) -> np.ndarray:
        """The rows of sample `row` as a reader will get them from disk: decoded, each block checked."""
        return self._sealed[column].read(row)

    def commit(self, column_facts: dict[str, dict], lost: Mapping[str, dict | None] | None = None) -> dict[str, bool]:
        """Make the columns exist; `column_facts` (probe results, say) go into their manifests.

        Returns for each column whether it is ours: where another writer was quicker, his stays. Not so one that is in
        `lost`, damaged though it may look whole: `lost` has the manifest it had, None if that is lost, too, and where
        the same bytes came out the column gets the same manifest again.
        """
        assert self._sealed.keys() == self._streams.keys(), "seal before commit"
        try:
            with room(self.cache, self._what, self._need), committing(self.cache):
                samples = self._place_samples()
                facts = {name: column_facts.get(name, {}) for name in self._streams}
                done = {name: self._place(name, samples, facts[name], lost or {}) for name in self._streams}
        finally:
            self.abort()
        return done

    def _place_samples(self) -> dict:
        """Put the shard's `samples.arrow` in place and return its size and digest.

        A file that committed columns vouch for stays as it is: another version of Arrow may write other bytes.
        """
        folder = shard_folder(self.cache, self.shard.number)
        folder.mkdir(parents=True, exist_ok=True)
        path, data = folder / SAMPLES, batch_bytes(self.shard.batch)
        names = [other.stem for other in folder.glob("*.json")]
        vouched = [held["files"][SAMPLES] for name in names if (held := committed(self.cache, self.shard.number, name))]
        if path.is_file() and (fact := FileFact.of_file(path).as_dict()) in vouched:
            return fact
        write_file(path, data)
        sync_folder(self.cache / SHARDS)
        sync_folder(self.cache)
        return FileFact.of_bytes(data).as_dict()

    def _place(self, name: str, samples: dict, facts: dict, lost: Mapping[str, dict | None]) -> bool:
        """Rename one column into place under the commit lock, what is left of an earlier one put away first."""
        folder, scratch = shard_folder(self.cache, self.shard.number), self._scratch.path
        if name not in lost and committed(self.cache, self.shard.number, name):
            return False
        spec = self._streams[name].spec
        values = {f"{name}/{file}": fact for file, fact in self._streams[name].values.facts().items()}
        sums = FileFact.of_file(scratch / f"{name}.arrow").as_dict()
        files = {**values, f"{name}.arrow": sums, SAMPLES: samples}
        had = lost.get(name)
        manifest = {
            "cache": self._identity,
            "shard": self.shard.number,
            "spec": spec.as_dict(),
            "rows": int(self._streams[name].bounds[-1]),
            "samples": len(self.shard),
            "files": files,
            "refused": {str(row): reason for row, reason in sorted(self.refused.items())},
            "facts": had["facts"] if had and had["files"] == files else facts,
        }
        ready = scratch / f"{name}.json"
        ready.write_bytes(canonical(manifest))
        sync_file(ready)
        for below in sorted(path for path in (scratch / name).rglob("*") if path.is_dir()):
            sync_folder(below)
        sync_folder(scratch / name)
        for old in (f"{name}.json", f"{name}.arrow", name):  # the manifest first: without it nothing else counts
            if (folder / old).exists() or (folder / old).is_symlink():
                (folder / old).rename(scratch / f"old-{old}")
                sync_folder(folder)
        for new in (name, f"{name}.arrow"):
            (scratch / new).rename(folder / new)
        sync_folder(folder)
        ready.rename(folder / f"{name}.json")
        sync_folder(folder)
        return True

    def abort(self) -> None:
        """Remove what was written and let go of the scratch folder. Harmless after a commit."""
        for stream in self._streams.values():
            stream.values.close()
        self._scratch.close()
