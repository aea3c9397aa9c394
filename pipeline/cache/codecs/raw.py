"""The raw codec: values as they are. Chunks lie end to end, so a sample is one byte range, read without a decoder.

**Verified once per process.** A checksum block (256 rows of a sample) is hashed when it is first read, in pieces that
are still in the CPU's cache; later reads skip the hash, and then a sample is one `preadv`. The result is remembered for
that state of the file: its device, inode, size and times. Those are compared at every read, so a file that was replaced
or written to is verified again from its first block. What this misses is damage that leaves the times unchanged, to a
block that was right when this process first read it: in memory, or on a disk that returns other bytes without an error.
`pipeline verify`, or a new process, finds that.
"""

import contextlib

import numpy as np
import xxhash

from pipeline.cache.codecs.codec import ArrayCodec
from pipeline.cache.codecs.zarr_file import DTYPES, SHARD_FILE, Grid, OpenFile, ShardFile, ShardFileWriter
from pipeline.cache.layout import CHECKSUM_ROWS
from pipeline.errors import CacheError, read_error

PIECE = 256 << 10  # bytes read and hashed at a time where one thread does it: they are still in its core's cache


class Raw(ArrayCodec):
    """The codec."""

    name = "raw"
    suffix = ""
    array_writer, array_reader = ShardFileWriter, ShardFile

    def grid(self, rows: int, width: int, dtype: np.dtype) -> Grid:
        return Grid.of(rows, width, dtype)

    def direct(self, column) -> "DirectColumn | None":
        return DirectColumn.of(column)


class DirectColumn:
    """A raw column of one shard whose chunks are in order, and which of its checksum blocks are verified."""

    def __init__(self, column, grid: Grid):
        self.column, self.grid = column, grid
        self.width = column.spec.row_bytes
        # One byte per block, 0.5 MB for a terabyte of states: threads may set bytes, but not bits, without a lock.
        self._verified: tuple[tuple[int, ...], bytearray] = ((), bytearray())

    @classmethod
    def of(cls, column) -> "DirectColumn | None":
        """An open column (`columns.Column`), if its values can be read directly; None when another reader has to."""
        spec, rows = column.spec, int(column.bounds[-1])
        if not rows:
            return None
        grid = Grid.on_disk(column.folder, rows, spec.width, DTYPES[spec.dtype])
        if grid is None or grid.compressor is not None:
            return None
        direct = cls(column, grid)
        file = direct.open()
        stamp = file.stamp()
        direct._verified = (stamp, bytearray(len(column.digests)))
        return direct if direct._in_order(file) else None

    def open(self) -> OpenFile:
        try:
            return OpenFile(self.column.folder / SHARD_FILE)
        except OSError as error:
            raise read_error(self.column.folder, error) from None

    def _in_order(self, file: OpenFile) -> bool:
        with contextlib.suppress(CacheError):
            return file.read_index(self.grid) == (self.grid.data_bytes, self.grid.index())
        return False

    def prefetch(self, file: OpenFile, row: int, first: int, stop: int) -> None:
        """Ask the kernel to load rows [first, stop) of sample `row` into the page cache."""
        file.prefetch((int(self.column.bounds[row]) + first) * self.width, (stop - first) * self.width)

    def in_page_cache(self, file: OpenFile, row: int, at: int) -> bool:
        """Whether row `at` of sample `row` is in the page cache. Raises what `read` raises."""
        start = (int(self.column.bounds[row]) + at) * self.width
        return file.read(start, memoryview(bytearray(self.width)), wait=False)

    def _verified_blocks(self, file: OpenFile) -> bytearray:
        """Which blocks of this state of the file are verified, a byte per block; none after the file changed."""
        stamp, verified = file.stamp(), self._verified
        if verified[0] != stamp:
            if not self._in_order(file):
                raise CacheError(f"{file.path}: changed while it was read; run `pipeline verify`")
            verified = self._verified = (stamp, bytearray(len(self.column.digests)))
        return verified[1]

    def read(self, file: OpenFile, row: int, first: int, out: memoryview, wait: bool = True) -> bool:
        """Fill `out`, flat bytes, with the rows of sample `row` from `first`, any row, on.

        Without `wait`, return False unless they are in the page cache. A block needed only in part is first read whole
        into a buffer of its own to verify it. Raises CacheError naming shard, column and sample.
        """
        verified, start_block = self._verified_blocks(file), int(self.column.starts[row])
        base, stop, at = int(self.column.bounds[row]), first + len(out) // self.width, first
        if verified.find(0, start_block + first // CHECKSUM_ROWS, start_block - (-stop // CHECKSUM_ROWS)) < 0:
            return file.read((base + first) * self.width, out, wait)
        rows = int(self.column.bounds[row + 1]) - base
        while at < stop:
            begin = at - at % CHECKSUM_ROWS
            end = min(begin + CHECKSUM_ROWS, rows)
            number = start_block + begin // CHECKSUM_ROWS
            while end < stop and verified[number] and verified[number + 1]:
                number, end = number + 1, min(end + CHECKSUM_ROWS, rows)
            wanted = out[(at - first) * self.width : (min(end, stop) - first) * self.width]
            if verified[number]:
                if not file.read((base + at) * self.width, wanted, wait):
                    return False
            else:
                whole = (begin, end) == (at, min(end, stop))
                block = wanted if whole else memoryview(bytearray((end - begin) * self.width))
                if not self._read_block(file, row, begin, block, wait):
                    return False
                verified[number] = 1
                if not whole:
                    wanted[:] = block[(at - begin) * self.width :][: len(wanted)]
            at = end
        return True

    def _read_block(self, file: OpenFile, row: int, begin: int, out: memoryview, wait: bool) -> bool:
        start = (int(self.column.bounds[row]) + begin) * self.width
        digest = xxhash.xxh3_64()
        step = len(out) if wait else PIECE  # with reader threads, few long reads: each call takes the GIL
        for at in range(0, len(out), step):
            piece = out[at : at + step]
            if not file.read(start + at, piece, wait):
                return False
            digest.update(piece)
        self._compare(digest.intdigest(), row, begin)
        return True

    def _compare(self, digest: int, row: int, begin: int) -> None:
        if digest != self.column.digests[self.column.starts[row] + begin // CHECKSUM_ROWS]:
            raise CacheError(self.column.damage(row, begin))
