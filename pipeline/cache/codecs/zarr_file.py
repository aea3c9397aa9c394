"""The one file of a zarr v3 array: rows end to end in whole inner chunks, then an index of the chunks.

    rows of chunk 0 | rows of chunk 1 | ... | zeros to the last chunk's end | (offset, nbytes) a chunk | crc32c

zarr 3 core specification and its `sharding_indexed` codec: the index is uint64 pairs, little-endian, with a crc32c of
them behind. Written directly because it is then one stream of bounded memory, and read directly because a sample is
one byte range; any zarr v3 reader opens it. The array's shape is rounded up to whole chunks and has one shard.
Chunks may be compressed each (zstd, in `lossless.py`).
"""

import contextlib
import ctypes
import errno
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import google_crc32c
import numpy as np
import xxhash

from pipeline.cache.atomic import write_all
from pipeline.cache.manifest import FileFact
from pipeline.errors import CacheError, read_error, refuse_limit

# A column's dtype as numpy stores it; numpy and zarr have no bfloat16, so its bits are stored as uint16.
DTYPES = {"bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}
METADATA = "zarr.json"
SHARD_FILE = "c/0/0"
CHUNK_BYTES = 3 << 20  # the size aimed at; chunks of an array beyond 4 MiB come out at 2-4 MiB
METADATA_BYTES = 64 << 10  # a `zarr.json` written here is shorter
PIECE = 512 << 10  # bytes read or written and hashed at a time: still in the CPU's own cache when they are hashed
OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # O_NONBLOCK: opening a pipe must not hang
NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # preadv fails rather than wait for the disk; Linux
ADVISE = getattr(os, "posix_fadvise", None)  # macOS has none
WRITE_BACK = 8 << 20  # bytes between calls of `start_writeback`, so that the last sync has little left to wait for
_ZEROS = bytes(1 << 20)

# Linux only, and not in Python's `os`; POSIX_FADV_DONTNEED, which is, would also wait for every CPU of the machine.
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and do not wait


def start_writeback(fd: int, start: int, size: int) -> None:
    """Ask the kernel to begin writing a range of a file's dirty pages to disk. Advice only; returns at once."""
    if _sync_file_range is not None:
        _sync_file_range(fd, start, size, _WRITE)


@dataclass(frozen=True)
class Grid:
    """The chunking of an array [rows, width]: `chunks` inner chunks of `chunk_rows` rows.

    `compressor` is the codec of every chunk as zarr's metadata has it; None for uncompressed chunks.
    """

    rows: int
    width: int
    dtype: np.dtype
    chunk_rows: int
    compressor: dict | None = None

    @staticmethod
    def of(rows: int, width: int, dtype: np.dtype) -> "Grid":
        """The grid of chunks of about CHUNK_BYTES, equal in size so that the padding is less than a row per chunk."""
        chunks = max(1, round(rows * width * dtype.itemsize / CHUNK_BYTES))
        return Grid(rows, width, dtype, max(1, -(-rows // chunks)))

    @staticmethod
    def on_disk(folder: Path, rows: int, width: int, dtype: np.dtype) -> "Grid | None":
        """Read the grid of an array in this module's form, of any chunk size and compressor; None for other forms."""
        try:
            with open(folder / METADATA, "rb") as file:
                facts = json.loads(file.read(METADATA_BYTES))
            inner = facts["codecs"][0]["configuration"]
            chunk_rows, compressor = inner["chunk_shape"][0], inner["codecs"][1] if len(inner["codecs"]) > 1 else None
            grid = Grid(rows, width, dtype, chunk_rows, compressor)
            known = type(chunk_rows) is int and 0 < chunk_rows <= max(1, rows) and facts == grid.facts()
            return grid if known else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            refuse_limit(folder / METADATA, error)
            return None

    @cached_property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @cached_property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.row_bytes

    @cached_property
    def chunks(self) -> int:
        return max(1, -(-self.rows // self.chunk_rows))

    @cached_property
    def shape(self) -> tuple[int, int]:
        return self.chunks * self.chunk_rows, self.width

    @cached_property
    def data_bytes(self) -> int:
        return self.chunks * self.chunk_bytes

    @cached_property
    def index_bytes(self) -> int:
        return 16 * self.chunks + 4

    def parts(self, first_row: int, out: memoryview) -> Iterator[tuple[int, int, memoryview]]:
        """Cut flat bytes of rows from `first_row` on at chunks' ends: (chunk, first byte in it, piece of `out`)."""
        while out:
            chunk, row = divmod(first_row, self.chunk_rows)
            part = out[: self.chunk_bytes - row * self.row_bytes]
            yield chunk, row * self.row_bytes, part
            first_row, out = first_row + len(part) // self.row_bytes, out[len(part) :]

    def index(self) -> bytes:
        """The index of uncompressed chunks that lie in order, end to end."""
        return chunk_index(np.full(self.chunks, self.chunk_bytes, "<u8"))

    def metadata(self) -> bytes:
        """The array's `zarr.json`."""
        return (json.dumps(self.facts(), indent=1) + "\n").encode()

    def facts(self) -> dict:
        """The content of `zarr.json`."""
        shape = list(self.shape)
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [self.chunk_rows, self.width],
            "codecs": [little] if self.compressor is None else [little, self.compressor],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "dimension_names": ["row", "channel"],
        }


def chunk_index(sizes: np.ndarray) -> bytes:
    """The index of chunks of these sizes in bytes, in order, end to end."""
    sizes = sizes.astype("<u8")
    pairs = np.stack([np.cumsum(sizes, dtype="<u8") - sizes, sizes], axis=1).tobytes()
    return pairs + struct.pack("<I", google_crc32c.value(pairs))


def parse_chunk_index(data: bytes, end: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """First byte and size of each chunk, int64, from the index of a file whose chunks end before byte `end`.

    CacheError when its crc does not match, or a chunk is absent or lies outside.
    """
    pairs = data[:-4]
    if struct.pack("<I", google_crc32c.value(pairs)) != data[-4:]:
        raise CacheError(f"{path}: damaged, the chunk index does not match its crc32c; run `pipeline verify`")
    starts, sizes = np.frombuffer(pairs, "<u8").reshape(-1, 2).T
    # An absent chunk, (2^64 - 1, 2^64 - 1), reads as zeros elsewhere; here a hole is damage.
    if (sizes > end).any() or (starts > end - np.minimum(sizes, end)).any():
        raise CacheError(f"{path}: damaged, the chunk index has a hole; run `pipeline verify`")
    return starts.astype(np.int64), sizes.astype(np.int64)


def split_rows(first: int, count: int, step: int) -> Iterator[tuple[int, int]]:
    """Split `count` rows from `first` on, at multiples of `step`, into ranges (first, stop)."""
    stop = first + count
    while first < stop:
        end = min((first // step + 1) * step, stop)
        yield first, end
        first = end


class ShardFileWriter:
    """Streams the rows of one array into `folder` and computes its checksum. Call `finish` after the last row."""

    def __init__(self, folder: Path, grid: Grid):
        self.grid = grid
        self.folder = folder
        (folder / SHARD_FILE).parent.mkdir(parents=True)
        (folder / METADATA).write_bytes(grid.metadata())
        self._fd = os.open(folder / SHARD_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._digest = xxhash.xxh3_128()
        self._size = self._sent = 0

    def write(self, rows: np.ndarray) -> None:
        """Append rows, C-contiguous [n, width]."""
        data = memoryview(rows).cast("B") if rows.size else b""
        for first in range(0, len(data), PIECE):
            self._append(data[first : first + PIECE])

    def _append(self, data) -> None:
        write_all(self._fd, data)
        self._digest.update(data)
        self._size += len(data)
        if self._size - self._sent >= WRITE_BACK:
            start_writeback(self._fd, self._sent, self._size - self._sent)
            self._sent = self._size

    def finish(self) -> None:
        """Fill the last chunk with zeros, write the index and sync."""
        written = self.grid.rows * self.grid.row_bytes
        assert self._size == written, f"{self._size} bytes of rows written, {written} planned"
        while rest := self.grid.data_bytes - self._size:
            self._append(_ZEROS[:rest])
        self._end(self.grid.index())

    def _end(self, index: bytes) -> None:
        self._append(index)
        os.fsync(self._fd)
        self.close()

    def facts(self) -> dict[str, dict]:
        """Size and digest of each file, by its path in the array's folder."""
        metadata = FileFact.of_bytes(self.grid.metadata())
        return {
            METADATA: metadata.as_dict(),
            SHARD_FILE: FileFact(self._size, self._digest.hexdigest()).as_dict(),
        }

    def close(self) -> None:
        fd, self._fd = self._fd, None  # cleared first, so that an interrupt cannot make us close it twice
        if fd is not None:
            os.close(fd)


class OpenFile:
    """A file of a column, open for reading. Thread-safe; closed when it is garbage-collected."""

    def __init__(self, path: Path):
        self.path = path
        self.fd = os.open(path, OPEN)

    def stamp(self) -> tuple[int, ...]:
        """Identity and state of the file: device, inode, size, mtime and ctime."""
        stat = os.fstat(self.fd)
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

    def read(self, start: int, out: memoryview, wait: bool = True) -> bool:
        """Fill `out` from byte `start` on. Without `wait`, return False unless the bytes are in the page cache.

        CacheError when the file ends before, or the disk fails.
        """
        while out:
            try:
                count = os.preadv(self.fd, [out], start, 0 if wait else NOWAIT)
            except OSError as error:
                if not wait and error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
                    return False
                raise read_error(self.path, error) from error
            if not count:
                raise CacheError(f"{self.path}: ends before byte {start}; run `pipeline verify`")
            if count == len(out):
                break
            start, out = start + count, out[count:]
        return True

    def read_index(self, grid: Grid) -> tuple[int, bytes]:
        """Read the index of chunks at the file's end; return where it begins, and its bytes. CacheError without one."""
        size = os.fstat(self.fd).st_size
        if size < grid.index_bytes:
            raise CacheError(f"{self.path}: {size} bytes, less than its index; run `pipeline verify`")
        index = bytearray(grid.index_bytes)
        self.read(size - grid.index_bytes, memoryview(index))
        return size - grid.index_bytes, bytes(index)

    def prefetch(self, start: int, size: int) -> None:
        """Ask the kernel to load bytes into the page cache, without waiting for them."""
        if ADVISE is not None:
            ADVISE(self.fd, start, size, os.POSIX_FADV_WILLNEED)

    def __del__(self):
        if getattr(self, "fd", None) is not None:
            os.close(self.fd)


class ShardFile(OpenFile):
    """An open shard file, for reading rows."""

    def __init__(self, folder: Path, grid: Grid):
        super().__init__(folder / SHARD_FILE)
        self.grid = grid
        end, index = self.read_index(grid)
        self.in_order = end == grid.data_bytes and index == grid.index()
        if not self.in_order:  # chunks in another order
            self._chunks, sizes = parse_chunk_index(index, end, self.path)
            if (sizes != grid.chunk_bytes).any():
                raise CacheError(f"{self.path}: damaged, the chunk index has a hole; run `pipeline verify`")

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Split `count` rows from `first` on into ranges (first, stop) of the best size to read at a time."""
        return split_rows(first, count, max(1, PIECE // self.grid.row_bytes))

    def read_into(self, first_row: int, out: memoryview) -> None:
        """Fill `out`, whole rows as flat bytes, from `first_row` on. CacheError when the file ends before."""
        assert first_row * self.grid.row_bytes + len(out) <= self.grid.data_bytes, f"rows beyond {self.path}"
        if self.in_order:
            self.read(first_row * self.grid.row_bytes, out)
            return
        for chunk, at, part in self.grid.parts(first_row, out):
            self.read(int(self._chunks[chunk]) + at, part)


def open_shard_file(folder: Path, grid: Grid) -> ShardFile:
    """Open an array in the chunks that we write, or else in those that its `zarr.json` states."""
    with contextlib.suppress(CacheError):
        file = ShardFile(folder, grid)
        if file.in_order:
            return file
    stated = Grid.on_disk(folder, grid.rows, grid.width, grid.dtype)
    return ShardFile(folder, stated if stated and stated.compressor is None else grid)
