"""Columns: one array of one shard. A column exists when its manifest does.

A read verifies exactly the rows it returns, by the checksums of their blocks: see `checksums.py`.

    n samples of the shard   R rows of the column   D width
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.cache.checksums import BlockHasher, read_sums
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.lossy import CHANNELS, Encoded
from pipeline.cache.codecs.zarr_file import DTYPES, METADATA
from pipeline.cache.layout import CHECKSUM_ROWS, SAMPLES, numbered, path_inside, shard_folder
from pipeline.cache.manifest import check_file, check_size, read_record
from pipeline.cache.records import ColumnManifest, ColumnSpec
from pipeline.cache.samples import ShardPlan
from pipeline.errors import CacheError, read_error
from pipeline.target.layers import final_rows

DECODED = 1 << 20  # bytes read and decoded at a time, at least a block, so that they stay in the CPU's cache

VERIFY_BLOCKS = 16  # blocks read at a time when a whole column is verified

ROW = re.compile(r"0|[1-9][0-9]{0,8}")  # a sample of the shard, in `refused`


def stored_rows(shard: ShardPlan, row: int, keeps: str) -> np.ndarray:
    """The rows of sample `row` that a column stores, ascending; `keeps` is its spec's, "all" or "needed"."""
    if keeps == "all":
        return np.arange(shard.lengths[row])
    return np.flatnonzero(final_rows(shard.mask(row)))


class Column:
    """One column of one shard, open for verified reading. `root` is the shard's folder, `folder` that of the values.

    ok bool [n]; digests of its checksum blocks; starts, outliers int64 [n + 1]: first digest and outlier of each sample
    """

    def __init__(self, root: Path, spec: ColumnSpec, bounds: np.ndarray, where: str):
        self.spec = spec
        self.bounds = bounds
        self.where = where
        self.folder = root / spec.stem
        self.ok, self.digests, self.starts, self.outliers = read_sums(root / f"{spec.stem}.arrow", bounds)

    def open(self):
        """Open a reader of the values, see `Codec.reader`."""
        try:
            spec, rows = self.spec, int(self.bounds[-1])
            where = f"{self.where}, column {spec.name}"
            return CODECS[spec.codec].reader(self.folder, rows, spec.width, spec.dtype, where)
        except OSError as error:
            raise read_error(self.folder, error) from None

    def read_into(self, reader, row: int, out: memoryview, first: int = 0) -> None:
        """Fill `out`, flat bytes, with rows of sample `row` from `first` (a multiple of 256) on, each block verified.

        `out` must end where a block or the sample ends. Raises CacheError naming shard, column and sample.
        """
        count = len(out) // self.spec.row_bytes
        if CODECS[self.spec.codec].lossy:
            at = 0
            for held in self._encoded(reader, row, first, count):
                held.decode_bytes(out[at : at + len(held) * self.spec.row_bytes])
                at += len(held) * self.spec.row_bytes
            return
        start = int(self.bounds[row]) + first
        rows = np.frombuffer(out, np.uint8).reshape(count, -1)
        hasher = self._hasher(row, first)
        for begin, stop in reader.pieces(start, count):
            part = rows[begin - start : stop - start]
            reader.read_into(begin, memoryview(part).cast("B"))
            hasher.update(part)
        self._compare(hasher, row, first)

    def _encoded(self, reader, row: int, first: int, count: int) -> Iterator[Encoded]:
        """Yield encoded rows of a lossy codec's column, some blocks at a time, valid until the next."""
        step = CHECKSUM_ROWS * max(1, DECODED // (CHECKSUM_ROWS * self.spec.row_bytes))
        outliers, room = self.outliers_of(reader, row), reader.buffers(min(step, count))
        for at in range(first, first + count, step):
            yield self.read_encoded(reader, row, at, outliers, tuple(part[: first + count - at] for part in room))

    def outliers_of(self, reader, row: int) -> np.ndarray:
        """Read the outliers of sample `row` of a lossy codec's column, for `read_encoded`."""
        return reader.outliers(range(*self.outliers[row : row + 2].tolist()))

    def read_encoded(
        self, reader, row: int, first: int, outliers: np.ndarray, arrays: tuple[np.ndarray, ...]
    ) -> Encoded:
        """Fill a lossy codec's arrays with rows of sample `row`, given its outliers, without decoding.

        `first` is a multiple of 256, and each block is verified, as in `read_into`. Raises CacheError naming shard,
        column and sample.
        """
        start = int(self.bounds[row]) + first
        reader.read(start, arrays)
        held = reader.encoded(start, outliers, arrays)
        hasher = self._hasher(row, first)
        hasher.update(held)
        self._compare(hasher, row, first)
        return held

    def _hasher(self, row: int, first: int) -> BlockHasher:
        assert first % CHECKSUM_ROWS == 0, f"row {first} begins no block"
        return BlockHasher(self.bounds[row : row + 2] - self.bounds[row], first)

    def _compare(self, hasher: BlockHasher, row: int, first: int) -> None:
        """Raise CacheError where a hashed block, from row `first` on, has another checksum than was written."""
        block = int(self.starts[row]) + first // CHECKSUM_ROWS
        wrong = np.flatnonzero(np.array(hasher.digests, np.uint64) != self.digests[block : block + len(hasher.digests)])
        if len(wrong):
            raise CacheError(self.damage(row, first + int(wrong[0]) * CHECKSUM_ROWS))

    def damaged_samples(self, reader) -> list[int]:
        """The samples with a block that fails its checksum or cannot be read."""
        damaged = []
        for row in range(len(self.ok)):
            count = int(self.bounds[row + 1] - self.bounds[row])
            lossy = CODECS[self.spec.codec].lossy
            try:
                for _ in self._encoded(reader, row, 0, count) if lossy else self.parts(reader, row, VERIFY_BLOCKS):
                    pass
            except CacheError:
                damaged.append(row)
        return damaged

    def damage(self, row: int, first: int) -> str:
        """The error message for the block of sample `row` that begins at row `first`."""
        return (
            f"{self.where}, column {self.spec.name}, sample {row} of the shard: rows from {first} are damaged; "
            "run `pipeline verify`"
        )

    def read(self, row: int, blocks: int | None = None) -> np.ndarray:
        """Read the rows of sample `row`, or its first `blocks` blocks: [rows, D], dtype as in `zarr_file.DTYPES`."""
        rows = int(self.bounds[row + 1] - self.bounds[row])
        none = np.empty((0, self.spec.width), DTYPES[self.spec.dtype])
        return next(self.parts(self.open(), row, blocks or rows), none) if rows else none

    def parts(self, reader, row: int, blocks: int) -> Iterator[np.ndarray]:
        """Yield the rows of sample `row`, at most `blocks` blocks at a time."""
        rows, step = int(self.bounds[row + 1] - self.bounds[row]), blocks * CHECKSUM_ROWS
        for first in range(0, rows, step):
            values = np.empty((min(step, rows - first), self.spec.width), DTYPES[self.spec.dtype])
            self.read_into(reader, row, memoryview(values).cast("B"), first)
            yield values


def column_manifest(cache: Path, shard: int, column: str) -> ColumnManifest:
    """Read the manifest of a column. CacheError when it is absent, damaged or another column's."""
    path = shard_folder(cache, shard) / f"{column}.json"
    manifest = read_record(path, ColumnManifest)
    spec = manifest.spec
    right = spec.codec in CODECS and (manifest.shard, spec.name) == (shard, column)
    right = right and {SAMPLES, f"{spec.stem}.arrow", f"{spec.stem}/{METADATA}"} <= manifest.files.keys()
    if not right or not all(ROW.fullmatch(row) and int(row) < manifest.samples for row in manifest.refused):
        raise CacheError(f"{path}: the manifest of another column or shard; run `pipeline verify`")
    return manifest


def open_column(cache: Path, manifest: ColumnManifest, bounds: np.ndarray) -> Column:
    """Open a committed column, having checked its files' sizes, and the digests of those without block checksums."""
    spec, folder = manifest.spec, shard_folder(cache, manifest.shard)
    for name, fact in manifest.files.items():
        if name == f"{spec.stem}.arrow" or name.startswith(f"{spec.stem}/{CHANNELS}/"):
            check_file(path_inside(folder, name), fact)
        elif name != SAMPLES:
            check_size(path_inside(folder, name), fact)
    return Column(folder, spec, bounds, f"{cache}, shard {numbered(manifest.shard)}")
