"""The files of a corpus: which of a folder are read, what each holds, and its rows in chunks.

Rows are handed on as they lie in the file, bytes of JSON or a batch of Arrow, so that whoever takes a chunk, in this
process or another, parses it. Memory is bounded by a chunk and one row.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import zstandard

from pipeline.corpus.conversation import COLUMNS, refused_columns
from pipeline.corpus.messages import parse_json
from pipeline.corpus.tally import Unusable
from pipeline.errors import DataError
from pipeline.visible_text import visible

TEXTS, PACKED, TABLES = (".jsonl", ".ndjson", ".json"), (".gz", ".zst"), (".parquet", ".arrow")
SUFFIXES = (*(text + packed for text in TEXTS for packed in ("", *PACKED)), *TABLES)
CHUNK_ROWS, CHUNK_BYTES = 128, 256 << 10
LONGEST_ROW = 256 << 20  # bytes; a longer one is a fault, unread
_READ = 1 << 20
_OTHERS = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
_UTF8_MARK = b"\xef\xbb\xbf"
_WIDE = (b"\xff\xfe", b"\xfe\xff", b"\0")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},"]', re.DOTALL)


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file, unparsed: `texts`, the JSON of each or why it is none, or `batch`, an Arrow stream.

    lines: where each row stands, from 1; in an array or a table, which row it is. split: the file's own, or "".
    """

    file: str
    split: str
    lines: list[int]
    texts: list[bytes | tuple[str, str]] | None = None
    batch: bytes | None = None

    @property
    def size(self) -> int:
        return len(self.batch) if self.texts is None else sum(map(len, self.texts))

    def alone(self, row: int) -> "Chunk":
        """Return one row of the chunk as a chunk."""
        lines = [self.lines[row]]
        if self.texts is not None:
            return Chunk(self.file, self.split, lines, [self.texts[row]])
        return Chunk(self.file, self.split, lines, batch=_packed(_unpacked(self.batch).slice(row, 1)))

    def rows(self) -> Iterator[tuple[int, object]]:
        """Yield (line, what stands there, or Unusable)."""
        made = map(_parsed, self.texts) if self.texts is not None else iter(_table_rows(self.batch))
        yield from zip(self.lines, made, strict=True)


def read_chunks(file: Path, name: str, split: str = "", *, prompts: bool = False) -> Iterator[Chunk]:
    """Yield the rows of a file in chunks. DataError for a file that is not what its name says, or is cut off.

    name: of the file, as reports have it. prompts: a table needs to hold no replies.
    """
    if file.name.lower().endswith(TABLES):
        yield from _table_chunks(file, name, split, prompts)
        return
    lines, texts, size = [], [], 0
    for line, text in _texts(file):
        lines.append(line)
        texts.append(text)
        size += len(text)
        if len(lines) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield Chunk(name, split, lines, texts)
            lines, texts, size = [], [], 0
    if lines:
        yield Chunk(name, split, lines, texts)


def _parsed(text: bytes | tuple[str, str]) -> object:
    if isinstance(text, tuple):
        return Unusable(*text)
    try:
        return parse_json(text.removeprefix(_UTF8_MARK).decode())
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:100]
        return Unusable("broken line", f"no JSON ({why})")


@contextmanager
def _opened(file: Path) -> Iterator[io.BufferedReader]:
    """Open a text file, unpacked. DataError where it cannot be read, or its packing is damaged or cut off."""
    suffix = file.suffix.lower()
    try:
        with file.open("rb") as raw:
            unpacked = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else _Zstd(raw) if suffix == ".zst" else raw
            with io.BufferedReader(unpacked, _READ) as stream:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{file}: no whole {suffix} file ({str(error)[:100]}); copy or pack it again") from error
    except OSError as error:
        raise DataError(
            f"{file}: it cannot be read ({error.strerror or error}); see to its rights or its disk"
        ) from error


class _Zstd(io.RawIOBase):
    """What zstd packed, one frame or several. EOFError where the last is cut off; zstandard's own reader just ends."""

    def __init__(self, packed: io.BufferedIOBase):
        self.packed, self.ready, self.rest = packed, memoryview(b""), b""
        self.frame = None

    def readable(self) -> bool:
        return True

    def readinto(self, room) -> int:
        while not self.ready:
            data = self.rest or self.packed.read(_READ // 8)
            if not data:
                if self.frame is not None:
                    raise EOFError("it ends inside its data")
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.ready, self.rest = memoryview(self.frame.decompress(data)), b""
            if self.frame.eof:
                self.rest, self.frame = self.frame.unused_data, None
        size = min(len(room), len(self.ready))
        room[:size], self.ready = self.ready[:size], self.ready[size:]
        return size


def _texts(file: Path) -> Iterator[tuple[int, bytes | tuple[str, str]]]:
    """Yield (line or number, the JSON of a row, or why it cannot be read)."""
    with _opened(file) as stream:
        head = stream.peek(_READ)
        _check_head(file, head)
        form = _form(head)
        yield from _lines(stream) if form == "lines" else _values(file, stream, form == "array")


def _check_head(file: Path, head: bytes) -> None:
    """Refuse by name what is no UTF-8 text: DataError."""
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            raise DataError(f"{file}: it is {what} by its content, whatever its name says; rename it, or unpack it")
    if head.startswith(_WIDE) or b"\0" in head[:4]:
        raise DataError(f"{file}: it is UTF-16 or UTF-32, not UTF-8; convert it, say with `iconv -f UTF-16 -t UTF-8`")


def _form(head: bytes) -> str:
    """Return how rows follow each other, by a file's beginning: lines, an array, or objects over several lines each."""
    text = head.removeprefix(_UTF8_MARK).lstrip()
    first, end, rest = text.partition(b"\n")
    try:
        alone = bool(end) and isinstance(json.loads(first), list | dict)
    except (ValueError, RecursionError):
        alone = False
    if text.startswith(b"["):
        return "lines" if alone and rest.strip() else "array"
    over_lines = not alone and first.rstrip() == b"{" and rest.lstrip().startswith((b'"', b"}"))
    return "objects" if over_lines else "lines"


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | tuple[str, str]]]:
    for number in count(1):
        line = stream.readline(LONGEST_ROW)
        if not line:
            return
        if len(line) == LONGEST_ROW and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(_READ)
            yield number, ("too long", f"is a line of more than {LONGEST_ROW >> 20} MiB")
        elif not line.isspace() and line.strip() != _UTF8_MARK:
            yield number, line


def _values(file: Path, stream: io.BufferedReader, array: bool) -> Iterator[tuple[int, bytes | tuple[str, str]]]:
    """Yield (number from 1, JSON) of the values of an array, or of objects that follow each other."""
    number, depth, base, held, at, start = 0, 0, int(array), b"", 0, 0
    while more := stream.read(max(_READ, len(held))):
        held, at, start = held[start:] + more, at - start, 0
        if len(held) > LONGEST_ROW:
            raise DataError(f"{file}: row {number + 1} has more than {LONGEST_ROW >> 20} MiB, or never ends; split it")
        for found in _TOKEN.finditer(held, at):
            letter = found[0][:1]
            if letter == b'"' and found.end() == found.start() + 1:  # a text that goes on in the next piece
                at = found.start()
                break
            at, before = found.end(), depth
            depth += (letter in b"[{") - (letter in b"]}")
            if array and (before, depth) == (0, 1):
                start = at
            elif letter in (b",]" if array else b"}") and before == 1 and depth == base - (letter == b"]"):
                value = held[start : at - int(array)].strip(b" \t\r\n," + _UTF8_MARK)
                start = at
                if value:
                    number += 1
                    yield number, value
        else:
            at = len(held)
    if rest := held[start:].strip():
        what = "stands behind the end of the array" if array and not depth else "does not end; the file is cut off"
        yield number + 1, ("broken line", f"no JSON ({rest[:40].decode(errors='replace')!r} {what})")


def _table_chunks(file: Path, name: str, split: str, prompts: bool) -> Iterator[Chunk]:
    import pyarrow as pa

    parquet = file.name.lower().endswith(".parquet")
    line = 0
    try:
        for batch in _parquet_batches(file, prompts) if parquet else _arrow_batches(file, prompts):
            for piece in _pieces(batch):
                lines = list(range(line + 1, line + len(piece) + 1))
                line += len(piece)
                yield Chunk(name, split, lines, batch=_packed(piece))
    except (pa.ArrowException, OSError, ValueError) as error:
        what = "Parquet" if parquet else "Arrow file"
        said = str(error).strip().split("\n")[0][:160]
        raise DataError(f"{file}: no readable {what} ({said}); write it again") from error


def _pieces(batch) -> Iterator:
    """Yield a batch in pieces of the size of a chunk."""
    rows = min(CHUNK_ROWS, max(1, CHUNK_BYTES * len(batch) // max(1, batch.nbytes)))
    for first in range(0, len(batch), rows):
        yield batch.slice(first, rows)


def _parquet_batches(file: Path, prompts: bool) -> Iterator:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        columns = _wanted(file, table.schema_arrow.names, prompts)
        yield from table.iter_batches(batch_size=CHUNK_ROWS, columns=columns)


def _arrow_batches(file: Path, prompts: bool) -> Iterator:
    """Yield the batches of an Arrow file: the format with a footer, or the stream that `datasets` writes."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as mapped:
        if mapped.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(mapped)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            mapped.seek(0)
            batches = reader = pa.ipc.open_stream(mapped)
        columns = _wanted(file, reader.schema.names, prompts)
        yield from (batch.select(columns) for batch in batches)


def _wanted(file: Path, columns: list[str], prompts: bool) -> list[str]:
    """Return the columns of a table that are read. DataError, with those found, where they are no conversations."""
    refused = refused_columns(columns, prompts)
    if refused:
        raise DataError(f"{file}: it {visible(refused)}")
    return [name for name in columns if name in COLUMNS]


def _packed(batch) -> bytes:
    """Return a batch as an Arrow stream."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _unpacked(data: bytes):
    import pyarrow as pa

    return pa.ipc.open_stream(data).read_next_batch()


def _table_rows(data: bytes) -> list[object]:
    """Return the rows of an Arrow stream as objects; a row that Arrow cannot give is Unusable."""
    import pyarrow as pa

    batch = _unpacked(data)
    try:
        return [without_absent(row) for row in batch.to_pylist(maps_as_pydicts="strict")]
    except (KeyError, UnicodeDecodeError, pa.ArrowException):
        return [_table_row(batch.slice(at, 1)) for at in range(len(batch))]


def _table_row(row) -> object:
    import pyarrow as pa

    try:
        return without_absent(row.to_pylist(maps_as_pydicts="strict")[0])
    except (KeyError, UnicodeDecodeError, pa.ArrowException) as error:
        return Unusable("broken line", f"is no row of text ({str(error)[:100]})")


def without_absent(value: object) -> object:
    """Return a row of a table without the keys that others have: Arrow gives every object all of them, as None."""
    if isinstance(value, dict):
        return {key: without_absent(inner) for key, inner in value.items() if inner is not None}
    return [without_absent(inner) for inner in value] if isinstance(value, list) else value
