"""Reads the files of a corpus in chunks of unparsed records: JSON Lines, arrays, Parquet, Arrow, also compressed.

Records are passed on as they are in the file, bytes of JSON or an Arrow batch, so that another process can parse them.
Memory is bounded by a chunk and one record.
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

import pyarrow as pa

from pipeline.corpus.messages import parse_json
from pipeline.corpus.record_formats import KNOWN_COLUMNS, columns_refusal
from pipeline.corpus.rejections import Unusable
from pipeline.errors import DataError, cause_of, first_line
from pipeline.visible_text import visible

TEXT_SUFFIXES, COMPRESSED, TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json"), (".gz", ".zst"), (".parquet", ".arrow")
SUFFIXES = (*(text + compressed for text in TEXT_SUFFIXES for compressed in ("", *COMPRESSED)), *TABLE_SUFFIXES)
CHUNK_RECORDS, CHUNK_BYTES = 128, 256 << 10
LONGEST_RECORD = 256 << 20  # bytes; a longer one is rejected unread
_READ = 1 << 20
_MAGIC_NUMBERS = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\3\4": "zip",
}
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},"]', re.DOTALL)


@dataclass(frozen=True)
class Chunk:
    """Some records of a file, unparsed: `texts`, each one's JSON or (reason, detail), or `batch`, an Arrow stream.

    lines: the line of each record, from 1; in an array or a table, the record's number. split: the file's, or "".
    """

    file: str
    split: str
    lines: list[int]
    texts: list[bytes | tuple[str, str]] | None = None
    batch: bytes | None = None

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def size(self) -> int:
        return len(self.batch) if self.texts is None else sum(map(len, self.texts))

    def single_record(self, at: int) -> "Chunk":
        lines = [self.lines[at]]
        if self.texts is not None:
            return Chunk(self.file, self.split, lines, [self.texts[at]])
        return Chunk(self.file, self.split, lines, batch=_to_arrow_stream(_from_arrow_stream(self.batch).slice(at, 1)))

    def records(self) -> Iterator[tuple[int, object]]:
        """Yield (line, the parsed record or an Unusable)."""
        made = map(_parsed, self.texts) if self.texts is not None else iter(_table_records(self.batch))
        yield from zip(self.lines, made, strict=True)


def read_chunks(file: Path, name: str, split: str = "", *, prompts: bool = False) -> Iterator[Chunk]:
    """Yield the records of a file in chunks. DataError for a file of another format than its name says, or truncated.

    name: the file's, for reports. prompts: a table may lack replies.
    """
    if file.name.lower().endswith(TABLE_SUFFIXES):
        yield from _table_chunks(file, name, split, prompts)
        return
    lines, texts, size = [], [], 0
    for line, text in _record_texts(file):
        lines.append(line)
        texts.append(text)
        size += len(text)
        if len(lines) == CHUNK_RECORDS or size >= CHUNK_BYTES:
            yield Chunk(name, split, lines, texts)
            lines, texts, size = [], [], 0
    if lines:
        yield Chunk(name, split, lines, texts)


def _parsed(text: bytes | tuple[str, str]) -> object:
    if isinstance(text, tuple):
        return Unusable(*text)
    try:
        return parse_json(text.removeprefix(_UTF8_BOM).decode())
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:100]
        return Unusable("broken line", f"no JSON ({why})")


@contextmanager
def _open_decompressed(file: Path) -> Iterator[io.BufferedReader]:
    """Open a text file, decompressed. DataError where it cannot be read, or is damaged or truncated."""
    suffix = file.suffix.lower()
    try:
        with file.open("rb") as raw:
            unpacked = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw
            unpacked = pa.CompressedInputStream(raw, "zstd") if suffix == ".zst" else unpacked
            with io.BufferedReader(unpacked, _READ) as stream:
                yield stream
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, "errno", None):  # of the system, not of gzip or Arrow
            raise DataError(f"{file}: it cannot be read ({cause_of(error)}); see to its rights or its disk") from error
        raise DataError(f"{file}: no whole {suffix} file ({str(error)[:100]}); copy or pack it again") from error


def _record_texts(file: Path) -> Iterator[tuple[int, bytes | tuple[str, str]]]:
    """Yield (line or record number, the JSON of a record or (reason, detail))."""
    with _open_decompressed(file) as stream:
        head = stream.peek(_READ)
        _check_head(file, head)
        form = _form(head)
        yield from _lines(stream) if form == "lines" else _values(file, stream, form == "array")


def _check_head(file: Path, head: bytes) -> None:
    """Raise DataError for a file that is no UTF-8 text, naming what it is."""
    for magic, what in _MAGIC_NUMBERS.items():
        if head.startswith(magic):
            raise DataError(f"{file}: it is {what} by its content, whatever its name says; rename it, or unpack it")
    if head.startswith(_UTF16_MARKS) or b"\0" in head[:4]:
        raise DataError(f"{file}: it is UTF-16 or UTF-32, not UTF-8; convert it, say with `iconv -f UTF-16 -t UTF-8`")


def _form(head: bytes) -> str:
    """Return a text file's layout by its beginning: "lines", "array", or "objects" (over several lines each)."""
    text = head.removeprefix(_UTF8_BOM).lstrip()
    first, end, rest = text.partition(b"\n")
    try:
        first_is_json = bool(end) and isinstance(json.loads(first), list | dict)
    except (ValueError, RecursionError):
        first_is_json = False
    if text.startswith(b"["):
        return "lines" if first_is_json and rest.strip() else "array"
    over_lines = not first_is_json and first.rstrip() == b"{" and rest.lstrip().startswith((b'"', b"}"))
    return "objects" if over_lines else "lines"


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | tuple[str, str]]]:
    for number in count(1):
        line = stream.readline(LONGEST_RECORD)
        if not line:
            return
        if len(line) == LONGEST_RECORD and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(_READ)
            yield number, ("too long", f"is a line of more than {LONGEST_RECORD >> 20} MiB")
        elif not line.isspace() and line.strip() != _UTF8_BOM:
            yield number, line


def _values(file: Path, stream: io.BufferedReader, array: bool) -> Iterator[tuple[int, bytes | tuple[str, str]]]:
    """Yield (number from 1, JSON) of the values of an array, or of concatenated objects."""
    number, depth, base, buffer, at, start = 0, 0, int(array), b"", 0, 0
    while read := stream.read(max(_READ, len(buffer))):
        buffer, at, start = buffer[start:] + read, at - start, 0
        if len(buffer) > LONGEST_RECORD:
            raise DataError(
                f"{file}: row {number + 1} has more than {LONGEST_RECORD >> 20} MiB, or never ends; split it"
            )
        for found in _TOKEN.finditer(buffer, at):
            byte = found[0][:1]
            if byte == b'"' and found.end() == found.start() + 1:  # a string that continues in the next read
                at = found.start()
                break
            at, before = found.end(), depth
            depth += (byte in b"[{") - (byte in b"]}")
            if array and (before, depth) == (0, 1):
                start = at
            elif byte in (b",]" if array else b"}") and before == 1 and depth == base - (byte == b"]"):
                value = buffer[start : at - int(array)].strip(b" \t\r\n," + _UTF8_BOM)
                start = at
                if value:
                    number += 1
                    yield number, value
        else:
            at = len(buffer)
    if rest := buffer[start:].strip():
        what = "stands behind the end of the array" if array and not depth else "does not end; the file is cut off"
        yield number + 1, ("broken line", f"no JSON ({rest[:40].decode(errors='replace')!r} {what})")


def _table_chunks(file: Path, name: str, split: str, prompts: bool) -> Iterator[Chunk]:
    parquet = file.name.lower().endswith(".parquet")
    line = 0
    try:
        for batch in _parquet_batches(file, prompts) if parquet else _arrow_batches(file, prompts):
            size = min(CHUNK_RECORDS, max(1, CHUNK_BYTES * len(batch) // max(1, batch.nbytes)))
            for first in range(0, len(batch), size):
                part = batch.slice(first, size)
                lines = list(range(line + 1, line + len(part) + 1))
                line += len(part)
                yield Chunk(name, split, lines, batch=_to_arrow_stream(part))
    except (pa.ArrowException, OSError, ValueError) as error:
        what = "Parquet" if parquet else "Arrow file"
        cause = first_line(error)
        raise DataError(f"{file}: no readable {what} ({cause}); write it again") from error


def _parquet_batches(file: Path, prompts: bool) -> Iterator:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        columns = _columns_to_read(file, table.schema_arrow.names, prompts)
        yield from table.iter_batches(batch_size=CHUNK_RECORDS, columns=columns)


def _arrow_batches(file: Path, prompts: bool) -> Iterator:
    """Yield the batches of an Arrow file, in the file format or the stream format (which `datasets` writes)."""
    with pa.memory_map(str(file)) as mapped:
        if mapped.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(mapped)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            mapped.seek(0)
            batches = reader = pa.ipc.open_stream(mapped)
        columns = _columns_to_read(file, reader.schema.names, prompts)
        yield from (batch.select(columns) for batch in batches)


def _columns_to_read(file: Path, columns: list[str], prompts: bool) -> list[str]:
    """Return the columns of a table that are read. DataError where these columns can be no conversations."""
    refused = columns_refusal(columns, prompts)
    if refused:
        raise DataError(f"{file}: it {visible(refused)}")
    return [name for name in columns if name in KNOWN_COLUMNS]


def _to_arrow_stream(batch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _from_arrow_stream(data: bytes):
    return pa.ipc.open_stream(data).read_next_batch()


def _table_records(data: bytes) -> list[object]:
    """Return the records of an Arrow stream as objects; an Unusable for one that Arrow cannot convert."""
    batch = _from_arrow_stream(data)
    try:
        return [without_nulls(record) for record in batch.to_pylist(maps_as_pydicts="strict")]
    except (KeyError, UnicodeDecodeError, pa.ArrowException):
        return [_table_record(batch.slice(at, 1)) for at in range(len(batch))]


def _table_record(record) -> object:
    try:
        return without_nulls(record.to_pylist(maps_as_pydicts="strict")[0])
    except (KeyError, UnicodeDecodeError, pa.ArrowException) as error:
        return Unusable("broken line", f"is no row of text ({str(error)[:100]})")


def without_nulls(value: object) -> object:
    """Return a record of a table without keys that are None: Arrow gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
