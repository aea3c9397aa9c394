"""Samples as the plan stores them: ids, loss mask and the offset of their rows, one Arrow record batch per shard.

The same batch is part of a plan segment and, alone in a file, a shard's `samples.arrow`.

Arrow itself believes what a file says of its lengths and offsets, and would follow one that leads out of its buffer. So
every batch of every Arrow file of a cache is validated before anything of it is used. Compressed batches are refused
before they are read: a small one may unpack to any size, and ours are never compressed.

    n samples of a shard   T rows of a sample
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from pipeline.cache.atomic import read_errors
from pipeline.errors import UPGRADE, CacheError, VersionError, first_line, refuse_limit
from pipeline.target.layers import final_rows

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.binary(16), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),  # rows of the shard before this sample
        pa.field("final_offset", pa.int64(), nullable=False),  # the same among the rows that keep `final`
        pa.field("length", pa.int32(), nullable=False),
        pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("loss_mask", pa.list_(pa.field("item", pa.bool_(), nullable=False)), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
    ]
)
ORIGIN = ("domain", "split", "source", "line")  # columns of where a sample came from
MAGIC = b"ARROW1\0\0"  # of an IPC file; a stream of messages follows, then a footer that repeats where they are
_HEADER, _COMPRESSION = 2, 3  # fields of the tables Message and RecordBatch in Arrow's format/Message.fbs
SPOOLED = -1  # the shard number of samples that are not yet assigned to one


@dataclass(frozen=True)
class PlannedSample:
    """One conversation, truncated and trimmed: ids int32 [T], loss mask bool [T], and where it came from."""

    ids: np.ndarray
    mask: np.ndarray
    domain: str = ""
    split: str = ""  # "train", "heldout", or "" where the corpus does not say
    file: str = ""
    line: int = 0
    digest: bytes | None = None  # its `sample_id`, where it has been computed


def sample_id(ids_T: np.ndarray, mask_T: np.ndarray) -> bytes:
    """The 16 bytes that name a sample: blake2b of its ids (int32, little-endian) and its mask (packed, low bit first).

    The digest's input has 4 T + ceil(T / 8) bytes, from which T follows, so no two samples share an input.
    """
    packed = np.packbits(np.asarray(mask_T, bool), bitorder="little")
    return hashlib.blake2b(np.asarray(ids_T, "<i4").tobytes() + packed.tobytes(), digest_size=16).digest()


def to_numpy(array: pa.Array) -> np.ndarray:
    """View an Arrow array of numbers without nulls as numpy. (Arrow's own `to_numpy` would import pandas: 1 s.)"""
    dtype = np.dtype(str(array.type))
    if not len(array):
        return np.empty(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def id_numbers(ids: pa.Array) -> np.ndarray:
    """Return sample ids as 128-bit numbers, uint64 [n, 2] (high, low), which sort as the 16 bytes do."""
    names = np.frombuffer(ids.buffers()[1], ">u8", 2 * len(ids), 16 * ids.offset)
    return names.reshape(-1, 2).astype(np.uint64)


def make_batch(samples: Sequence[PlannedSample], ids16: Sequence[bytes], shard: int) -> pa.RecordBatch:
    """Build the record batch of one shard from samples and their ids, in this order. Deterministic in its bytes."""
    lengths = np.array([len(sample.ids) for sample in samples], np.int64)
    kept = np.array([int(final_rows(sample.mask).sum()) for sample in samples], np.int64)
    bounds = pa.py_buffer(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    ids = np.concatenate([np.asarray(sample.ids, np.int32) for sample in samples])
    mask = np.concatenate([np.asarray(sample.mask, bool) for sample in samples])
    # From our own buffers: the unused bits at the end of Arrow's are undefined.
    bits = pa.py_buffer(np.packbits(mask, bitorder="little"))
    id_items = pa.Array.from_buffers(pa.int32(), len(ids), [None, pa.py_buffer(ids)])
    mask_items = pa.Array.from_buffers(pa.bool_(), len(mask), [None, bits])
    count = len(samples)
    columns = [
        pa.Array.from_buffers(pa.binary(16), count, [None, pa.py_buffer(b"".join(ids16))]),
        pa.array(np.full(count, shard, np.int32)),
        pa.array(np.cumsum(lengths) - lengths),
        pa.array(np.cumsum(kept) - kept),
        pa.array(lengths.astype(np.int32)),
        pa.Array.from_buffers(SCHEMA.field("input_ids").type, count, [None, bounds], children=[id_items]),
        pa.Array.from_buffers(SCHEMA.field("loss_mask").type, count, [None, bounds], children=[mask_items]),
        pa.array([sample.domain for sample in samples], pa.string()),
        pa.array([sample.split for sample in samples], pa.string()),
        pa.array([sample.file for sample in samples], pa.string()),
        pa.array([sample.line for sample in samples], pa.int64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def batch_bytes(batch: pa.RecordBatch) -> bytes:
    """Serialise a batch as an Arrow IPC file, such as `samples.arrow`."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def write_batches(path: Path, batches: Iterable[pa.RecordBatch]) -> int:
    """Write the batches of shards to one Arrow IPC file, a segment of the plan. Returns their number."""
    written = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
            written += 1
    return written


def read_batch(path: Path) -> pa.RecordBatch:
    """Map a `samples.arrow`. CacheError when it is no file of that form; its digest is the caller's to check."""
    batches = read_batches(path, SCHEMA)
    if len(batches) != 1:
        raise CacheError(f"{path}: {len(batches)} shards, where one is expected; run `pipeline verify`")
    return checked_batch(batches[0], path)


def checked_batch(batch: pa.RecordBatch, path: Path) -> pa.RecordBatch:
    """Return a shard's batch if its offsets and lengths are consistent; else raise CacheError for `path`."""
    lengths, offsets = (to_numpy(batch.column(name)).astype(np.int64) for name in ("length", "offset"))
    kept = np.diff(to_numpy(batch.column("final_offset")), prepend=0)
    right = len(batch) and (offsets == np.cumsum(lengths) - lengths).all() and not kept[0] and (kept >= 0).all()
    right = right and (kept[1:] <= lengths[:-1]).all() and (lengths > 0).all()
    for name in ("input_ids", "loss_mask"):
        lists = batch.column(name)
        right = right and lists.offset == 0 and np.array_equal(np.diff(to_numpy(lists.offsets)), lengths)
        right = right and not lists.values.null_count
    if not right:
        raise CacheError(f"{path}: damaged, its samples are not where it says; run `pipeline verify`")
    return batch


class ShardPlan:
    """The plan of one shard: its samples, longest first, and the offsets of their rows."""

    def __init__(self, batch: pa.RecordBatch, number: int):
        self.batch = batch
        self.number = number

    def __len__(self) -> int:
        return self.batch.num_rows

    def _numbers(self, name: str) -> np.ndarray:
        return to_numpy(self.batch.column(name))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Rows of each sample, int64 [n]."""
        return self._numbers("length").astype(np.int64)

    @cached_property
    def bounds(self) -> np.ndarray:
        """First row of each sample in a column that keeps all rows, and the end: int64 [n + 1]."""
        return np.append(self._numbers("offset"), self._numbers("offset")[-1] + self.lengths[-1])

    @cached_property
    def final_bounds(self) -> np.ndarray:
        """The same for a column that keeps only the rows of `layers.final_rows`."""
        starts = self._numbers("final_offset")
        return np.append(starts, starts[-1] + int(final_rows(self.mask(len(self) - 1)).sum()))

    @property
    def rows(self) -> int:
        return int(self.bounds[-1])

    @property
    def final_count(self) -> int:
        """Rows that keep `final`, of all samples together."""
        return int(self.final_bounds[-1])

    @cached_property
    def _ids(self) -> tuple[np.ndarray, np.ndarray]:
        lists = self.batch.column("input_ids")
        return to_numpy(lists.offsets), to_numpy(lists.values)

    @cached_property
    def _bits(self) -> tuple[np.ndarray, np.ndarray]:
        """For each sample the number of its first mask bit, and the bytes the bits are in."""
        lists = self.batch.column("loss_mask")
        items = lists.values
        return to_numpy(lists.offsets) + items.offset, np.frombuffer(items.buffers()[1], np.uint8)

    def ids(self, row: int) -> np.ndarray:
        """Token ids of sample `row` of the shard, int32 [T], read-only."""
        starts, ids = self._ids
        return ids[starts[row] : starts[row + 1]]

    def mask(self, row: int) -> np.ndarray:
        """Loss mask of sample `row`, bool [T]."""
        starts, data = self._bits
        start, stop = int(starts[row]), int(starts[row + 1])
        bits = np.unpackbits(data[start // 8 : -(-stop // 8)], bitorder="little")
        return bits[start % 8 : start % 8 + stop - start].astype(bool)

    @cached_property
    def supervised(self) -> np.ndarray:
        """Supervised rows of each sample, int64 [n]."""
        starts, data = self._bits
        bits = np.unpackbits(data, bitorder="little")[starts[0] : starts[-1]]
        return np.add.reduceat(bits, (starts[:-1] - starts[0]).astype(np.int64), dtype=np.int64)

    @cached_property
    def sample_ids(self) -> np.ndarray:
        """The sample ids as `id_numbers`, uint64 [n, 2]."""
        return id_numbers(self.batch.column("sample_id"))

    def text(self, name: str) -> list[str]:
        """One of the text columns: `domain`, `split`, `source`."""
        return self.batch.column(name).to_pylist()

    def samples(self) -> Iterator[PlannedSample]:
        """Yield the samples as they were planned, in order."""
        origins = zip(*(self.batch.column(name).to_pylist() for name in ORIGIN), strict=True)
        for row, origin in enumerate(origins):
            yield PlannedSample(self.ids(row), self.mask(row), *origin)

    def line(self, row: int) -> int:
        return self.batch.column("line")[row].as_py()

    def rebuilt_batch(self) -> pa.RecordBatch:
        """Build the shard's batch again from ids, masks and origins."""
        samples = [*self.samples()]
        return make_batch(samples, [sample_id(sample.ids, sample.mask) for sample in samples], self.number)


def read_batches(path: Path, schema: pa.Schema) -> list[pa.RecordBatch]:
    """Map the record batches of an Arrow IPC file; its digest is the caller's to check.

    CacheError for any other file, VersionError for one that has further columns.
    """
    with read_errors(path), pa.memory_map(str(path)) as file:
        return parse_batches(file.read_buffer(), schema, path)


def parse_batches(data: pa.Buffer, schema: pa.Schema, path: Path) -> list[pa.RecordBatch]:
    """What `read_batches` returns, from the file's bytes, which are not copied; `path` is for messages."""
    if data.size < len(MAGIC) or data.slice(0, len(MAGIC)).to_pybytes() != MAGIC:
        raise CacheError(f"{path}: damaged, no Arrow file any more; run `pipeline verify`")
    try:
        messages = pa.ipc.MessageReader.open_stream(pa.BufferReader(data.slice(len(MAGIC))))
        first = messages.read_next_message()
        if not _has_header(first, "schema"):
            raise CacheError(f"{path}: does not begin with its columns; run `pipeline verify`")
        _check_columns(pa.ipc.read_schema(first), schema, path)
        return [_checked_batch(message, schema, path) for message in messages]
    except (pa.ArrowException, ValueError, OSError, StopIteration) as error:
        refuse_limit(path, error)
        said = first_line(error, None)
        raise CacheError(f"{path}: damaged, it cannot be read: {said}; run `pipeline verify`") from error


def _check_columns(found: pa.Schema, wanted: pa.Schema, path: Path) -> None:
    """Raise VersionError where a file has all its columns and others, CacheError where it lacks some."""
    if found.equals(wanted):
        return
    added = [name for name in found.names if name not in wanted.names]
    if added and pa.schema([field for field in found if field.name in wanted.names]).equals(wanted):
        raise VersionError(f"{path}: its column {added[0][:80]!r} is unknown to this version; {UPGRADE}")
    raise CacheError(f"{path}: has other columns than such a file has; run `pipeline verify`")


def _checked_batch(message: pa.ipc.Message, schema: pa.Schema, path: Path) -> pa.RecordBatch:
    if not _has_header(message, "record batch") or _is_compressed(message.metadata.to_pybytes()):
        raise CacheError(f"{path}: holds something else than plain record batches; run `pipeline verify`")
    batch = pa.ipc.read_record_batch(message, schema)
    batch.validate(full=True)
    if any(column.null_count for column in batch.columns):
        raise CacheError(f"{path}: lacks values; run `pipeline verify`")
    return batch


def _has_header(message: pa.ipc.Message, kind: str) -> bool:
    """Whether a message is of a kind and says so in full: Arrow follows a header that is absent to nowhere."""
    metadata = message.metadata.to_pybytes()
    return message.type == kind and _field(metadata, struct.unpack_from("<I", metadata)[0], _HEADER) != 0


def _is_compressed(metadata: bytes) -> bool:
    """Whether the flatbuffer of a record batch, which Arrow has verified, names a compression of its buffers."""
    header = _field(metadata, struct.unpack_from("<I", metadata)[0], _HEADER)
    return _field(metadata, header + struct.unpack_from("<I", metadata, header)[0], _COMPRESSION) != 0


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table is; 0 when it is absent."""
    layout = table - struct.unpack_from("<i", data, table)[0]
    at = 4 + 2 * number
    found = struct.unpack_from("<H", data, layout + at)[0] if at < struct.unpack_from("<H", data, layout)[0] else 0
    return table + found if found else 0
