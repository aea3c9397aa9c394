"""What a cache can make again from the rest: the index, the list of refused samples, a shard's `samples.arrow`."""

from pathlib import Path

from pipeline.cache.columns import committed
from pipeline.cache.disk import committing, room, sync_folder, write_file
from pipeline.cache.index import place_index, read_index
from pipeline.cache.layout import COLUMN, INDEX, QUARANTINE, REFUSED, SAMPLES, shard_folder
from pipeline.cache.manifest import FileFact, canonical
from pipeline.cache.plan import Plan, load_plan
from pipeline.cache.samples import batch_bytes


def derive(cache: Path) -> list[str]:
    """Write what is missing or out of date of the derived files; returns their names. The cache must have a plan.

    Nothing is written, and no right to write needed, when all is as it should be. Raises RoomError, CacheError.
    """
    plan = load_plan(cache)
    columns = {shard.number: shard_columns(cache, shard.number) for shard in plan.shards}
    stale = {}
    for shard in plan.shards:
        path = shard_folder(cache, shard.number) / SAMPLES
        vouched = [manifest["files"][SAMPLES] for manifest in columns[shard.number].values()]
        if vouched and (not path.is_file() or FileFact.of_file(path).as_dict() not in vouched):
            data = batch_bytes(shard.batch)
            if FileFact.of_bytes(data).as_dict() in vouched:
                stale[path] = data
    path, refused = cache / QUARANTINE / REFUSED, refused_bytes(plan, columns)
    if refused and (not path.is_file() or path.read_bytes() != refused):
        stale[path] = refused
    obsolete = [path] if path.is_file() and not refused else []
    lost_index = read_index(cache, plan.manifests) is None
    if stale or obsolete or lost_index:
        _write(cache, plan, stale, obsolete, lost_index)
    written = [path.relative_to(cache).as_posix() for path in (*stale, *obsolete)]
    return written + [INDEX] * lost_index


def _write(cache: Path, plan: Plan, stale: dict[Path, bytes], obsolete: list[Path], lost_index: bool) -> None:
    with room(cache, "derived files"), committing(cache):
        for path, data in stale.items():
            write_file(path, data)
        for path in obsolete:
            path.unlink()
            path.parent.rmdir()
        if lost_index:
            place_index(cache, plan)
        sync_folder(cache)


def shard_columns(cache: Path, shard: int) -> dict[str, dict]:
    """Manifests of the columns of a shard that are whole but perhaps for its `samples.arrow`, by name."""
    names = sorted(path.stem for path in shard_folder(cache, shard).glob("*.json"))
    found = {name: committed(cache, shard, name, but=SAMPLES) for name in names if COLUMN.fullmatch(name)}
    return {name: manifest for name, manifest in found.items() if manifest}


def refused_samples(plan: Plan, columns: dict[int, dict[str, dict]]) -> list[dict]:
    """The samples refused in any column, in order of samples: where they are, where they came from, and why."""
    refused, before = [], 0
    for shard in plan.shards:
        reasons: dict[int, dict[str, list[str]]] = {}
        for name, manifest in sorted(columns[shard.number].items()):
            for row, reason in manifest["refused"].items():
                reasons.setdefault(int(row), {}).setdefault(reason, []).append(name)
        for row in sorted(reasons):
            refused.append(
                {
                    "sample": before + row,
                    "sample_id": shard.batch.column("sample_id")[row].as_py().hex(),
                    "shard": shard.number,
                    "row": row,
                    "reason": "; ".join(sorted(reasons[row])),
                    "columns": sorted({name for names in reasons[row].values() for name in names}),
                    "source": shard.batch.column("source")[row].as_py(),
                    "line": shard.line(row),
                }
            )
        before += len(shard)
    return refused


def refused_bytes(plan: Plan, columns: dict[int, dict[str, dict]]) -> bytes:
    """What `quarantine/samples.json` holds; empty when no sample was refused, and then there is no such file."""
    refused = refused_samples(plan, columns)
    return canonical({"samples": refused}) if refused else b""
