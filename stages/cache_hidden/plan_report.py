"""The report of a plan, before anything is captured: samples, tokens, what was left out and why, bytes, free disk."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.cache.atomic import free_bytes, size_text
from pipeline.cache.catalog import Catalog, Work
from pipeline.cache.codecs import CODECS
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.layout import layer_of
from pipeline.cache.plan import Plan
from pipeline.cache.samples import ShardPlan, to_numpy
from pipeline.cache.schema import ColumnManifest
from pipeline.duration_text import clock_text
from pipeline.runs.training_data import cache_hidden_command
from stages.cache_hidden.engine_options import HUGGING_FACE
from stages.cache_hidden.make_plan import missing_columns
from stages.cache_hidden.settings import CaptureOptions, CaptureSettings

# Options that the capture's command repeats as they were given.
AS_GIVEN = ("turns", "template_kwargs", "template_date", "max_length", "max_samples", "batch_tokens")
AS_GIVEN += ("device", "dtype", "revision")
SHOWN_CHARACTERS = 240  # of each supervised or unsupervised span of a sample that a plan shows
Lost = Mapping[tuple[int, str], ColumnManifest | None]  # damaged (shard, column), its former manifest if known


def column_bytes(shard: ShardPlan, spec: ColumnSpec) -> int:
    """Return the bytes that a shard's column is expected to take in its codec."""
    rows = shard.rows if spec.keeps == "all" else shard.final_count
    return CODECS[spec.codec].stored_bytes(rows, spec.width, spec.dtype)


def work_bytes(work: Work) -> int:
    """Return the bytes expected to be written still."""
    return sum(column_bytes(shard, spec) for shard, columns in work for spec in columns)


def bytes_by_codec(plan: Plan, columns: tuple[ColumnSpec, ...]) -> dict[str, dict[str, int]]:
    """Return the expected bytes of the columns in every codec: codec -> column, or `in all` -> bytes."""
    found = {}
    for codec in CODECS:
        encoded = [replace(spec, codec=codec) for spec in columns]
        found[codec] = {spec.name: sum(column_bytes(shard, spec) for shard in plan.shards) for spec in encoded}
        found[codec]["in all"] = sum(found[codec].values())
    return found


def budget_steps(plan: Plan) -> list[str]:
    """Return the sentences in which a plan describes its budget decision; none for a plan without a budget."""
    return [step for manifest in plan.manifests for step in manifest.notes.get("budget", {}).get("steps", [])]


def plan_report(catalog: Catalog, settings: CaptureSettings) -> dict:
    """Return all that `pipeline plan --json` prints: sizes in bytes, lengths in tokens, `time` None (not measured)."""
    plan = catalog.plan
    notes, work = plan.notes, missing_columns(catalog, settings.columns)
    sizes = {spec.name: sum(column_bytes(shard, spec) for shard in plan.shards) for spec in settings.columns}
    sizes["target"] = settings.head_bytes
    dropped = {**notes["faults"], **({"too short": notes["too_short"]} if notes["too_short"] else {})}
    need, free = work_bytes(work), free_bytes(catalog.path)
    return {
        "cache": str(catalog.path),
        "target": settings.identity.target.as_dict(),
        "sources": plan.sources,
        "mask": settings.identity.samples.mask,
        "max_length": settings.max_length,
        "dtype": settings.dtype,
        "engine": settings.identity.capture.engine,
        "engine_options": settings.engine.options,
        "rows": notes["rows"],
        "samples": plan.samples,
        "tokens": plan.tokens,
        "supervised": plan.supervised,
        "supervised_share": plan.supervised / plan.tokens,
        "duplicates": plan.duplicates,
        "truncated": notes["truncated"],
        "rewritten_turns": notes["rewritten_turns"],
        "unproven_turns": notes.get("unproven_turns", {}),
        "turns": notes.get("turns"),
        "kinds": turn_kind_examples(plan),
        "template": {
            key: getattr(settings.identity.samples, key) for key in ("template_kwargs", "template_date", "stops")
        },
        "dropped": {why: {"count": dropped[why], "examples": notes["examples"].get(why, [])} for why in dropped},
        "examples": notes["examples"],
        "prices": bytes_by_codec(plan, settings.columns),
        "codecs": {spec.name: spec.codec for spec in settings.columns},
        "bytes": sizes,
        "bytes_in_all": sum(sizes.values()),
        "bytes_to_write": need,
        "free_bytes": free,
        "fits": need < free,
        "time": None,
        "budget": budget_steps(plan),
        "shards": len(plan.shards),
        "shards_done": len(plan.shards) - len(work),
        "domains": _count_values(plan, "domain"),
        "splits": _count_values(plan, "split"),
    }


def turn_kind_examples(plan: Plan) -> dict[str, dict]:
    """Return for each kind of turn: how many there are, and its first sample's source, ids and mask (if planned)."""
    found = {}
    for kind, noted in plan.notes.get("kinds", {}).items():
        source, _, line = noted["first"].rpartition(":")
        sample = next(_samples_of_record(plan, source, int(line)), None)
        shown = {"ids": sample[0].ids(sample[1]).tolist(), "mask": sample[0].mask(sample[1]).tolist()} if sample else {}
        found[kind] = {**noted, **shown}
    return found


def _samples_of_record(plan: Plan, source: str, line: int) -> Iterator[tuple[ShardPlan, int]]:
    """Yield the samples made from a record of the corpus, each as its shard and its number in it."""
    for shard in plan.shards:
        for row in np.flatnonzero(to_numpy(shard.batch.column("line")) == line):
            if shard.batch.column("source")[int(row)].as_py() == source:
                yield shard, int(row)


def plan_samples(report: dict):
    """Return one sample of each kind of turn as text for the terminal, supervised tokens highlighted."""
    from rich.console import Group
    from rich.text import Text

    from pipeline.cache.inspect import coloured, supervised_style, tokenizer_of
    from pipeline.visible_text import visible

    tokenizer, lines = tokenizer_of(Path(report["cache"])), []
    for kind, shown in report["kinds"].items():
        if "ids" in shown:
            title = f"\n{kind}: {shown['count']:,} turns, such as {visible(shown['first'])} "
            title += f"(supervised: {supervised_style()})"
            lines.append(Text(title, "bold"))
            lines.append(coloured(tokenizer, shown["ids"], shown["mask"], SHOWN_CHARACTERS))
    return Group(*lines)


def _count_values(plan: Plan, column: str) -> dict[str, int]:
    counts = Counter(text or "(none)" for shard in plan.shards for text in shard.text(column))
    return dict(sorted(counts.items()))


def plan_table(report: dict):
    """Return the report as a table for the terminal."""
    from rich.text import Text

    from pipeline.visible_tables import Grid
    from pipeline.visible_text import visible

    table = Grid(title=f"plan of {visible(report['cache'])}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    masked = "proven turn by turn" if report["mask"] == "proven" else f"unproven, by {report['mask']}"
    rows = [
        ("target", f"{report['target']['name']} ({report['dtype']}), run by {engine_text(report)}"),
        ("corpus", ", ".join(str(source.get("file") or source.get("dataset")) for source in report["sources"])),
        ("samples", f"{report['samples']:,} of {report['rows']:,} rows, {report['duplicates']:,} duplicates"),
        ("tokens", f"{report['tokens']:,}, {report['supervised_share']:.1%} supervised ({masked})"),
        ("cut", f"{report['truncated']:,} samples at {report['max_length']:,} tokens"),
    ]
    for why, found in report["dropped"].items():
        rows.append((f"left out: {why}", f"{found['count']:,}, such as " + "; ".join(found["examples"])))
    rows += turn_rows(report)
    rows += [
        ("prices", codec_table(report)),
        ("head", f"{size_text(report['bytes']['target'])}, the target's embedding and LM head"),
    ]
    fits = "it fits" if report["fits"] else "IT DOES NOT FIT: --budget takes a part, --codec less for each"
    rows += [
        ("cache", f"{size_text(report['bytes_in_all'])} in {report['shards']} shards, {report['shards_done']} done"),
        ("to write", f"{size_text(report['bytes_to_write'])}, {size_text(report['free_bytes'])} free: {fits}"),
        ("time", time_text(report["time"]) if report["bytes_to_write"] else "none, everything is captured"),
        *(("memory" * (not number), line) for number, line in enumerate(report["memory"]["lines"])),
        *(("training" * (not number), line) for number, line in enumerate(report.get("training", {}).get("lines", []))),
        ("domains", ", ".join(f"{name} {count:,}" for name, count in report["domains"].items())),
        ("splits", ", ".join(f"{name} {count:,}" for name, count in report["splits"].items())),
    ]
    rows += [("" if number else "budget", Text(step)) for number, step in enumerate(report["budget"])]
    for row in rows:  # as Text: a name in brackets is no markup
        table.add_row(*(Text(visible(cell)) if isinstance(cell, str) else cell for cell in row))
    return table


def engine_text(report: dict) -> str:
    """Return what runs the target, and what that is told."""
    options = ", ".join(f"{name}={value}" for name, value in sorted(report["engine_options"].items()))
    return f"{report['engine']} with {options}" if options else report["engine"]


def turn_rows(report: dict) -> list[tuple[str, str]]:
    """Return the table's rows about turns: size with `--turns last` and `each`, the choice, and unsupervised turns."""
    rows, turns = [], report["turns"]
    if turns and turns["last"] != turns["each"]:
        bytes_a_token = (report["bytes_in_all"] - report["bytes"]["target"]) / report["tokens"]
        for name in ("last", "each"):
            priced = turns[name]
            taken = f", taken: {turns['why']}" if turns["chosen"] == name else ""
            rows.append(
                (
                    f"--turns {name}",
                    f"{priced['samples']:,} samples, {priced['tokens']:,} tokens, {priced['supervised']:,} supervised, "
                    f"about {size_text(int(priced['tokens'] * bytes_a_token))}{taken}",
                )
            )
        if turns["chosen"] == "last":
            rows.append(("turns rewritten", f"{report['rewritten_turns']:,} by the template, not supervised"))
    for why, count in report["unproven_turns"].items():
        shown = "; ".join(report["examples"].get(why, []))
        rows.append((f"not supervised: {why}", f"{count:,} turns, such as {shown}"))
    if arguments := report["template"]["template_kwargs"]:  # None: planned by an earlier version
        rows.append(("template", ", ".join(f"{key} = {value!r}" for key, value in arguments.items())))
    return rows


def codec_table(report: dict):
    """Return a table of the bytes of every column in every codec; the chosen ones are marked."""
    from rich.text import Text

    from pipeline.visible_tables import grid

    table = grid("", *(f">{codec}" for codec in report["prices"]))
    for name in next(iter(report["prices"].values())):
        chosen = report["codecs"].get(name)
        sizes = {codec: size_text(found[name]) for codec, found in report["prices"].items()}
        table.add_row(
            name, *(Text(f"{size} *", "bold") if codec == chosen else f"{size}  " for codec, size in sizes.items())
        )
    return table


def time_text(found: dict | None) -> str:
    """Return how long the work is expected to take, in words. found: see `Speed.as_dict`; None where not measured."""
    if found is None:
        return "unknown; --probe measures disk and target"
    what = "computing" if found["compute_s"] >= found["write_s"] else "writing"
    disk = f"{found['disk_bytes_s'] / 1e6:,.0f} MB/s"
    whole, computing, writing = (clock_text(round(found[name])) for name in ("seconds", "compute_s", "write_s"))
    return (
        f"about {whole} for one worker, that of {what}: computing {computing} at {found['tokens_s']:,.0f} tokens/s, "
        f"writing {writing} at {disk}"
    )


def codec_text(columns: Sequence[ColumnSpec]) -> str | None:
    """Return the shortest `--codec` text for these columns; None where every one is raw."""
    of_aux = {spec.codec for spec in columns if spec.name != "final"}
    if {spec.codec for spec in columns} == {"raw"}:
        return None
    if len(of_aux) > 1:
        return ",".join(f"{spec.name}={spec.codec}" for spec in columns)
    final = [f"final={spec.codec}" for spec in columns if spec.name == "final"]
    return ",".join([*(f"aux={codec}" for codec in of_aux), *final])


def capture_command(
    model: str, corpus: str | None, out: Path, options: CaptureOptions, settings: CaptureSettings
) -> str:
    """Return the `cache-hidden` command line that captures a plan, with columns and codecs written out."""
    final = next((spec.keeps for spec in settings.columns if spec.name == "final"), "none")
    layers = ",".join(str(layer_of(spec.name)) for spec in settings.columns if spec.name != "final")
    arguments = {
        "--model": model,
        "--corpus": corpus,
        "--roles": options.roles,
        "--out": str(out),
        "--engine": None if settings.engine.name == HUGGING_FACE else settings.engine.name,
        "--python": settings.engine.python,
        "--layers": layers,
        "--final": final if final != "needed" else None,
        "--codec": codec_text(settings.columns),
        **{f"--{name.replace('_', '-')}": getattr(options, name) for name in AS_GIVEN},
    }
    pairs = (options.engine_options or "").splitlines()
    told = [word for pair in pairs for word in ("--engine-option", pair)]
    return cache_hidden_command(arguments, *told, *["--append"] * options.append)
