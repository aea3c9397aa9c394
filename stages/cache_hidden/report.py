"""What a plan says before anything runs: samples, tokens, what was left out and why, bytes, and room for them."""

from collections import Counter
from pathlib import Path

from pipeline.cache.columns import ColumnSpec, committed
from pipeline.cache.disk import free_bytes, size_text
from pipeline.cache.plan import Plan
from pipeline.cache.samples import ShardPlan
from pipeline.errors import UsageError
from pipeline.target_files import read_json, text_config
from stages.cache_hidden.settings import Settings

Work = list[tuple[ShardPlan, list[ColumnSpec]]]


def missing(out: Path, plan: Plan, columns: tuple[ColumnSpec, ...]) -> Work:
    """Return the shards with columns still to be captured, and which. UsageError where one holds other rows."""
    work = []
    for shard in plan.shards:
        absent = []
        for spec in columns:
            manifest = committed(out, shard.number, spec.name)
            if manifest is None:
                absent.append(spec)
            elif manifest["spec"]["keeps"] != spec.keeps:
                raise UsageError(
                    f"{out} holds {spec.name} on {manifest['spec']['keeps']} rows, this command asks for {spec.keeps}; "
                    f"pass --final {manifest['spec']['keeps']}, or another --out"
                )
        if absent:
            work.append((shard, absent))
    return work


def column_bytes(shard: ShardPlan, spec: ColumnSpec) -> int:
    """Bytes of a shard's column, uncompressed."""
    return (shard.rows if spec.keeps == "all" else shard.final_count) * spec.row_bytes


def work_bytes(work: Work) -> int:
    """Bytes still to be written."""
    return sum(column_bytes(shard, spec) for shard, columns in work for spec in columns)


def plan_report(out: Path, plan: Plan, settings: Settings) -> dict:
    """Return everything `pipeline plan` prints, as JSON has it. Sizes in bytes, lengths in tokens."""
    notes, work = plan.notes, missing(out, plan, settings.columns)
    sizes = {spec.name: sum(column_bytes(shard, spec) for shard in plan.shards) for spec in settings.columns}
    sizes["target"] = _head_bytes(settings)
    dropped = {**notes["faults"], **({"too short": notes["too_short"]} if notes["too_short"] else {})}
    need, free = work_bytes(work), free_bytes(out)
    return {
        "cache": str(out),
        "target": settings.identity["target"],
        "sources": plan.sources,
        "mask": settings.identity["samples"]["mask"],
        "max_length": settings.max_length,
        "dtype": settings.dtype,
        "rows": notes["rows"],
        "samples": plan.samples,
        "tokens": plan.tokens,
        "supervised": plan.supervised,
        "supervised_share": plan.supervised / plan.tokens,
        "duplicates": plan.duplicates,
        "truncated": notes["truncated"],
        "rewritten_turns": notes["rewritten_turns"],
        "dropped": {why: {"count": dropped[why], "examples": notes["examples"].get(why, [])} for why in dropped},
        "examples": notes["examples"],
        "bytes": sizes,
        "bytes_in_all": sum(sizes.values()),
        "bytes_to_write": need,
        "free_bytes": free,
        "fits": need < free,
        "shards": len(plan.shards),
        "shards_done": len(plan.shards) - len(work),
        "domains": _counted(plan, "domain"),
        "splits": _counted(plan, "split"),
    }


def _counted(plan: Plan, column: str) -> dict[str, int]:
    counts = Counter(text or "(none)" for shard in plan.shards for text in shard.text(column))
    return dict(sorted(counts.items()))


def _head_bytes(settings: Settings) -> int:
    """Bytes of the embedding and head that go into the cache."""
    config, whole = text_config(settings.folder), read_json(settings.folder / "config.json")
    tied = config.get("tie_word_embeddings", whole.get("tie_word_embeddings", False))
    return config["vocab_size"] * settings.row_bytes // len(settings.columns) * (1 if tied else 2)


def plan_table(report: dict):
    """Return the report as a table for people."""
    from rich.table import Table

    table = Table(title=f"plan of {report['cache']}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    rows = [
        ("target", f"{report['target']['name']} ({report['dtype']})"),
        ("corpus", ", ".join(str(source.get("file") or source.get("dataset")) for source in report["sources"])),
        ("samples", f"{report['samples']:,} of {report['rows']:,} rows, {report['duplicates']:,} duplicates"),
        ("tokens", f"{report['tokens']:,}, {report['supervised_share']:.1%} supervised (mask by {report['mask']})"),
        ("cut", f"{report['truncated']:,} samples at {report['max_length']:,} tokens"),
    ]
    for why, found in report["dropped"].items():
        rows.append((f"left out: {why}", f"{found['count']:,}, such as " + "; ".join(found["examples"])))
    if report["rewritten_turns"]:
        shown = "; ".join(report["examples"].get("rewritten turns", []))
        rows.append(("turns rewritten", f"{report['rewritten_turns']:,} by the template, not supervised: {shown}"))
    rows += [(name, size_text(size)) for name, size in report["bytes"].items()]
    room = "it fits" if report["fits"] else "IT DOES NOT FIT"
    rows += [
        ("in all", f"{size_text(report['bytes_in_all'])} in {report['shards']} shards, {report['shards_done']} done"),
        ("to write", f"{size_text(report['bytes_to_write'])}, {size_text(report['free_bytes'])} free: {room}"),
        ("domains", ", ".join(f"{name} {count:,}" for name, count in report["domains"].items())),
        ("splits", ", ".join(f"{name} {count:,}" for name, count in report["splits"].items())),
    ]
    for row in rows:
        table.add_row(*row)
    return table
