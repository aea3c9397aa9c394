"""The zstd codec: lossless, in plain zarr; each chunk of at most 1 MiB is compressed.

The chunks are blosc's, byte shuffle and one block of zstd's fast strategy: the low bytes of bfloat16 hardly compress
and the high ones do, so their separation is all there is to gain, and a block of the whole chunk makes it three times
faster to undo than blosc's own choice. What blosc would compress we do ourselves, with a table of 2^10 matches where
zstd's level 1 has 2^13: the high bytes of states repeat by chance only, seven at a time, and every such match costs
time on both sides and hardly a byte. Against level 1 (width 4096): size 0.685 for 0.692, 0.3 to 0.6 of the time to
compress, 0.75 to 1 of it to undo, by machine and run. No table at all (2^6) takes 1 % more on real states, whose
tokens recur.

zstd itself cuts what it is given into blocks of 128 KiB, and one that holds bytes of both kinds takes twice as long to
undo and is larger (bundled target: 0.76 of bfloat16 in chunks of 128 KiB, 0.68 in those of 256 KiB, 0.70 between). So a
chunk has whole blocks of each kind; and no more rows than that takes, or 64, since a sample is read in whole chunks.

A blosc chunk begins with 16 bytes: version, version of the inner format, flags, size of a value, then the sizes of the
content, of a block and of the chunk (uint32). What they claim is checked before anything is decoded. Then, of the one
block, where it begins and how long its one stream is (uint32), and the stream.
"""

import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numcodecs import blosc
from zstandard import STRATEGY_FAST, ZstdCompressionParameters, ZstdCompressor

from pipeline.cache.codecs.codec import ArrayCodec
from pipeline.cache.codecs.zarr_file import (
    SHARD_FILE,
    Grid,
    OpenFile,
    ShardFileWriter,
    chunk_index,
    parse_chunk_index,
    split_rows,
)
from pipeline.errors import CacheError, check_memory

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

blosc.use_threads = False  # its thread pool has one lock for all callers; each reader thread decodes a chunk of its own


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
        self._own = threading.local()
        end, index = self.read_index(grid)
        self._starts, self._sizes = parse_chunk_index(index, end, self.path)
        if (self._sizes > self.grid.chunk_bytes + OVERHEAD).any() or (self._sizes < OVERHEAD).any():
            raise CacheError(f"{self.path}: damaged, a chunk larger than its content; run `pipeline verify`")

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Split `count` rows from `first` on at the chunks' ends, so that none is decoded twice."""
        return split_rows(first, count, self.grid.chunk_rows)

    def read_into(self, first_row: int, out: memoryview) -> None:
        """Fill `out`, whole rows as flat bytes, from `first_row` on. CacheError for a damaged chunk."""
        count = len(out) // self.grid.row_bytes
        for start, stop in self.pieces(first_row, count):
            part = out[(start - first_row) * self.grid.row_bytes : (stop - first_row) * self.grid.row_bytes]
            chunk, row = divmod(start, self.grid.chunk_rows)
            if len(part) == self.grid.chunk_bytes:
                self._decode(chunk, part)
            else:
                held = self._buffer("content", self.grid.chunk_bytes)
                self._decode(chunk, held)
                part[:] = held[row * self.grid.row_bytes :][: len(part)]

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
            blosc.decompress(packed, out)
        except (RuntimeError, ValueError) as error:
            check_memory(self.path)
            raise CacheError(f"{self.path}: chunk {chunk} cannot be decoded: {error}; run `pipeline verify`") from error

    def _is_well_formed(self, packed: memoryview, content: int) -> bool:
        """Whether a chunk has the header this module writes: the decoder gets no other."""
        _, _, flags, value, nbytes, block, cbytes = _HEADER.unpack_from(packed)
        known = flags & ~_UNSPLIT in (_ZSTD_SHUFFLED, _ZSTD_COPIED) and value == self.grid.dtype.itemsize
        return known and nbytes == content and 0 < block <= nbytes and cbytes == len(packed)


class Zstd(ArrayCodec):
    """The codec."""

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
