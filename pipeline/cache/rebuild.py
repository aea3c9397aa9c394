"""Rebuilds derived files from the rest of a cache: the index, the list of refused samples, a shard's `samples.arrow`;
and, from all shards' `samples.arrow`, a segment of the plan."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.cache.atomic import Scratch, commit_lock, sync_file, sync_folder, write_errors, write_file
from pipeline.cache.catalog import Catalog
from pipeline.cache.layout import INDEX, PLAN, QUARANTINE, REFUSED, SAMPLES, numbered, shard_folder
from pipeline.cache.manifest import FileFact, canonical
from pipeline.cache.plan import Plan
from pipeline.cache.plan_writer import write_index
from pipeline.cache.samples import batch_bytes, read_batch, write_batches
from pipeline.cache.schema import ColumnManifest, RefusedList, RefusedSample
from pipeline.errors import CacheError

Columns = dict[int, dict[str, ColumnManifest]]  # by shard and name


def rebuild_derived(catalog: Catalog) -> list[str]:
    """Write the derived files that are missing or out of date; returns their names. The cache must have a plan.

    Writes nothing, and needs no right to write, when all are up to date. Raises RoomError, CacheError.
    """
    cache, plan = catalog.path, catalog.plan
    stale = _stale_samples(catalog)
    path = cache / QUARANTINE / REFUSED
    wrong_list = (path.read_bytes() if path.is_file() else b"") != _refused_list(catalog)
    lost_index = catalog.index is None
    if stale or wrong_list or lost_index:
        with write_errors(cache, "derived files"), commit_lock(cache):
            for samples, data in stale.items():
                write_file(samples, data)
            catalog.refresh()  # another worker may have been quicker, and known more
            if wrong_list and (wanted := _refused_list(catalog)):
                write_file(path, wanted)
            elif wrong_list and path.is_file():  # without any there is no such file
                path.unlink()
                path.parent.rmdir()
            if lost_index:
                write_index(cache, plan)
            sync_folder(cache)
        catalog.refresh()
    written = [samples.relative_to(cache).as_posix() for samples in stale]
    return written + [f"{QUARANTINE}/{REFUSED}"] * wrong_list + [INDEX] * lost_index


def _stale_samples(catalog: Catalog) -> dict[Path, bytes]:
    """The `samples.arrow` that do not match their shard's manifests, with the right content, if the plan has it."""
    stale = {}
    for shard in range(catalog.shards):
        path = shard_folder(catalog.path, shard) / SAMPLES
        vouched = [manifest.files[SAMPLES] for manifest in catalog.captured_columns(shard).values()]
        if vouched and (not path.is_file() or FileFact.of_file(path) not in vouched):
            data = batch_bytes(catalog.plan.shards[shard].batch)
            if FileFact.of_bytes(data) in vouched:
                stale[path] = data
    return stale


def _refused_list(catalog: Catalog) -> bytes:
    columns = {shard: catalog.captured_columns(shard) for shard in range(catalog.shards)}
    return refused_bytes(catalog.plan, columns, np.diff(catalog.samples.starts))


def restore_segments(catalog: Catalog) -> list[str]:
    """Rebuild damaged segments of the plan from the shards' `samples.arrow`; returns their names.

    Needs the segment's manifest, which has the digest that the result must have. Raises RoomError.
    """
    restored = []
    cache = catalog.path
    for number, manifest in enumerate(catalog.segments):
        name = f"{numbered(number)}.arrow"
        path, fact = cache / PLAN / name, manifest.files[name]
        if path.is_file() and FileFact.of_file(path) == fact:
            continue
        first = manifest.first_shard
        with Scratch(cache, PLAN) as scratch, write_errors(cache, "a segment of the plan", fact.size):
            try:
                parts = [shard_folder(cache, shard) / SAMPLES for shard in range(first, first + manifest.shards)]
                write_batches(scratch.path / name, map(read_batch, parts))
            except CacheError:  # a shard that is not captured, or its samples are damaged, too
                continue
            if FileFact.of_file(scratch.path / name) == fact:
                sync_file(scratch.path / name)
                with commit_lock(cache):
                    (scratch.path / name).replace(path)
                    sync_folder(path.parent)
                restored.append(f"{PLAN}/{name}")
    return restored


def refused_samples(plan: Plan, columns: Columns, counts: Sequence[int]) -> list[RefusedSample]:
    """The samples refused in any column, in order of samples: where they are, where they came from, and why.

    counts: samples of each shard
    """
    refused, before = [], 0
    for number, count in enumerate(counts):
        reasons: dict[int, list[tuple[str, str]]] = {}
        for name, manifest in sorted(columns[number].items()):
            if manifest.samples != count:
                where = f"shard {numbered(number)}, column {name}"
                raise CacheError(f"{where}: of other samples than the plan's; run `pipeline verify`")
            for row, reason in manifest.refused.items():
                reasons.setdefault(int(row), []).append((reason, name))
        for row in sorted(reasons):
            shard = plan.shards[number]
            refused.append(
                RefusedSample(
                    sample=before + row,
                    sample_id=shard.batch.column("sample_id")[row].as_py().hex(),
                    shard=number,
                    row=row,
                    reason="; ".join(sorted({reason for reason, _ in reasons[row]})),
                    columns=[name for _, name in reasons[row]],
                    source=shard.batch.column("source")[row].as_py(),
                    line=shard.line(row),
                )
            )
        before += int(count)
    return refused


def refused_bytes(plan: Plan, columns: Columns, counts: Sequence[int]) -> bytes:
    """What `quarantine/samples.json` holds; empty when no sample was refused, and then there is no such file."""
    refused = refused_samples(plan, columns, counts)
    return canonical(RefusedList(samples=refused).as_dict()) if refused else b""
