"""The lossless codecs, each one plain zarr array a column: raw, values as they are, and zstd, compressed chunks.

Raw. Chunks lie end to end, so a sample is one byte range, read without a decoder. **Verified once per process**: a
checksum block (256 rows of a sample) is hashed when it is first read, in pieces that are still in the CPU's cache;
later reads skip the hash, and then a sample is one `preadv`. The result is remembered for that state of the file: its
device, inode, size and times. Those are compared at every read, so a file that was replaced or written to is verified
again from its first block. What this misses is damage that leaves the times unchanged, to a block that was right when
this process first read it: in memory, or on a disk that returns other bytes without an error. `pipeline verify`, or a
new process, finds that.

Zstd. Chunks of at most 1 MiB in blosc's format, byte shuffle and one block of zstd's fast strategy: the low bytes of
bfloat16 hardly compress and the high ones do, so their separation is all there is to gain, and a block of the whole
chunk makes it three times faster to undo than blosc's own choice. What blosc would compress we do ourselves, with a
table of 2^10 matches where zstd's level 1 has 2^13: the high bytes of states repeat by chance only, seven at a time,
and every such match costs time on both sides and hardly a byte. Against level 1 (width 4096): size 0.685 for 0.692, 0.3
to 0.6 of the time to compress, 0.75 to 1 of it to undo, by machine and run. No table at all (2^6) takes 1 % more on
real states, whose tokens recur.

zstd itself cuts what it is given into blocks of 128 KiB, and one that holds bytes of both kinds takes twice as long to
undo and is larger (bundled target: 0.76 of bfloat16 in chunks of 128 KiB, 0.68 in those of 256 KiB, 0.70 between). So a
chunk has whole blocks of each kind; and no more rows than that takes, or 64, since a sample is read in whole chunks.

A blosc chunk begins with 16 bytes: version, version of the inner format, flags, size of a value, then the sizes of the
content, of a block and of the chunk (uint32). What they claim is checked before anything is decoded. Then, of the one
block, where it begins and how long its one stream is (uint32), and the stream.
"""

import contextlib
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
from zstandard import STRATEGY_FAST, ZstdCompressionParameters, ZstdCompressor

from pipeline.cache.codecs.codec import ArrayCodec, blosc
from pipeline.cache.codecs.zarr_file import (
    DTYPES,
    SHARD_FILE,
    Grid,
    OpenFile,
    ShardFile,
    ShardFileWriter,
    chunk_index,
    parse_chunk_index,
    split_rows,
)
from pipeline.cache.layout import CHECKSUM_ROWS
from pipeline.errors import CacheError, check_memory, read_error

PIECE = 256 << 10  # bytes read and hashed at a time where one thread does it: they are still in its core's cache
BLOCK = 1 << 20  # bytes; the most that a chunk of whole rows has
MAX_CHUNK_BYTES = 8 << 20  # the largest chunk that is read, whoever wrote it
ZSTD_BLOCK = 128 << 10  # bytes that zstd compresses at a time
CHUNK_ROWS = 64
OVERHEAD = 16  # bytes that blosc adds to what does not compress
_HEADER = struct.Struct("<4B3I")
_ZSTD_SHUFFLED, _ZSTD_COPIED = 0x81, 0x83  # flags: inner format 4 (bits 5-7), shuffled (bit 0), not compressed (bit 1)
_VERSIONS = 2, 1  # of blosc's format, and of how it holds zstd
_UNSPLIT = 0x10  # each block one stream
_STREAM = struct.Struct("<2I")
_FAST = ZstdCompressionParameters(
    window_log=20, hash_log=10, chain_log=6, search_log=1, min_match=7, strategy=STRATEGY_FAST
)


class Raw(ArrayCodec):
    """Values as they are."""

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
        if digest.intdigest() != self.column.digests[self.column.starts[row] + begin // CHECKSUM_ROWS]:
            raise CacheError(self.column.damage(row, begin))
        return True


class ZstdWriter(ShardFileWriter):
    """Buffers rows to whole chunks and writes each compressed."""

    def __init__(self, folder: Path, grid: Grid):
        super().__init__(folder, grid)
        self._chunk = np.zeros((grid.chunk_rows, grid.width), grid.dtype)
        self._shuffled = np.empty((grid.dtype.itemsize, self._chunk.size), np.uint8)
        self._zstd = ZstdCompressor(compression_params=_FAST)
        self._filled = self._taken = 0
        self._sizes: list[int] = []

    def write(self, rows: np.ndarray) -> None:
        """Append rows, [n, width]."""
        self._taken += len(rows)
        while len(rows):
            part = rows[: self.grid.chunk_rows - self._filled]
            self._chunk[self._filled : self._filled + len(part)] = part
            self._filled, rows = self._filled + len(part), rows[len(part) :]
            if self._filled == self.grid.chunk_rows:
                self._compress()

    def _compress(self) -> None:
        packed = self._packed()
        self._append(packed)
        self._sizes.append(len(packed))
        self._filled = 0

    def _packed(self) -> bytes:
        """Encode the chunk in blosc's format: shuffled and compressed, or, where that is larger, uncompressed."""
        size, content = self.grid.dtype.itemsize, self.grid.chunk_bytes
        values = self._chunk.view(f"u{size}").ravel()
        for place in range(size):
            self._shuffled[place] = values >> (8 * place)
        stream = self._zstd.compress(self._shuffled)
        begins = _HEADER.size + 4
        if _STREAM.size + len(stream) < content:
            flags, body = _ZSTD_SHUFFLED | _UNSPLIT, _STREAM.pack(begins, len(stream)) + stream
        else:
            flags, body = _ZSTD_COPIED | _UNSPLIT, self._chunk.tobytes()
        return _HEADER.pack(*_VERSIONS, flags, size, content, content, _HEADER.size + len(body)) + body

    def finish(self) -> None:
        """Fill the last chunk with zeros, write the index and sync."""
        assert self._taken == self.grid.rows, f"{self._taken} rows written, {self.grid.rows} planned"
        if len(self._sizes) < self.grid.chunks:
            self._chunk[self._filled :] = 0
            self._compress()
        self._end(chunk_index(np.array(self._sizes)))


class ZstdReader(OpenFile):
    """An open compressed shard file."""

    in_order = False  # the file's bytes are not the values in order

    def __init__(self, folder: Path, grid: Grid):
        self.path, self.grid = folder / SHARD_FILE, grid
        if grid.chunk_bytes > max(MAX_CHUNK_BYTES, grid.row_bytes):
            raise CacheError(f"{self.path}: chunks of {grid.chunk_bytes} bytes, more than {MAX_CHUNK_BYTES}")
        super().__init__(self.path)
        self._own, self._decompress = threading.local(), blosc().decompress
        end, index = self.read_index(grid)
        self._starts, self._sizes = parse_chunk_index(index, end, self.path)
        if (self._sizes > self.grid.chunk_bytes + OVERHEAD).any() or (self._sizes < OVERHEAD).any():
            raise CacheError(f"{self.path}: damaged, a chunk larger than its content; run `pipeline verify`")

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Split `count` rows from `first` on at the chunks' ends, so that none is decoded twice."""
        return split_rows(first, count, self.grid.chunk_rows)

    def read_into(self, first_row: int, out: memoryview) -> None:
        """Fill `out`, whole rows as flat bytes, from `first_row` on. CacheError for a damaged chunk."""
        for chunk, at, part in self.grid.parts(first_row, out):
            if len(part) == self.grid.chunk_bytes:
                self._decode(chunk, part)
            else:
                held = self._buffer("content", self.grid.chunk_bytes)
                self._decode(chunk, held)
                part[:] = held[at : at + len(part)]

    def _buffer(self, name: str, size: int) -> memoryview:
        """A reusable buffer of this thread."""
        if not hasattr(self._own, name):
            setattr(self._own, name, memoryview(bytearray(size)))
        return getattr(self._own, name)

    def _decode(self, chunk: int, out: memoryview) -> None:
        size = int(self._sizes[chunk])
        packed = self._buffer("packed", self.grid.chunk_bytes + OVERHEAD)[:size]
        self.read(int(self._starts[chunk]), packed)
        if not self._is_well_formed(packed, len(out)):
            raise CacheError(f"{self.path}: chunk {chunk} is damaged or claims another size; run `pipeline verify`")
        try:
            self._decompress(packed, out)
        except (RuntimeError, ValueError) as error:
            check_memory(self.path)
            raise CacheError(f"{self.path}: chunk {chunk} cannot be decoded: {error}; run `pipeline verify`") from error

    def _is_well_formed(self, packed: memoryview, content: int) -> bool:
        """Whether a chunk has the header this module writes: the decoder gets no other."""
        _, _, flags, value, nbytes, block, cbytes = _HEADER.unpack_from(packed)
        known = flags & ~_UNSPLIT in (_ZSTD_SHUFFLED, _ZSTD_COPIED) and value == self.grid.dtype.itemsize
        return known and nbytes == content and 0 < block <= nbytes and cbytes == len(packed)


class Zstd(ArrayCodec):
    """Compressed values."""

    name = "zstd"
    array_writer, array_reader = ZstdWriter, ZstdReader

    def row_bytes(self, width: int, dtype: str) -> float:
        """As measured on residual-stream states, whose mantissas hardly compress."""
        return super().row_bytes(width, dtype) * {"bfloat16": 0.72, "float32": 0.86}[dtype]

    def grid(self, rows: int, width: int, dtype: np.dtype) -> Grid:
        """Chunks of 64 rows, or of a block of zstd for each byte of a value, none above 1 MiB."""
        settings = {"typesize": dtype.itemsize, "cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": BLOCK}
        compressor = {"name": "blosc", "configuration": settings}
        row, kinds = width * dtype.itemsize, dtype.itemsize * ZSTD_BLOCK
        size = min(BLOCK, -(-CHUNK_ROWS * row // kinds) * kinds)
        return Grid(rows, width, dtype, max(1, min(size // row, rows)), compressor)
