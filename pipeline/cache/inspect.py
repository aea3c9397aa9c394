"""What a cache is and holds, for people and for scripts. Reads the plan and the manifests, no states."""

from pathlib import Path

import numpy as np

from pipeline.cache.layout import PLAN, SAMPLES, TARGET, layer_of
from pipeline.cache.plan import Plan
from pipeline.cache.reader import HiddenCache
from pipeline.cache.rebuild import refused_samples
from pipeline.cache.records import ColumnManifest
from pipeline.errors import UsageError


def describe(path: Path) -> dict:
    """A cache's identity, plan, columns, bytes, domains, probe and gauge results, and refused samples.

    Raises UsageError when there is no cache or no plan, CacheError for damage.
    """
    path = Path(path)
    cache = HiddenCache.open(path)
    plan = cache.catalog.plan
    shards = [cache.columns(shard) for shard in range(cache.shards)]
    columns = _columns(shards, plan)
    refused = refused_samples(plan, dict(enumerate(shards)), np.diff(cache.samples.starts))
    sizes = {
        "columns": sum(column["bytes"] for column in columns),
        "plan": _folder_bytes(path / PLAN),
        "target": _folder_bytes(path / TARGET),
        "total": _folder_bytes(path),
    }
    return {
        "path": str(path),
        "format": cache.identity.format,
        "digest": cache.digest,
        "identity": cache.identity.as_dict(),
        "plan": {
            "samples": plan.samples,
            "tokens": plan.tokens,
            "supervised": plan.supervised,
            "duplicates": plan.duplicates,
            "segments": len(plan.manifests),
            "sources": plan.sources,
            "notes": plan.notes,
        },
        "supervised_share": plan.supervised / plan.tokens,
        "shards": {"planned": len(shards), "whole": sum(len(held) == len(columns) > 0 for held in shards)},
        "columns": columns,
        "bytes": sizes,
        "domains": _domains(cache),
        "gauge": _gauge(shards),
        "refused": [sample.as_dict() for sample in refused],
    }


def _columns(shards: list[dict[str, ColumnManifest]], plan: Plan) -> list[dict]:
    """One entry a column: what it is, in how many shards, its bytes, and its worst probe."""
    names = {name for held in shards for name in held}
    described = []
    for name in sorted(names, key=lambda name: (layer_of(name) is None, layer_of(name) or 0)):
        manifests = [held[name] for held in shards if name in held]
        size = sum(fact.size for manifest in manifests for file, fact in manifest.files.items() if file != SAMPLES)
        tokens = sum(plan.shards[manifest.shard].rows for manifest in manifests)
        errors = [manifest.facts.probe.error for manifest in manifests if manifest.facts.probe]
        described.append(
            {
                **manifests[0].spec.as_dict(),
                "shards": len(manifests),
                "rows": sum(manifest.rows for manifest in manifests),
                "bytes": size,
                "token_bytes": size / tokens,
                "probe": max(errors, default=None),
            }
        )
    return described


def _domains(cache: HiddenCache) -> list[dict]:
    """Samples, tokens and supervised tokens of every domain and split."""
    table = cache.samples
    sums: dict[tuple[str, str], np.ndarray] = {}
    counts = np.stack([np.ones_like(table.length), table.length, table.supervised], axis=1).astype(np.int64)
    for key, count in zip(zip(table.domain, table.split, strict=True), counts, strict=True):
        sums[key] = sums.get(key, 0) + count
    names = ("samples", "tokens", "supervised")
    return [
        {"domain": domain, "split": split, **dict(zip(names, total.tolist(), strict=True))}
        for (domain, split), total in sorted(sums.items())
    ]


def _gauge(shards: list[dict[str, ColumnManifest]]) -> dict | None:
    """How often the data's next token was the target's own, over all shards that measured it."""
    found = [gauge for columns in shards for manifest in columns.values() if (gauge := manifest.facts.gauge)]
    rows = sum(gauge.rows for gauge in found)
    if not rows:
        return None
    return {
        "rows": rows,
        "agreement": sum(gauge.agree for gauge in found) / rows,
        "logprob": sum(gauge.logprob for gauge in found) / rows,
    }


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sample_view(path: Path, i: int) -> dict:
    """One sample: its ids, its mask, its origin and which columns refused it. UsageError when there is none."""
    cache = HiddenCache.open(path)
    table = cache.samples
    if not 0 <= i < len(cache):
        raise UsageError(f"{path} has samples 0 to {len(cache) - 1}; there is no sample {i}")
    ids, mask = cache.tokens_of(i)
    shard, row = int(table.shard[i]), int(table.row[i])
    plan = cache.catalog.plan.shards[shard]
    refused_in = [name for name, manifest in cache.columns(shard).items() if str(row) in manifest.refused]
    return {
        "sample": i,
        "sample_id": table.hex(i),
        "shard": shard,
        "row": row,
        "domain": table.domain[i],
        "split": table.split[i],
        "source": plan.text("source")[row],
        "line": plan.line(row),
        "length": int(table.length[i]),
        "supervised": int(table.supervised[i]),
        "ok": not refused_in,
        "refused_in": refused_in,  # views of other columns can read it
        "ids": ids.tolist(),
        "mask": mask.tolist(),
    }
