"""What a cache is and holds, from its plan and manifests alone, and what `verify` found: JSON values, and tables."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.text import Text

from pipeline.cache.atomic import size_text
from pipeline.cache.catalog import Catalog, has_target, target_file
from pipeline.cache.file_writer import refused_samples
from pipeline.cache.layout import PLAN, SAMPLES, TARGET, layer_of, shard_folder
from pipeline.cache.reader import HiddenCache
from pipeline.cache.schema import ColumnManifest, read_log
from pipeline.errors import UsageError
from pipeline.visible_tables import grid, shows_styles
from pipeline.visible_text import visible, visible_lines

TOKENIZER = "tokenizer.json"
LISTED = 20  # shards that are not captured yet, or foreign files, before the rest is only counted


def describe(path: Path) -> dict:
    """A cache's identity, plan, columns, bytes, domains, probe and gauge results, and refused samples.

    Raises UsageError when there is no cache or no plan, CacheError for damage.
    """
    path = Path(path)
    cache = HiddenCache.open(path)
    plan = cache.catalog.plan
    shards = cache.catalog.columns_of_shards()
    table = cache.samples
    columns = _columns(shards, np.bincount(table.shard, table.length, minlength=cache.shards))
    refused = refused_samples(plan, dict(enumerate(shards)), np.diff(table.starts))
    sizes = {
        "columns": sum(column["bytes"] for column in columns),
        "plan": _folder_bytes(path / PLAN),
        "target": _folder_bytes(path / TARGET),
        "total": _folder_bytes(path, _shard_bytes(cache.catalog, shards)),
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


def _columns(shards: list[dict[str, ColumnManifest]], tokens_N: np.ndarray) -> list[dict]:
    """One entry a column: what it is, in how many of the N shards, its bytes, and its worst probe."""
    names = {name for held in shards for name in held}
    described = []
    for name in sorted(names, key=lambda name: (layer_of(name) is None, layer_of(name) or 0)):
        manifests = [held[name] for held in shards if name in held]
        size = sum(fact.size for manifest in manifests for file, fact in manifest.files.items() if file != SAMPLES)
        tokens = int(sum(tokens_N[manifest.shard] for manifest in manifests))
        errors = [manifest.facts.probe.error for manifest in manifests if manifest.facts.probe]
        certified = [found.error for manifest in manifests if (found := manifest.facts.certificate)]
        described.append(
            {
                **dict(sorted(manifests[0].spec.as_dict().items())),
                "shards": len(manifests),
                "rows": sum(manifest.rows for manifest in manifests),
                "bytes": size,
                "token_bytes": size / tokens,
                "probe": max(errors, default=None),
                "certificate": max((error for error in certified if error is not None), default=None),
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


def _shard_bytes(catalog: Catalog, shards: list[dict[str, ColumnManifest]]) -> dict[str, int]:
    """Return the bytes of each shard's folder, by its path, that holds what its manifests name and nothing else."""
    found = {}
    for shard, columns in enumerate(shards):
        entries = catalog.entries(shard)
        sizes = {name: version[1] for name, version in entries.items() if version}  # of the manifests
        for manifest in columns.values():
            sizes |= {file: fact.size for file, fact in manifest.files.items()}
        if entries.keys() == {file.partition("/")[0] for file in sizes}:
            found[str(shard_folder(catalog.path, shard))] = sum(sizes.values())
    return found


def _folder_bytes(folder: Path | str, known: Mapping[str, int] | None = None) -> int:
    """Return the bytes of all files below a folder, none where it is not there.

    known: the bytes of folders, by path, that need not be opened. Files that vanish meanwhile and links that lead
    nowhere are not counted. By `scandir`, since `rglob` asks three times of each file.
    """
    total, known = 0, known or {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.path in known:
                    total += known[entry.path]
                elif entry.is_dir(follow_symlinks=False):
                    total += _folder_bytes(entry.path, known)
                elif entry.is_file():
                    total += entry.stat().st_size
            except OSError:  # not `suppress`, which is slow by the thousand
                continue
    return total


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


def _is_short(value: object) -> bool:
    """Return whether a parameter of a quantisation fits a table: lists of modules do not."""
    return isinstance(value, int | float | str) and len(str(value)) <= 40


def cache_facts(report: dict) -> dict[str, str]:
    """Return what `describe` says of the whole cache, as words by name."""
    plan, shards, identity = report["plan"], report["shards"], report["identity"]
    rows = {
        "target": f"{identity['target']['name']} ({identity['target']['digest'][:12]})",
        "format": f"{report['format']}, identity {report['digest'][:12]}",
        "samples": f"{plan['samples']:,}; {plan['duplicates']:,} duplicates left out",
        "tokens": f"{plan['tokens']:,}, {report['supervised_share']:.0%} supervised",
        "shards": f"{shards['whole']} of {shards['planned']} whole",
        "size": f"{size_text(report['bytes']['total'])}, of which states {size_text(report['bytes']['columns'])}",
    }
    if quantisation := identity["target"].get("quantisation"):
        rows["quantised"] = ", ".join(f"{name} {value}" for name, value in quantisation.items() if _is_short(value))
    if (engine := identity.get("capture", {}).get("engine")) not in (None, "transformers", "imported"):
        options = identity["capture"].get("engine_options") or {}
        rows["run by"] = ", ".join([engine, *(f"{name}={value}" for name, value in sorted(options.items()))])
    if imported := identity.get("capture", {}).get("imported"):
        proof = "proven against the target" if imported["proven"] else "NOT proven: compared with no target"
        rows["imported"] = (
            f"from {imported['form']}, layers {','.join(map(str, imported['layers']))} counted from "
            f"{imported['count_from']}, last state {imported['last']}; {proof}"
        )
    if report["gauge"]:
        gauge = report["gauge"]
        rows["on-policy"] = (
            f"{gauge['agreement']:.1%} of {gauge['rows']:,} replies' tokens are the target's own greedy choice, "
            f"mean log-probability {gauge['logprob']:.2f}"
        )
    if report["refused"]:
        rows["refused"] = f"{len(report['refused'])} samples, listed by --json"
    return rows


def cache_table(report: dict) -> Group:
    """Return `describe`'s report as tables: the whole, its columns, its domains."""
    whole = grid("", "")
    for name, value in cache_facts(report).items():
        whole.add_row(name, value)
    columns = grid("column", "dtype", "codec", ">rows", ">size", ">bytes a token", ">shards", ">probe error")
    for column in report["columns"]:
        probe = "-" if column["probe"] is None else f"{column['probe']:.1e}"
        columns.add_row(
            column["name"], column["dtype"], column["codec"], f"{column['rows']:,}", size_text(column["bytes"]),
            f"{column['token_bytes']:,.0f}", str(column["shards"]), probe,
        )  # fmt: skip
    domains = grid("domain", "split", ">samples", ">tokens", ">supervised")
    for entry in report["domains"]:
        domains.add_row(
            entry["domain"] or "-", entry["split"] or "-", f"{entry['samples']:,}", f"{entry['tokens']:,}",
            f"{entry['supervised']:,}",
        )  # fmt: skip
    return Group(whole, *(["", columns] if report["columns"] else ()), "", domains)


def coloured_sample(cache: Path, view: dict) -> Group:
    """Return one sample as text, what is supervised as `supervised_style` says."""
    head = (
        f"sample {view['sample']} ({view['sample_id']}): {view['length']} tokens, {view['supervised']} supervised "
        f"({supervised_style()}); {view['domain'] or 'no domain'}, {view['split'] or 'no split'}; "
        f"{view['source']}:{view['line']}"
    )
    return Group(Text(visible(head), style="bold"), coloured(tokenizer_of(Path(cache)), view["ids"], view["mask"]))


def tokenizer_of(cache: Path):
    """Return the tokenizer of a cache's target, while nothing is captured the one of the target it was planned with.

    Raises UsageError where neither is there, CacheError where the cache's own is damaged.
    """
    from tokenizers import Tokenizer

    catalog = Catalog(cache)
    if has_target(catalog):
        return Tokenizer.from_file(str(target_file(catalog, TOKENIZER)))
    planned_with = read_log(cache).target
    planned = planned_with and Path(planned_with.folder) / TOKENIZER
    if planned is None or not planned.is_file():
        raise UsageError(f"{cache} holds no tokenizer yet to show text with; run `pipeline plan` or capture first")
    return Tokenizer.from_file(str(planned))


def supervised_style() -> str:
    """Return how supervised tokens are shown, in words: in a file or a pipe there is no colour."""
    return "green, underlined" if shows_styles() else "in [[ ]]"


def coloured(tokenizer, ids: Sequence[int], mask: Sequence[bool], most: int | None = None) -> Text:
    """Return tokens as text, the supervised ones as `supervised_style` says; of a long stretch `most` characters."""
    text, start, plain = Text(), 0, not shows_styles()
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            piece = tokenizer.decode(list(ids[start:end]), skip_special_tokens=False)
            if most and len(piece) > most:
                piece = f"{piece[: most // 2]} [...] {piece[-most // 2 :]}"
            piece = f"[[{piece}]]" if mask[start] and plain else piece
            text.append(visible_lines(piece), style="green underline" if mask[start] else "dim")
            start = end
    return text


def verify_table(report: dict) -> Group:
    """Return `verify`'s report: what is damaged, not captured yet, or foreign."""
    lines = [Text(f"{report['files']:,} files, {size_text(report['bytes'])} checked")]
    for kind, title, style in (
        ("damaged", "damaged", "bold red"),
        ("missing", "not captured yet", "yellow"),
        ("foreign", "not of this cache", "yellow"),
    ):
        found = report[kind]
        if found:
            lines.append(Text(f"{len(found)} {title}:", style=style))
            shown = found if kind == "damaged" else found[:LISTED]
            texts = [entry if kind == "foreign" else f"{entry['file']}: {entry['what']}" for entry in shown]
            lines += [Text(f"  {visible(text)}") for text in texts]
            lines += [Text(f"  and {len(found) - len(shown):,} more; --json lists them")] * (len(found) > len(shown))
    if report["incomplete"]:
        lines.append(Text(f"incomplete: {', '.join(report['incomplete'])}", style="yellow"))
    if not report["damaged"]:
        whole = not report["incomplete"]
        lines.append(Text("no damage" if whole else "no damage in what is there", style="green" if whole else "yellow"))
    return Group(*lines)
