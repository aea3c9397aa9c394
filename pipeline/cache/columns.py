"""Columns: one array of one shard, with the checksums and the manifest that make it exist.

A block is 256 rows of a sample, counted from the sample's first row in the column; each has its own xxh3-64, over the
decoded values. So whoever reads a sample checks exactly what it reads.

    n samples of the shard   R rows of the column   D width
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import xxhash

from pipeline.cache.codecs import CODECS, DTYPES
from pipeline.cache.layout import BLOCK_ROWS, COLUMN, IDENTITY, SAMPLES, inside, numbered, shard_folder
from pipeline.cache.manifest import check_file, check_size, read_canonical
from pipeline.cache.samples import ShardPlan, numbers
from pipeline.errors import CacheError

PIECE = 512 << 10  # bytes read and hashed at a time: still in the CPU's own cache when they are hashed

SCHEMA = pa.schema(
    [
        pa.field("ok", pa.bool_(), nullable=False),
        pa.field("blocks", pa.list_(pa.field("item", pa.uint64(), nullable=False)), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class ColumnSpec:
    """What a column is: `aux.<layer>` or `final`, its values, and which rows it keeps ("all" or "needed")."""

    name: str
    dtype: str
    width: int
    codec: str = "raw"
    keeps: str = "all"

    def is_valid(self) -> bool:
        """Whether every field has a value this program knows."""
        known = self.dtype in DTYPES and self.codec in CODECS and self.keeps in ("all", "needed")
        return known and COLUMN.fullmatch(self.name) is not None and self.width > 0

    def bounds(self, shard: ShardPlan) -> np.ndarray:
        """First row of each sample in this column, and the end: int64 [n + 1]."""
        return shard.bounds if self.keeps == "all" else shard.final_bounds

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row, before any codec."""
        return self.width * DTYPES[self.dtype].itemsize

    def as_dict(self) -> dict:
        return asdict(self)


class BlockHasher:
    """Hashes rows as they stream by, in order: a digest whenever a block of a sample is full or the sample ends."""

    def __init__(self, bounds: np.ndarray):
        self.ends: list[int] = []
        for start, stop in pairwise(bounds.tolist()):
            self.ends += [min(end, stop) for end in range(start + BLOCK_ROWS, stop + BLOCK_ROWS, BLOCK_ROWS)]
        self.digests: list[int] = []
        self.position = 0
        self._open = xxhash.xxh3_64()

    def update(self, rows: np.ndarray) -> None:
        """Take the next rows, C-contiguous [m, D]."""
        data, width = memoryview(rows).cast("B") if rows.size else b"", rows.strides[0]
        taken = 0
        while taken < len(rows):
            end = self.ends[len(self.digests)]
            count = min(end - self.position, len(rows) - taken)
            self._open.update(data[taken * width : (taken + count) * width])
            taken, self.position = taken + count, self.position + count
            if self.position == end:
                self.digests.append(self._open.intdigest())
                self._open.reset()


def block_counts(bounds: np.ndarray) -> np.ndarray:
    """Blocks of each sample, int64 [n]."""
    return -(-np.diff(bounds) // BLOCK_ROWS)


def sums_bytes(bounds: np.ndarray, digests: list[int], refused: dict[int, str]) -> bytes:
    """A column's `.arrow` file: for each sample ok, the digests of its blocks, and why it was refused."""
    count = len(bounds) - 1
    ok = np.ones(count, bool)
    ok[list(refused)] = False
    starts = np.concatenate([[0], np.cumsum(block_counts(bounds))]).astype(np.int32)
    items = pa.array(np.array(digests, np.uint64))
    bits = pa.py_buffer(np.packbits(ok, bitorder="little"))
    columns = [
        pa.Array.from_buffers(pa.bool_(), count, [None, bits]),
        pa.Array.from_buffers(SCHEMA.field("blocks").type, count, [None, pa.py_buffer(starts)], children=[items]),
        pa.array([refused.get(row, "") for row in range(count)], pa.string()),
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
    return sink.getvalue().to_pybytes()


def read_sums(path: Path, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `sums_bytes` wrote: ok bool [n], digests uint64, and each sample's first digest int64 [n + 1]."""
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
            ok = np.array(table.column("ok").to_pylist(), bool)
            lists = table.column("blocks").combine_chunks()
            digests, starts = numbers(lists.values).copy(), numbers(lists.offsets).astype(np.int64)
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise CacheError(f"{path}: cannot be read: {error}; run `pipeline verify`") from error
    if len(ok) != len(bounds) - 1 or not np.array_equal(np.diff(starts), block_counts(bounds)):
        raise CacheError(f"{path}: made for other samples; run `pipeline verify`")
    return ok, digests, starts


class Column:
    """One column of one shard, open for checked reading. `folder` holds `<name>/` and `<name>.arrow`."""

    def __init__(self, folder: Path, spec: ColumnSpec, bounds: np.ndarray, where: str):
        self.spec = spec
        self.bounds = bounds
        self.where = where
        self.folder = folder / spec.name
        self._piece_rows = max(1, PIECE // spec.row_bytes)
        self.ok, self.digests, self.starts = read_sums(folder / f"{spec.name}.arrow", bounds)

    def open(self):
        """A codec's reader of the values."""
        try:
            rows = int(self.bounds[-1])
            return CODECS[self.spec.codec].reader(self.folder, rows, self.spec.width, self.spec.dtype)
        except (FileNotFoundError, NotADirectoryError):
            raise CacheError(f"{self.folder}: missing; run `pipeline verify`") from None

    def read_into(self, reader, row: int, out: memoryview, first: int = 0) -> None:
        """Fill `out`, flat bytes, with the rows of sample `row` from `first` on, a multiple of 256, each block checked.

        `out` ends where a block or the sample ends. Raises CacheError naming shard, column and sample.
        """
        start_row, width = int(self.bounds[row]) + first, self.spec.row_bytes
        count = len(out) // width
        assert first % BLOCK_ROWS == 0, f"row {first} begins no block"
        for number, start in enumerate(range(0, count, BLOCK_ROWS), first // BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, count)
            digest = xxhash.xxh3_64()
            for piece in range(start, stop, self._piece_rows):
                part = out[piece * width : min(piece + self._piece_rows, stop) * width]
                reader.read_into(start_row + piece, part)
                digest.update(part)
            if digest.intdigest() != self.digests[self.starts[row] + number]:
                raise CacheError(
                    f"{self.where}, column {self.spec.name}, sample {row} of the shard: rows from {first + start} are "
                    "damaged; run `pipeline verify`"
                )

    def read(self, row: int) -> np.ndarray:
        """The rows of sample `row`, [rows, D] of the dtype that `codecs.DTYPES` names."""
        count = int(self.bounds[row + 1] - self.bounds[row])
        values = np.empty((count, self.spec.width), DTYPES[self.spec.dtype])
        if count:
            self.read_into(self.open(), row, memoryview(values).cast("B"))
        return values


def column_manifest(cache: Path, shard: int, column: str) -> dict:
    """The manifest of a column that exists. CacheError when it is absent, damaged or another column's."""
    path = shard_folder(cache, shard) / f"{column}.json"
    manifest = read_canonical(path)
    try:
        spec, files = ColumnSpec(**manifest["spec"]), manifest["files"]
        right = spec.is_valid() and (manifest["shard"], spec.name) == (shard, column)
        right = right and {SAMPLES, f"{column}.arrow"} <= {*files}
    except (KeyError, TypeError):
        right = False
    if not right:
        raise CacheError(f"{path}: the manifest of another column or shard; run `pipeline verify`")
    return manifest


def committed(cache: Path, shard: int, column: str, but: str = "") -> dict | None:
    """The manifest of a column of this cache that exists whole, as far as sizes tell; None when it has to be captured.

    The file named `but` may be absent.
    """
    identity = read_canonical(cache / IDENTITY)["hash"]
    try:
        manifest = column_manifest(cache, shard, column)
        if manifest.get("cache") != identity:  # left there from another cache
            return None
        for name, fact in manifest["files"].items():
            if name != but:
                check_size(inside(shard_folder(cache, shard), name), fact)
    except CacheError:
        return None
    return manifest


def open_column(cache: Path, manifest: dict, bounds: np.ndarray) -> Column:
    """A committed column, its `.arrow` checked whole and the size of its values against the manifest."""
    spec, folder = ColumnSpec(**manifest["spec"]), shard_folder(cache, manifest["shard"])
    for name, fact in manifest["files"].items():
        if name == f"{spec.name}.arrow":
            check_file(inside(folder, name), fact)
        elif name != SAMPLES:
            check_size(inside(folder, name), fact)
    return Column(folder, spec, bounds, f"{cache}, shard {numbered(manifest['shard'])}")
