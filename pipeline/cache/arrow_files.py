"""Arrow files of a cache: mapped, of exactly the columns expected, and nothing in them taken on trust.

Arrow itself believes what a file says of its lengths and offsets, and would follow one that leads out of its buffer. So
every batch is validated before anything of it is used. Compressed batches are refused before they are read: a small
one may unpack to any size, and ours are never compressed.
"""

import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from pipeline.cache.atomic import read_errors
from pipeline.errors import CacheError, first_line
from pipeline.os_errors import refuse_limit

MAGIC = b"ARROW1\0\0"  # of an IPC file; a stream of messages follows, then a footer that repeats where they are
_HEADER, _COMPRESSION = 2, 3  # fields of the tables Message and RecordBatch in Arrow's format/Message.fbs


def read_batches(path: Path, schema: pa.Schema) -> list[pa.RecordBatch]:
    """Map the record batches of an Arrow IPC file. CacheError for any other file; its digest is the caller's."""
    with read_errors(path), pa.memory_map(str(path)) as file:
        return parse_batches(file.read_buffer(), schema, path)


def parse_batches(data: pa.Buffer, schema: pa.Schema, path: Path) -> list[pa.RecordBatch]:
    """What `read_batches` returns, from the file's bytes, which are not copied; `path` is for messages."""
    if data.size < len(MAGIC) or data.slice(0, len(MAGIC)).to_pybytes() != MAGIC:
        raise CacheError(f"{path}: damaged, no Arrow file any more; run `pipeline verify`")
    try:
        messages = pa.ipc.MessageReader.open_stream(pa.BufferReader(data.slice(len(MAGIC))))
        first = messages.read_next_message()
        if not _has_header(first, "schema") or not pa.ipc.read_schema(first).equals(schema):
            raise CacheError(f"{path}: has other columns than such a file has; run `pipeline verify`")
        return [_checked_batch(message, schema, path) for message in messages]
    except (pa.ArrowException, ValueError, OSError, StopIteration) as error:
        refuse_limit(path, error)
        said = first_line(error, None)
        raise CacheError(f"{path}: damaged, it cannot be read: {said}; run `pipeline verify`") from error


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
