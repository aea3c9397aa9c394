"""The index: for every sample of a plan its shard, rows, supervised count, domain and split, in one mapped file.

Derived from the plan alone, so it can be rebuilt at any time; a cache whose index is missing or out of date still
opens, more slowly. Order: by shard, in the order of the shard. `SampleTable` is the index in memory.

    n samples of the cache
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from pipeline.cache.atomic import read_errors, write_file
from pipeline.cache.layout import FINAL, INDEX, INDEX_MANIFEST, aux_column
from pipeline.cache.manifest import FileFact, canonical, check_size, read_record, write_canonical
from pipeline.cache.plan import Plan
from pipeline.cache.records import Files, IndexManifest, SegmentManifest
from pipeline.cache.samples import parse_batches, to_numpy
from pipeline.errors import CacheError

Refused = list[tuple[int, np.ndarray]]  # of one column: shards, and the rows of samples refused in them

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.binary(16), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),  # of the shard
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("final_offset", pa.int64(), nullable=False),
        pa.field("final_length", pa.int32(), nullable=False),
        pa.field("supervised", pa.int32(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)


def build_index(plan: Plan) -> pa.Table:
    """The index of a plan, one record batch a shard."""
    batches = []
    for shard in plan.shards:
        named = {
            "row": np.arange(len(shard), dtype=np.int32),
            "final_length": np.diff(shard.final_bounds).astype(np.int32),
            "supervised": shard.supervised.astype(np.int32),
        }
        columns = [
            pa.array(named[field.name]) if field.name in named else shard.batch.column(field.name) for field in SCHEMA
        ]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
    return pa.Table.from_batches(batches, SCHEMA)


def segments_of(manifests: list[SegmentManifest]) -> list[Files]:
    """The files of a plan's segments with their digests, which identify the plan."""
    return [manifest.files for manifest in manifests]


def write_index(cache: Path, plan: Plan) -> None:
    """Write the index of `plan`, its manifest last; the manifest of an older index is removed first."""
    sink = pa.BufferOutputStream()
    table = build_index(plan).combine_chunks()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    facts = IndexManifest(files={INDEX: FileFact.of_bytes(data)}, segments=segments_of(plan.manifests)).as_dict()
    manifest = cache / INDEX_MANIFEST
    right = manifest.is_file() and manifest.read_bytes() == canonical(facts)
    if not right:
        manifest.unlink(missing_ok=True)
    write_file(cache / INDEX, data)
    if not right:
        write_canonical(manifest, facts)


def index_manifest(cache: Path) -> IndexManifest:
    """Read the index's manifest. CacheError when it is absent, damaged or of something else."""
    manifest = read_record(cache / INDEX_MANIFEST, IndexManifest)
    if INDEX not in manifest.files:
        raise CacheError(f"{cache / INDEX_MANIFEST}: the manifest of something else; run `pipeline verify`")
    return manifest


def read_index(cache: Path, manifests: list[SegmentManifest]) -> pa.Table | None:
    """Map the index of the plan with these manifests; None when it has to be rebuilt."""
    path = cache / INDEX
    try:
        facts = index_manifest(cache)
        if facts.segments != segments_of(manifests):
            return None
        check_size(path, facts.files[INDEX])
        with read_errors(path), pa.memory_map(str(path)) as file:
            data = file.read_buffer()
        if FileFact.of_bytes(data) != facts.files[INDEX]:
            return None
        batches = parse_batches(data, SCHEMA, path)
    except CacheError:
        return None
    shards = sum(manifest.shards for manifest in manifests)
    return pa.Table.from_batches(batches) if len(batches) == 1 and _in_order(batches[0], shards) else None


def _in_order(index: pa.RecordBatch, shards: int) -> bool:
    """Whether the samples of every shard from 0 on follow each other, row by row."""
    shard, row = (to_numpy(index.column(name)) for name in ("shard", "row"))
    if not len(shard) or shard[0] or row[0] or shard[-1] != shards - 1:
        return False
    step, next_row = np.diff(shard), np.diff(row)
    return bool((((step == 0) & (next_row == 1)) | ((step == 1) & (row[1:] == 0))).all())


class SampleTable:
    """All planned samples as numpy columns [n]. Order: by shard, in the order of the shard."""

    def __init__(
        self, index: pa.Table, shards: int, columns: Callable[[], Iterable[str]], refused: Callable[[str], Refused]
    ):
        """columns() gives the names of all columns of the cache; refused(name) where samples are refused in one."""
        self._index, self._columns, self._refused = index, columns, refused
        self.shard = self._numbers("shard")
        self.row = self._numbers("row")  # in the shard
        self.offset = self._numbers("offset")
        self.length = self._numbers("length")
        self.final_offset = self._numbers("final_offset")
        self.final_length = self._numbers("final_length")
        self.supervised = self._numbers("supervised")
        self.starts = np.searchsorted(self.shard, np.arange(shards + 1))  # first sample of each shard
        self._ok: dict[tuple[str, ...], np.ndarray] = {}

    def _numbers(self, name: str) -> np.ndarray:
        return to_numpy(self._whole(name))

    def _whole(self, name: str) -> pa.Array:
        column = self._index.column(name)  # one piece where it is mapped, which pyarrow would copy
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def sample_id(self) -> np.ndarray:
        """The sample ids as numbers, uint64 [n, 2], high and low: rows sort as the 16 bytes do."""
        column = self._whole("sample_id")
        names = np.frombuffer(column.buffers()[1], ">u8", 2 * len(self), 16 * column.offset)
        return names.reshape(-1, 2).astype(np.uint64)

    @property
    def low64(self) -> np.ndarray:
        """The low 64 bits of the sample ids, uint64 [n]."""
        return self.sample_id[:, 1]

    def hex(self, i: int) -> str:
        """The sample id in hex, 32 digits."""
        return f"{self.sample_id[i, 0]:016x}{self.sample_id[i, 1]:016x}"

    @cached_property
    def domain(self) -> list[str]:
        return self._index.column("domain").to_pylist()

    @cached_property
    def split(self) -> list[str]:
        """`train`, `heldout`, or empty where the corpus does not say."""
        return self._index.column("split").to_pylist()

    @property
    def ok(self) -> np.ndarray:
        """Samples that no column at all refused, bool [n]."""
        return self._accepted(self._columns())

    def usable(self, layers: Iterable[int], final: bool = False) -> np.ndarray:
        """Samples that none of a view's own columns refused, bool [n]: what `HiddenCache.read` gives for this view."""
        return self._accepted([*map(aux_column, layers), *[FINAL] * final])

    def _accepted(self, columns: Iterable[str]) -> np.ndarray:
        key = tuple(sorted(set(columns)))
        held = self._ok.get(key)
        if held is None:
            held = np.ones(len(self), bool)
            for name in key:
                for shard, rows in self._refused(name):
                    if rows.max() >= self.starts[shard + 1] - self.starts[shard]:
                        raise CacheError(f"{name} of shard {shard}: refuses samples that are not there")
                    held[self.starts[shard] + rows] = False
            held.flags.writeable = False
            self._ok[key] = held
        return held
