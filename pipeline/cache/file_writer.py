"""Writes what a cache has beside its plan and its columns: cache.json, once; `target/`, once, whole or not at all; and
what follows from the rest, when it is lost: the index, the list of refused samples, a shard's `samples.arrow`, and,
from all shards' `samples.arrow`, a segment of the plan.
"""

import contextlib
import errno
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.cache import layout
from pipeline.cache.atomic import Scratch, commit_lock, sync_file, sync_folder, write_errors, write_file
from pipeline.cache.catalog import Catalog, has_target
from pipeline.cache.layout import numbered, shard_folder
from pipeline.cache.manifest import FileFact, canonical, read_canonical, write_canonical
from pipeline.cache.plan import Plan
from pipeline.cache.plan_writer import write_index
from pipeline.cache.samples import batch_bytes, read_batch, write_batches
from pipeline.cache.schema import ColumnManifest, RefusedList, RefusedSample, TargetManifest
from pipeline.errors import CacheError, UsageError

# In a folder of which no cache is made: it would be taken for two things.
OTHERS = {"run.json": "a training run", "config.json": "a model or a draft"}
Columns = dict[int, dict[str, ColumnManifest]]  # by shard and name


def create_identity(cache: Path, identity: dict) -> dict:
    """Make `cache.json`, or check that the one there says the same. Returns what is on disk.

    Raises UsageError naming the first key that differs, with both values.
    """
    path = cache / layout.IDENTITY
    with write_errors(cache, "a cache"):
        cache.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # a finished cache may lie on a read-only disk
            taken = next((name for name in OTHERS if (cache / name).is_file()), None)
            if taken:
                raise UsageError(
                    f"{cache} holds {OTHERS[taken]} ({taken}), which is no place for a cache; pass another --out"
                )
            with commit_lock(cache):
                if not path.exists():
                    write_canonical(path, identity)
    held = read_canonical(path)
    wanted = json.loads(canonical(identity))
    apart = {"hash": None, "format": None}  # a cache of an earlier format goes on in it
    difference = _first_difference({**held, **apart}, {**wanted, **apart})
    if difference:
        key, there, here = difference
        raise UsageError(
            f"{cache} was made with {key} = {there!r}, this command asks for {here!r}; "
            "pass the same, or another --out for a second cache"
        )
    return held


def _first_difference(held, wanted, key: str = "") -> tuple[str, object, object] | None:
    """The dotted key, the value on disk and the value wanted where two JSON values first differ."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        # The engine first: it decides what else is there.
        for name in sorted({*held, *wanted}, key=lambda name: (name != "engine", name)):
            found = _first_difference(held.get(name), wanted.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if held == wanted else (key, held, wanted)


@contextlib.contextmanager
def new_target(catalog: Catalog) -> Iterator[Path]:
    """Yield an empty folder; the plain files put there become the cache's `target/` when the block ends well.

    If the cache has one already, that one stays; of one that lacks files, what is right stays. Raises RoomError.
    """
    cache = catalog.path
    with Scratch(cache, layout.TARGET) as scratch, write_errors(cache, "the target's files"):
        folder = scratch.path / layout.TARGET
        folder.mkdir()
        yield folder
        paths = sorted(folder.iterdir())
        assert all(path.is_file() and not path.is_symlink() for path in paths), f"not all plain files: {paths}"
        files = {path.name: FileFact.of_file(path) for path in paths}
        manifest = folder / layout.TARGET_MANIFEST
        manifest.write_bytes(canonical(TargetManifest(cache=catalog.hash, files=files).as_dict(), catalog.format))
        for path in (*paths, manifest):
            sync_file(path)
        sync_folder(folder)
        with commit_lock(cache):
            if has_target(catalog):
                return
            _put(folder, cache / layout.TARGET, scratch.path / "old")
            sync_folder(cache)


def _put(folder: Path, place: Path, aside: Path) -> None:
    """Make `place` hold the files of `folder`, the manifest last. Those it has already, and others, are not touched."""
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        place.rename(aside)
    if not place.exists():
        try:
            folder.rename(place)
            return
        except OSError as error:  # another process was quicker: we had been stopped, and somebody removed our lock
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    for path in sorted(folder.iterdir(), key=lambda path: path.name == layout.TARGET_MANIFEST):
        there = place / path.name
        if there.is_symlink() or not there.is_file() or FileFact.of_file(there) != FileFact.of_file(path):
            path.replace(there)
    sync_folder(place)


def rebuild_derived(catalog: Catalog) -> list[str]:
    """Write the derived files that are missing or out of date; returns their names. The cache must have a plan.

    Writes nothing, and needs no right to write, when all are up to date. Raises RoomError, CacheError.
    """
    cache, plan = catalog.path, catalog.plan
    stale = _stale_samples(catalog)
    path = cache / layout.QUARANTINE / layout.REFUSED
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
    return written + [f"{layout.QUARANTINE}/{layout.REFUSED}"] * wrong_list + [layout.INDEX] * lost_index


def _stale_samples(catalog: Catalog) -> dict[Path, bytes]:
    """The `samples.arrow` that do not match their shard's manifests, with the right content, if the plan has it."""
    stale = {}
    for shard in range(catalog.shards):
        path = shard_folder(catalog.path, shard) / layout.SAMPLES
        vouched = [manifest.files[layout.SAMPLES] for manifest in catalog.captured_columns(shard).values()]
        if vouched and (not path.is_file() or FileFact.of_file(path) not in vouched):
            data = batch_bytes(catalog.plan.shards[shard].batch)
            if FileFact.of_bytes(data) in vouched:
                stale[path] = data
    return stale


def _refused_list(catalog: Catalog) -> bytes:
    columns = {shard: catalog.captured_columns(shard) for shard in range(catalog.shards)}
    return refused_bytes(catalog.plan, columns, np.diff(catalog.samples.starts), catalog.format)


def restore_segments(catalog: Catalog) -> list[str]:
    """Rebuild damaged segments of the plan from the shards' `samples.arrow`; returns their names.

    Needs the segment's manifest, which has the digest that the result must have. Raises RoomError.
    """
    restored = []
    cache = catalog.path
    for number, manifest in enumerate(catalog.segments):
        name = f"{numbered(number)}.arrow"
        path, fact = cache / layout.PLAN / name, manifest.files[name]
        if path.is_file() and FileFact.of_file(path) == fact:
            continue
        first = manifest.first_shard
        with Scratch(cache, layout.PLAN) as scratch, write_errors(cache, "a segment of the plan", fact.size):
            try:
                parts = [shard_folder(cache, shard) / layout.SAMPLES for shard in range(first, first + manifest.shards)]
                write_batches(scratch.path / name, map(read_batch, parts))
            except CacheError:  # a shard that is not captured, or its samples are damaged, too
                continue
            if FileFact.of_file(scratch.path / name) == fact:
                sync_file(scratch.path / name)
                with commit_lock(cache):
                    (scratch.path / name).replace(path)
                    sync_folder(path.parent)
                restored.append(f"{layout.PLAN}/{name}")
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


def refused_bytes(plan: Plan, columns: Columns, counts: Sequence[int], version: str) -> bytes:
    """What `quarantine/samples.json` holds; empty when no sample was refused, and then there is no such file.

    version: the cache's format version
    """
    refused = refused_samples(plan, columns, counts)
    return canonical(RefusedList(samples=refused).as_dict(), version) if refused else b""
