"""What people read: tables of a cache, of its verification, of a sweep, and of evaluations side by side.

Everything here turns the plain dicts that other modules return, the same that `--json` prints, into rich renderables.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Group
from rich.text import Text

from pipeline.cache.atomic import size_text
from pipeline.cache.catalog import Catalog
from pipeline.cache.layout import LOG
from pipeline.cache.manifest import read_canonical
from pipeline.cache.target_files import has_target, target_file
from pipeline.console import grid, shows_styles
from pipeline.errors import CacheError, UsageError
from pipeline.evaluation.reports import cell, columns_of, load_reports, sampling_temperatures, temperatures
from pipeline.visible_text import escape_markdown, visible, visible_lines

TOKENIZER = "tokenizer.json"
LISTED = 20  # shards that are not captured yet, or foreign files, before the rest is only counted


def cache_table(report: dict) -> Group:
    """Return `describe`'s report as tables: the whole, its columns, its domains."""
    plan, shards, identity = report["plan"], report["shards"], report["identity"]
    whole = grid("", "")
    rows = {
        "target": f"{identity['target']['name']} ({identity['target']['digest'][:12]})",
        "format": f"{report['format']}, identity {report['digest'][:12]}",
        "samples": f"{plan['samples']:,}; {plan['duplicates']:,} duplicates left out",
        "tokens": f"{plan['tokens']:,}, {report['supervised_share']:.0%} supervised",
        "shards": f"{shards['whole']} of {shards['planned']} whole",
        "size": f"{size_text(report['bytes']['total'])}, of which states {size_text(report['bytes']['columns'])}",
    }
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
    for name, value in rows.items():
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
    try:
        planned = Path(read_canonical(cache / LOG)["target"]["folder"]) / TOKENIZER
    except (CacheError, KeyError, TypeError):
        planned = None
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
            lines += [Text(f"  {visible(entry if kind == 'foreign' else finding(entry))}") for entry in shown]
            lines += [Text(f"  and {len(found) - len(shown):,} more; --json lists them")] * (len(found) > len(shown))
    if report["incomplete"]:
        lines.append(Text(f"incomplete: {', '.join(report['incomplete'])}", style="yellow"))
    if not report["damaged"]:
        whole = not report["incomplete"]
        lines.append(Text("no damage" if whole else "no damage in what is there", style="green" if whole else "yellow"))
    return Group(*lines)


def finding(entry: dict) -> str:
    """Return one finding in a line: the file, and what is wrong with it."""
    return f"{entry['file']}: {entry['what']}"


def comparison(paths: Sequence[Path], markdown: bool = False, forced: bool = False) -> Group | str:
    """Return evaluations side by side: a column a draft, a row a domain, accept length with its 95 % interval.

    Reports that differ only in their seed are pooled into one column. Figures of drawn replies have rows of their own.
    `forced` adds the teacher-forced figures.
    """
    columns = columns_of(load_reports(paths))
    domains = sorted({domain for reports in columns.values() for report in reports for domain in report["domains"]})
    figures = {domain: lambda reports, domain=domain: cell(reports, domain) for domain in domains}
    figures |= {"all": lambda reports: cell(reports, None), "mean of domains": _mean_of_domains}
    for drawn in sorted(
        {drawn for reports in columns.values() for drawn in map(sampling_temperatures, reports)} - {None}
    ):
        figures |= _drawn_rows(*drawn)
    if forced:
        figures |= {f"{domain}, forced": lambda reports, name=domain: _forced(reports, name) for domain in domains}
    name = escape_markdown if markdown else visible
    rows = [["accept length", *map(name, columns)]]
    rows += [[name(title), *map(figure, columns.values())] for title, figure in (figures | FACTS).items()]
    if markdown:
        return as_markdown(rows)
    table = grid(rows[0][0], *(f">{head}" for head in rows[0][1:]))
    for row in rows[1:]:
        table.add_row(*row)
    first = next(iter(columns.values()))[0]
    note = (
        f"{visible(first['target'])}, greedy where no T is named, replies of {first['settings']['max_new']} tokens at "
        "most; tokens gained per target call, the target's own included; 95 % intervals over prompts"
    )
    forced_note = "\nforced: teacher-forced, on the cache's replies" if forced else ""
    return Group(table, "", Text(note + forced_note, style="dim"))


def _drawn_rows(temperature: float, of_draft: float) -> dict:
    """Rows of drawn replies: over all prompts, and over domains."""
    title = f"T = {temperatures(temperature, of_draft)}"

    def parts(reports: list[dict]) -> list[dict]:
        return [report["sampled"] for report in reports if sampling_temperatures(report) == (temperature, of_draft)]

    return {
        f"all, {title}": lambda reports: cell(parts(reports), None),
        f"mean of domains, {title}": lambda reports: _mean_of_domains(parts(reports)),
    }


def _mean_of_domains(reports: list[dict]) -> str:
    """Each domain counts the same, as benchmarks average their sets; in "all" one counts as often as it needs calls."""
    found = [of["accept_len"] for report in reports for of in report["domains"].values() if of["calls"]]
    return f"{fmean(found):.2f}" if found else "-"


def _forced(reports: list[dict], domain: str) -> str:
    found = [report["teacher_forced"][domain] for report in reports if domain in report["teacher_forced"]]
    return f"{fmean(found):.2f}" if found else "-"


def as_markdown(rows: list[list[str]]) -> str:
    """Return rows, the first of them heads, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])


def sweep_table(report: dict) -> Group:
    """Return a sweep's report, best first: its settings pooled over seeds, where there are several, then its runs."""
    runs, pooled = report["runs"], report["pooled"]
    parts = []
    if len(pooled) < len(runs):
        table = grid(*_swept(pooled), ">accept length", ">95 %", ">seeds", ">lowest - highest")
        for fact in pooled:
            lengths, of = fact["seeds"], "" if fact["measured"] == fact["runs"] else f" of {fact['runs']}"
            spread = f"{min(lengths):.2f} - {max(lengths):.2f}" if lengths else "-"
            table.add_row(*map(str, fact["setting"].values()), *_measured(fact), f"{fact['measured']}{of}", spread)
        parts += [table, ""]
    table = grid(*_swept(runs), ">accept length", ">95 %", ">steps", ">parameters", "run")
    for fact in runs:
        parameters = "-" if fact["parameters"] is None else f"{fact['parameters']:,}"
        setting = map(str, fact["setting"].values())
        table.add_row(*setting, *_measured(fact), f"{fact['steps']:,}", parameters, fact["run"])
    note = (
        "accept length on held-out samples, without the target: tokens gained per target call, the target's own "
        "included; 95 % intervals over replies, which say nothing of how far seeds differ"
    )
    lines = [Text(visible(f"{fact['run']}: {fact['failed']}"), style="red") for fact in runs if fact["failed"]]
    return Group(*parts, table, "", *lines, Text(note, style="dim"))


def _swept(facts: list[dict]) -> list[str]:
    """The heads of a sweep's own columns: its fields, without their sections."""
    return [key.partition(".")[2] for key in facts[0]["setting"]]


def _measured(fact: dict) -> tuple[str, str]:
    if fact["accept_len"] is None:
        return "failed" if fact.get("failed") else "-", "-"
    low, high = fact["interval"]
    return f"{fact['accept_len']:.2f}", f"{low:.2f} - {high:.2f}"


def _speedup(reports: list[dict]) -> str:
    """The mean, where every report measured both loops side by side: with plain replies from a file none did."""
    found = [report["speed"].get("speedup") for report in reports]
    return "-" if None in found else f"{fmean(found):.2f}x"


def _lossless(reports: list[dict]) -> str:
    total = {key: sum(report["lossless"][key] for report in reports) for key in ("prompts", "identical", "near_ties")}
    ties = f", {total['near_ties']} near ties" if total["near_ties"] else ""
    return f"{total['identical']} of {total['prompts']} identical{ties}"


def _conventions(reports: list[dict]) -> str:
    draft = reports[0]["draft"]
    return f"{draft['block_size']}, {draft['proposals']}"


FACTS = {
    "block, proposals": _conventions,
    "target calls saved": lambda reports: f"{fmean(report['overall']['calls_saved'] for report in reports):.0%}",
    "speed-up on this machine": _speedup,
    "output against plain decoding": _lossless,
    "draft parameters": lambda reports: f"{reports[0]['draft']['parameters']:,}",
    "seeds": lambda reports: str(len({report["draft"].get("seed") for report in reports})),
}
