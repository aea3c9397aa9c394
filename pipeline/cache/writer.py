"""ShardWriter: writes columns of a shard into a scratch folder, then renames them into place, the manifest last.
Also the calibrations that a cache stores, `calibration/<column>.json`. On disk their std is named `spread`.

A killed writer leaves a scratch folder, which `atomic.clean_scratch` removes, and perhaps files without a valid
manifest, which count as absent and are replaced by the next writer.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pipeline.cache.atomic import (
    Scratch,
    check_free_space,
    commit_lock,
    sync_file,
    sync_folder,
    write_errors,
    write_file,
)
from pipeline.cache.catalog import Catalog
from pipeline.cache.checksums import BlockHasher, sums_bytes
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.codecs.lossy import Encoded
from pipeline.cache.codecs.zarr_file import DTYPES, PIECE
from pipeline.cache.columns import Column, ColumnSpec
from pipeline.cache.layout import CALIBRATION, COLUMN, SAMPLES, SHARDS, numbered, shard_folder
from pipeline.cache.manifest import FileFact, canonical, read_record
from pipeline.cache.samples import ShardPlan, batch_bytes
from pipeline.cache.schema import CalibrationManifest, ColumnFacts, ColumnManifest
from pipeline.errors import CacheError, RoomError

Former = Mapping[str, ColumnManifest | None]  # damaged columns, each with its former manifest if that is known


class _ColumnWriter:
    """Writes, hashes and encodes one column of the shard."""

    def __init__(self, catalog: Catalog, folder: Path, spec: ColumnSpec, shard: ShardPlan):
        assert spec.codec in CODECS and COLUMN.fullmatch(spec.name), f"{spec}"
        self.spec = spec
        self.bounds = spec.bounds(shard)
        self.hasher = BlockHasher(self.bounds)
        self.outliers = np.zeros(len(shard), np.int64)
        rows, place = int(self.bounds[-1]), folder / spec.stem
        self.codec = CODECS[spec.codec]
        self.calibration = read_calibration(catalog, spec.name, spec.width) if self.codec.lossy else None
        assert self.calibration or not self.codec.lossy, f"{spec.name} is to be encoded and was not calibrated"
        self.values = self.codec.writer(place, rows, spec.width, spec.dtype, self.calibration)

    def write(self, rows: np.ndarray | Encoded, refused: dict[int, str]) -> None:
        self._check(rows)
        if self.codec.lossy:
            if not isinstance(rows, Encoded):
                from pipeline.tensors import as_states  # brings torch

                rows = self.codec.encode_to_host(as_states(rows), self.calibration)
            self._write_encoded(rows, refused)
            return
        rows = np.ascontiguousarray(rows)
        spans = self._refused_spans(len(rows), refused)
        if spans:
            rows = rows.copy()
        for first, end in spans:
            rows[first:end] = 0
        step = max(1, PIECE // self.spec.row_bytes)
        for first in range(0, len(rows), step):  # hashed, digested and written while it is in the CPU's cache
            self.hasher.update(rows[first : first + step])
            self.values.write(rows[first : first + step])

    def _write_encoded(self, rows: Encoded, refused: dict[int, str]) -> None:
        if spans := self._refused_spans(len(rows), refused):
            rows = rows.without(spans)
        at = np.searchsorted(self.bounds, rows.outliers[:, 0] + self.hasher.position, side="right") - 1
        np.add.at(self.outliers, at, 1)
        self.hasher.update(rows)
        self.values.write(rows)

    def _check(self, rows: np.ndarray | Encoded) -> None:
        spec, end = self.spec, self.hasher.position + len(rows)
        if isinstance(rows, Encoded):
            assert (rows.codec, rows.dtype) == (self.codec, spec.dtype), f"{spec.name}: {rows.codec} {rows.dtype}"
        else:
            wanted = DTYPES[spec.dtype]
            assert rows.dtype == wanted and rows.shape[1:] == (spec.width,), f"{spec.name}: {rows.dtype} {rows.shape}"
        assert end <= self.bounds[-1], f"{spec.name}: row {end} of {self.bounds[-1]}"

    def _refused_spans(self, count: int, refused: dict[int, str]) -> list[tuple[int, int]]:
        """The spans [first, end) of the next `count` rows that belong to refused samples."""
        start, stop = self.hasher.position, self.hasher.position + count
        spans = [(max(int(self.bounds[row]), start), min(int(self.bounds[row + 1]), stop)) for row in refused]
        return [(first - start, end - start) for first, end in spans if first < end]


class ShardWriter:
    """Writes columns of one shard. Call, from one thread: write / refuse, then seal, then (read and) commit.

    `abort`, a RoomError, or leaving the `with` block without a commit removes everything written.
    """

    def __init__(self, catalog: Catalog, shard: ShardPlan, columns: list[ColumnSpec]):
        self.catalog, self.shard = catalog, shard
        self.cache = cache = catalog.path
        self.refused: dict[int, str] = {}
        rows = {spec.name: int(spec.bounds(shard)[-1]) for spec in columns}
        self._need = sum(CODECS[spec.codec].stored_bytes(rows[spec.name], spec.width, spec.dtype) for spec in columns)
        check_free_space(cache, self._what, self._need)
        self._scratch = Scratch(cache, numbered(shard.number))
        self._streams: dict[str, _ColumnWriter] = {}
        self._sealed: dict[str, Column] = {}
        try:
            with write_errors(cache, self._what, self._need):
                for spec in columns:
                    self._streams[spec.name] = _ColumnWriter(catalog, self._scratch.path, spec, shard)
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

    def write(self, column: str, rows: np.ndarray | Encoded) -> None:
        """Append rows [m, D] to a column, in the plan's order: uint16 bits for bfloat16, or float32; for a
        lossy codec also encoded already.

        Rows of refused samples must be written too; zeros are stored for them. ProofError when values do not fit the
        codec.
        """
        with self._write_errors():
            self._streams[column].write(rows, self.refused)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Remove everything written when the disk is full: see `write_errors`."""
        try:
            with write_errors(self.cache, self._what, self._need):
                yield
        except RoomError:
            self.abort()
            raise

    def refuse(self, row: int, reason: str) -> None:
        """Mark sample `row` of the shard as refused, before any of its rows is written."""
        assert 0 <= row < len(self.shard) and reason, f"sample {row}: {reason!r}"
        for stream in self._streams.values():
            first, end = stream.bounds[row : row + 2]
            assert first == end or stream.hasher.position <= first, f"sample {row} is already written"
        self.refused[row] = reason

    def seal(self) -> None:
        """Finish and sync every file, after the last row; after this `read` works."""
        with self._write_errors():
            for stream in self._streams.values():
                stream.values.finish()
                path = self._scratch.path / f"{stream.spec.stem}.arrow"
                path.write_bytes(sums_bytes(stream.bounds, stream.hasher.digests, self.refused, stream.outliers))
                sync_file(path)
        for name, stream in self._streams.items():
            self._sealed[name] = Column(self._scratch.path, stream.spec, stream.bounds, f"{self.cache}, {self._what}")

    def read(self, column: str, row: int, blocks: int | None = None) -> np.ndarray:
        """Read back the rows of sample `row`, or its first `blocks` checksum blocks, decoded and verified."""
        return self._sealed[column].read(row, blocks)

    def damaged_samples(self, column: str) -> list[int]:
        """The samples whose rows on disk are not what was written; reads all of them."""
        return self._sealed[column].damaged_samples(self._sealed[column].open())

    def outliers(self, column: str) -> int:
        """The number of outliers of a column; 0 in a lossless codec."""
        return int(self._streams[column].outliers.sum())

    def sums(self, column: str) -> np.ndarray:
        """The checksums of a column's blocks."""
        return self._sealed[column].digests

    def commit(self, column_facts: dict[str, dict], lost: Former | None = None) -> dict[str, bool]:
        """Rename the columns into the shard; `column_facts` (such as probe results) go into their manifests.

        Returns for each column whether this writer's was committed: one that exists already, in any codec, stays.
        Columns in `lost` are damaged and replaced: its values are their former manifests, None if those are lost too;
        where the same bytes came out, the column keeps its former facts.
        """
        with self._committing():
            samples, facts = self._commit_samples(), column_facts
            return {name: self._commit_column(name, samples, facts.get(name, {}), lost or {}) for name in self._streams}

    @contextlib.contextmanager
    def _committing(self) -> Iterator[None]:
        """Hold the commit lock, the shard listed afresh; remove the scratch folder at the end."""
        assert self._sealed.keys() == self._streams.keys(), "seal before commit"
        try:
            with write_errors(self.cache, self._what, self._need), commit_lock(self.cache):
                self.catalog.refresh(self.shard.number)
                yield
        finally:
            self.catalog.refresh(self.shard.number)
            self.abort()

    def _commit_samples(self) -> FileFact:
        """Write the shard's `samples.arrow` and return its size and digest.

        A file that matches the manifest of a committed column stays: another version of Arrow may write other bytes.
        """
        folder = shard_folder(self.cache, self.shard.number)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise CacheError(f"{folder}: a file, where a shard's folder belongs; move it out of the cache") from None
        path, data = folder / SAMPLES, batch_bytes(self.shard.batch)
        names = self.catalog.columns_of(self.shard.number)
        captured = [manifest for name in names if (manifest := self.catalog.captured(self.shard.number, name))]
        vouched = [manifest.files[SAMPLES] for manifest in captured]
        if path.is_file() and (fact := FileFact.of_file(path)) in vouched:
            return fact
        write_file(path, data)
        self.catalog.refresh(self.shard.number)
        sync_folder(self.cache / SHARDS)
        sync_folder(self.cache)
        return FileFact.of_bytes(data)

    def _commit_column(self, name: str, samples: FileFact, facts: dict, lost: Former) -> bool:
        """Commit one column unless it exists; needs the commit lock. Returns whether it was committed."""
        if name not in lost and self.catalog.captured(self.shard.number, name):
            return False
        self._move_to_scratch(f"{name}.json")  # the manifest first: without it nothing else counts
        self._install(name, self._manifest(name, samples, facts, lost.get(name)))
        return True

    def replace(self, name: str, facts: dict) -> bool:
        """Replace the column in another codec by this one, with its facts and `facts`.

        One rename switches between them, so the column always exists. Returns False, with nothing changed, when another
        process has replaced it meanwhile.
        """
        with self._committing():
            former = self.catalog.captured(self.shard.number, name)
            if former is None or former.spec == self._streams[name].spec:
                return False
            self._install(name, self._manifest(name, former.files[SAMPLES], {**former.facts.as_dict(), **facts}))
            return True

    def _manifest(self, name: str, samples: FileFact, facts: dict, had: ColumnManifest | None = None) -> bytes:
        stream = self._streams[name]
        stem = stream.spec.stem
        values = {f"{stem}/{file}": FileFact(**fact) for file, fact in stream.values.facts().items()}
        sums = FileFact.of_file(self._scratch.path / f"{stem}.arrow")
        files = {**values, f"{stem}.arrow": sums, SAMPLES: samples}
        manifest = ColumnManifest(
            cache=self.catalog.hash,
            shard=self.shard.number,
            spec=stream.spec,
            rows=int(stream.bounds[-1]),
            samples=len(self.shard),
            files=files,
            refused={str(row): reason for row, reason in sorted(self.refused.items())},
            facts=had.facts if had and had.files == files else ColumnFacts.model_validate(facts),
        )
        return canonical(manifest.as_dict(), self.catalog.format)

    def _install(self, name: str, manifest: bytes) -> None:
        """Rename one column's files into the shard, its manifest last; then remove those of other codecs."""
        folder, scratch = shard_folder(self.cache, self.shard.number), self._scratch.path
        spec = self._streams[name].spec
        ready = scratch / f"{name}.json"
        ready.write_bytes(manifest)
        sync_file(ready)
        for below in sorted(path for path in (scratch / spec.stem).rglob("*") if path.is_dir()):
            sync_folder(below)
        sync_folder(scratch / spec.stem)
        for new in (spec.stem, f"{spec.stem}.arrow"):
            self._rename_into_shard(new)
        sync_folder(folder)
        ready.rename(folder / f"{name}.json")
        sync_folder(folder)
        for other in spec.other_stems:
            self._move_to_scratch(f"{other}.arrow", other)

    def _rename_into_shard(self, name: str) -> None:
        """Rename one of our files or folders into the shard's folder, replacing what has its name.

        Without working locks another writer, with the same bytes, may come between: then try again.
        """
        while True:
            self._move_to_scratch(name)
            try:
                (self._scratch.path / name).rename(shard_folder(self.cache, self.shard.number) / name)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise

    def _move_to_scratch(self, *names: str) -> None:
        """Move files of an earlier writer from the shard's folder into scratch, which is removed at the end."""
        folder, scratch = shard_folder(self.cache, self.shard.number), self._scratch.path
        for name in names:
            if (folder / name).exists() or (folder / name).is_symlink():
                with contextlib.suppress(FileNotFoundError):  # another process did it
                    (folder / name).rename(scratch / f"old-{len(os.listdir(scratch))}-{name}")
                sync_folder(folder)

    def abort(self) -> None:
        """Remove the scratch folder and what was written there. Harmless after a commit."""
        for stream in self._streams.values():
            stream.values.close()
        self._scratch.close()


def read_calibration(catalog: Catalog, column: str, width: int) -> Calibration | None:
    """Read the cache's calibration of a column; None when it has none. CacheError for a damaged or foreign one."""
    path = catalog.path / CALIBRATION / f"{column}.json"
    if not path.exists():
        return None
    facts = read_record(path, CalibrationManifest)
    with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite, and is refused
        mean, std = (np.array(values, np.float64).astype(np.float32) for values in (facts.mean, facts.spread))
    right = (facts.cache, facts.column) == (catalog.hash, column)
    right = right and len(mean) == len(std) == width and np.isfinite([mean, std]).all() and (std > 0).all()
    if not right:
        raise CacheError(f"{path}: another cache's or column's; remove it, and every {column} that was encoded with it")
    return Calibration(mean, std)


def store_calibration(catalog: Catalog, column: str, calibration: Calibration, rows: int) -> Calibration:
    """Write a calibration, unless another process has written one; return the one in the cache. Raises RoomError."""
    # The shortest decimals that read back as the same float32 values.
    mean, spread = ([float(str(value)) for value in values] for values in (calibration.mean, calibration.std))
    made = CalibrationManifest(cache=catalog.hash, column=column, rows=rows, mean=mean, spread=spread)
    with write_errors(catalog.path, "a calibration"), commit_lock(catalog.path):
        existing = read_calibration(catalog, column, len(mean))
        if existing is None:
            path = catalog.path / CALIBRATION / f"{column}.json"
            write_file(path, canonical(made.as_dict(), catalog.format))
    return existing or calibration
