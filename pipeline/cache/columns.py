"""Columns: one array of one shard, which exists when its manifest does; and all columns of a cache that are in use.

A read verifies exactly the rows it returns, by the checksums of their blocks: see `checksums.py`. `OpenColumns` keeps
those checksums in memory and the last used files open, and reads straight from the files where the codec can
(`Codec.direct`). Thread-safe; nothing on disk is locked.

    n samples of the shard   R rows of the column   D width
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property, lru_cache
from operator import methodcaller
from pathlib import Path

import numpy as np

from pipeline.cache.atomic import read_errors
from pipeline.cache.catalog import Catalog
from pipeline.cache.checksums import BlockHasher, read_sums
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.lossless import DirectColumn
from pipeline.cache.codecs.lossy import CHANNELS, Encoded
from pipeline.cache.codecs.zarr_file import DTYPES
from pipeline.cache.layout import CHECKSUM_ROWS, SAMPLES, numbered, path_inside, shard_folder
from pipeline.cache.manifest import check_file, check_size
from pipeline.cache.samples import ShardPlan
from pipeline.cache.schema import ColumnManifest, ColumnSpec
from pipeline.errors import CacheError
from pipeline.target.layers import final_rows

OPEN_FILES = 128  # files kept open: all of a small cache, and half of a process's limit on macOS
READ_THREADS = 8  # parallel reads: enough for an NVMe disk, in threads that mostly wait
INLINE_BYTES = 1 << 20  # less is read by the calling thread: handing it over takes longer

DECODED = 1 << 20  # bytes read and decoded at a time, at least a block, so that they stay in the CPU's cache
VERIFY_BLOCKS = 16  # blocks read at a time when a whole column is verified

Read = Callable[[bool], bool]  # takes `wait`; without it, returns False where it would wait for the disk


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
        spec, rows, where = self.spec, int(self.bounds[-1]), f"{self.where}, column {self.spec.name}"
        with read_errors(self.folder):
            return CODECS[spec.codec].reader(self.folder, rows, spec.width, spec.dtype, where)

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

    def damaged_samples(self, reader, each: Callable[[np.ndarray], object] | None = None) -> list[int]:
        """The samples with a block that fails its checksum or cannot be read; `each` gets the values in their order."""
        damaged = []
        for row in range(len(self.ok)):
            count = int(self.bounds[row + 1] - self.bounds[row])
            lossy, blocks = CODECS[self.spec.codec].lossy, 1 if each else VERIFY_BLOCKS  # one fits the CPU's cache
            try:
                for part in self._encoded(reader, row, 0, count) if lossy else self.parts(reader, row, blocks):
                    if each is not None:
                        each(part)
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


def open_column(cache: Path, manifest: ColumnManifest, shard: ShardPlan) -> Column:
    """Open a committed column, having checked its files' sizes, and the digests of those without block checksums."""
    spec, folder = manifest.spec, shard_folder(cache, manifest.shard)
    for name, fact in manifest.files.items():
        if name == f"{spec.stem}.arrow" or name.startswith(f"{spec.stem}/{CHANNELS}/"):
            check_file(path_inside(folder, name), fact)
        elif name != SAMPLES:
            check_size(path_inside(folder, name), fact)
    return Column(folder, spec, spec.bounds(shard), f"{cache}, shard {numbered(manifest.shard)}")


class CodedColumn:
    """A column to be decoded, or with its chunks in another order. Verifies every block it reads."""

    def __init__(self, column: Column):
        self.column, self.open = column, column.open

    def prefetch(self, file, row: int, first: int, stop: int) -> None:
        pass

    def in_page_cache(self, file, row: int, at: int) -> bool:
        return False  # or wherever it is: it has to be decoded

    def read(self, file, row: int, first: int, out: memoryview, wait: bool = True) -> bool:
        """Fill `out`, flat bytes, with the rows of sample `row` from `first`, any row, on; without `wait` return False.

        A block needed only in part is read whole into a buffer of its own to verify it.
        """
        if not wait:
            return False
        width, at = self.column.spec.row_bytes, 0
        for begin, end, part in self._spans(row, first, first + len(out) // width):
            here = out[at : at + (part.stop - part.start) * width]
            if (part.start, part.stop) == (begin, end):
                self.column.read_into(file, row, here, begin)
            else:
                whole = memoryview(bytearray((end - begin) * width))
                self.column.read_into(file, row, whole, begin)
                here[:] = whole[(part.start - begin) * width : (part.stop - begin) * width]
            at += len(here)
        return True

    def read_encoded(self, file, row: int, first: int, arrays: tuple[np.ndarray, ...]) -> Encoded:
        """The same of a lossy codec's column, into the codec's arrays; not decoded."""
        outliers, at = self.column.outliers_of(file, row), 0
        for begin, end, part in self._spans(row, first, first + len(arrays[0])):
            to = slice(at, at + part.stop - part.start)
            if (part.start, part.stop) == (begin, end):
                self.column.read_encoded(file, row, begin, outliers, tuple(array[to] for array in arrays))
            else:
                whole = file.buffers(end - begin)
                self.column.read_encoded(file, row, begin, outliers, whole)
                for array, held in zip(arrays, whole, strict=True):
                    array[to] = held[part.start - begin : part.stop - begin]
            at = to.stop
        return file.encoded(int(self.column.bounds[row]) + first, outliers, arrays)

    def _spans(self, row: int, first: int, stop: int) -> Iterator[tuple[int, int, range]]:
        """Cut rows [first, stop) of a sample into a first block in part, whole blocks, and a last one in part: where
        their blocks begin and end, and which rows are wanted."""
        rows = int(self.column.bounds[row + 1] - self.column.bounds[row])
        whole = stop if stop == rows else stop - stop % CHECKSUM_ROWS
        while first < stop:
            begin = first - first % CHECKSUM_ROWS
            end = whole if begin == first < whole else min(begin + CHECKSUM_ROWS, rows)
            yield begin, end, range(first, min(end, stop))
            first = end


class OpenColumns:
    """All columns of a cache by (shard, name), opened as they are touched. `plan_of` gives a shard's samples."""

    def __init__(self, catalog: Catalog, plan_of: Callable[[int], ShardPlan]):
        self._catalog, self._plan_of = catalog, plan_of
        self._columns: dict[tuple[int, str], DirectColumn | CodedColumn] = {}
        self._file = lru_cache(OPEN_FILES)(methodcaller("open"))  # one pushed out is closed once no thread reads it

    def _open(self, shard: int, name: str) -> tuple[DirectColumn | CodedColumn, object]:
        key = (shard, name)
        column = self._columns.get(key)
        if column is None:
            held = open_column(self._catalog.path, self._catalog.manifest(shard, name), self._plan_of(shard))
            # setdefault: two threads that open it at once must share one record of verified blocks
            column = self._columns.setdefault(key, CODECS[held.spec.codec].direct(held) or CodedColumn(held))
        return column, self._file(column)

    def check(self, shard: int, names: Sequence[str]) -> None:
        """Open these columns, which checks their files' sizes. CacheError where one is wrong."""
        for name in names:
            self._open(shard, name)

    def read(self, shard: int, name: str, row: int, first: int, out: memoryview, wait: bool = True) -> bool:
        """Fill `out`, flat bytes, with rows of sample `row` of the shard from `first` on. CacheError for damage.

        Without `wait`, return False unless the rows are in the page cache and need no decoding.
        """
        column, file = self._open(shard, name)
        return column.read(file, row, first, out, wait)

    def read_encoded(self, shard: int, name: str, row: int, first: int, arrays: tuple[np.ndarray, ...]) -> Encoded:
        """Fill a lossy codec's arrays with rows of a sample. CacheError for damage."""
        column, file = self._open(shard, name)
        return column.read_encoded(file, row, first, arrays)

    def all_in_page_cache(self, places: Sequence[tuple[int, int, int, int]], names: Sequence[str]) -> bool:
        """Whether rows (shard, row, first, stop) are in the page cache and need no decoding.

        Judged by the last row of each in the first of the columns. If not, the kernel is asked to load them all, which
        it does in parallel while they are read.
        """
        for shard, row, _, stop in places:
            column, file = self._open(shard, names[0])
            if not column.in_page_cache(file, row, stop - 1):
                break
        else:
            return True
        for shard, row, first, stop in places:
            for name in names:
                column, file = self._open(shard, name)
                column.prefetch(file, row, first, stop)
        return False

    def do(self, reads: list[Read], size: int, in_page_cache: Callable[[], bool]) -> None:
        """Run all reads, of `size` bytes in total: in this thread while `in_page_cache`, the rest in several threads.

        From memory, one thread copies faster than several that contend for the GIL. Raises what a read raises, once no
        thread is reading.
        """
        todo, few = iter(reads), size < INLINE_BYTES
        if few or in_page_cache():
            wait_here = few or len(reads) == 1
            first = next((read for read in todo if not read(wait_here)), None)
            if first is None:
                return
            todo = iter([first, *todo])

        def work() -> None:
            for read in todo:  # each takes the next one that nobody has
                read(True)

        done = [self._threads.submit(work) for _ in range(min(READ_THREADS, len(reads)))]
        wait(done)
        for future in done:
            future.result()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
