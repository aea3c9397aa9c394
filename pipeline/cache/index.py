"""The index: for every sample of a plan its shard, rows, supervised count, domain and split, in one mapped file.

Derived from the plan alone, so it can be rebuilt at any time; a cache whose index is missing or out of date still
opens, more slowly. Order: by shard, in the order of the shard.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from pipeline.cache.arrow_files import parse_batches
from pipeline.cache.atomic import read_errors, write_file
from pipeline.cache.layout import INDEX, INDEX_MANIFEST
from pipeline.cache.manifest import FACT, FileFact, canonical, check_size, read_canonical, write_canonical
from pipeline.cache.samples import to_numpy
from pipeline.errors import CacheError

if TYPE_CHECKING:
    from pipeline.cache.plan import Plan

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

FORM = {"files": {INDEX: FACT}, "segments": [dict]}


def build_index(plan: "Plan") -> pa.Table:
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


def segments_of(manifests: list[dict]) -> list[dict]:
    """The files of a plan's segments with their digests, which identify the plan."""
    return [manifest["files"] for manifest in manifests]


def write_index(cache: Path, plan: "Plan") -> None:
    """Write the index of `plan`, its manifest last; the manifest of an older index is removed first."""
    sink = pa.BufferOutputStream()
    table = build_index(plan).combine_chunks()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    facts = {"files": {INDEX: FileFact.of_bytes(data).as_dict()}, "segments": segments_of(plan.manifests)}
    manifest = cache / INDEX_MANIFEST
    right = manifest.is_file() and manifest.read_bytes() == canonical(facts)
    if not right:
        manifest.unlink(missing_ok=True)
    write_file(cache / INDEX, data)
    if not right:
        write_canonical(manifest, facts)


def read_index(cache: Path, manifests: list[dict]) -> pa.Table | None:
    """Map the index of the plan with these manifests; None when it has to be rebuilt."""
    path = cache / INDEX
    try:
        facts = read_canonical(cache / INDEX_MANIFEST, FORM)
        if facts["segments"] != segments_of(manifests):
            return None
        check_size(path, facts["files"][INDEX])
        with read_errors(path), pa.memory_map(str(path)) as file:
            data = file.read_buffer()
        if FileFact.of_bytes(data).as_dict() != facts["files"][INDEX]:
            return None
        batches = parse_batches(data, SCHEMA, path)
    except CacheError:
        return None
    shards = sum(manifest["shards"] for manifest in manifests)
    return pa.Table.from_batches(batches) if len(batches) == 1 and _in_order(batches[0], shards) else None


def _in_order(index: pa.RecordBatch, shards: int) -> bool:
    """Whether the samples of every shard from 0 on follow each other, row by row."""
    shard, row = (to_numpy(index.column(name)) for name in ("shard", "row"))
    if not len(shard) or shard[0] or row[0] or shard[-1] != shards - 1:
        return False
    step, next_row = np.diff(shard), np.diff(row)
    return bool((((step == 0) & (next_row == 1)) | ((step == 1) & (row[1:] == 0))).all())
