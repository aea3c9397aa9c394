"""OpenColumns: the columns of a cache in use, with their checksums in memory and the last used files open.

Columns are read straight from their files where the codec can (`Codec.direct`), else by its reader.
Thread-safe; nothing on disk is locked.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property

import numpy as np

from pipeline.cache.catalog import Catalog
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.lossless import DirectColumn
from pipeline.cache.codecs.lossy import Encoded
from pipeline.cache.columns import Column, open_column
from pipeline.cache.layout import CHECKSUM_ROWS
from pipeline.cache.samples import ShardPlan

OPEN_FILES = 128  # files kept open: all of a small cache, and half of a process's limit on macOS
READ_THREADS = 8  # parallel reads: enough for an NVMe disk, in threads that mostly wait
INLINE_BYTES = 1 << 20  # less is read by the calling thread: handing it over takes longer

Read = Callable[[bool], bool]  # takes `wait`; without it, returns False where it would wait for the disk


class CodedColumn:
    """A column to be decoded, or with its chunks in another order. Verifies every block it reads."""

    def __init__(self, column: Column):
        self.column = column

    def open(self):
        return self.column.open()

    def read(self, file, row: int, first: int, out: memoryview) -> None:
        """Fill `out`, flat bytes, with the rows of sample `row` from `first`, any row, on.

        A block needed only in part is read whole into a buffer of its own to verify it.
        """
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
        self._files = _RecentlyUsed()

    def read(self, shard: int, name: str, row: int, first: int, out: memoryview, wait: bool = True) -> bool:
        """Fill `out`, flat bytes, with rows of sample `row` of the shard from `first` on. CacheError for damage.

        Without `wait`, return False unless the rows are in the page cache and need no decoding.
        """
        column, file = self._open(shard, name)
        if isinstance(column, DirectColumn):
            return column.read(file, row, first, out, wait)
        if wait:
            column.read(file, row, first, out)
        return wait

    def all_in_page_cache(self, places: Sequence[tuple[int, int, int, int]], names: Sequence[str]) -> bool:
        """Whether rows (shard, row, first, stop) are in the page cache and need no decoding.

        Judged by the last row of each in the first of the columns. If not, the kernel is asked to load them all, which
        it does in parallel while they are read.
        """
        if all(self._in_page_cache(shard, names[0], row, stop) for shard, row, _, stop in places):
            return True
        for shard, row, first, stop in places:
            for name in names:
                column, file = self._open(shard, name)
                if isinstance(column, DirectColumn):
                    column.prefetch(file, row, first, stop)
        return False

    def _in_page_cache(self, shard: int, name: str, row: int, stop: int) -> bool:
        column, file = self._open(shard, name)
        return isinstance(column, DirectColumn) and column.in_page_cache(file, row, stop - 1)

    def check(self, shard: int, names: Sequence[str]) -> None:
        """Open these columns, which checks their files' sizes. CacheError where one is wrong."""
        for name in names:
            self._open(shard, name)

    def read_encoded(self, shard: int, name: str, row: int, first: int, arrays: tuple[np.ndarray, ...]) -> Encoded:
        """Fill a lossy codec's arrays with rows of a sample. CacheError for damage."""
        column, file = self._open(shard, name)
        return column.read_encoded(file, row, first, arrays)

    def _open(self, shard: int, name: str) -> tuple[DirectColumn | CodedColumn, object]:
        key = (shard, name)
        column = self._columns.get(key)
        if column is None:
            manifest, plan = self._catalog.manifest(shard, name), self._plan_of(shard)
            bounds = plan.bounds if manifest.spec.keeps == "all" else plan.final_bounds
            held = open_column(self._catalog.path, manifest, bounds)
            # setdefault: two threads that open it at once must share one record of verified blocks
            column = self._columns.setdefault(key, CODECS[held.spec.codec].direct(held) or CodedColumn(held))
        return column, self._files.get(key, column.open)


class _RecentlyUsed:
    """An LRU cache of open files. An evicted one is closed once no thread reads from it."""

    def __init__(self):
        self._held: OrderedDict[Hashable, object] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], object]):
        """The entry of `key`, from `make` if absent; at most OPEN_FILES entries are kept."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        made = make()  # outside of the lock: opening waits for the disk
        with self._lock:
            made = self._held.setdefault(key, made)
            while len(self._held) > OPEN_FILES:
                self._held.popitem(last=False)
        return made


class ReadPool:
    """Runs reads in the calling thread while they are in the page cache, the rest in several. Thread-safe."""

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
