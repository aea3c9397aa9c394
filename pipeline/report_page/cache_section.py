"""A cache on a report page: what it is, its columns and bytes, its checks, and the mask of a few samples."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import size_text
from pipeline.cache.inspect import cache_facts, describe, tokenizer_of
from pipeline.errors import UsageError
from pipeline.evaluation.reply_text import spread_over_domains
from pipeline.report_page.charts import Chart, axis, draw
from pipeline.report_page.table import Table
from pipeline.visible_text import visible, visible_lines

SAMPLES = 4  # whose mask is shown
MOST_TOKENS = 400  # of such a sample
MOST_DOMAINS = 200  # in a table


@dataclass(frozen=True)
class MaskSample:
    """A sample's text in stretches, each with whether it is supervised."""

    title: str
    stretches: list[tuple[str, bool]]


@dataclass(frozen=True)
class CacheSection:
    """A cache for the template."""

    title: str
    facts: list[tuple[str, str]]
    columns: Table
    domains: Table
    sizes: Chart | None
    samples: list[MaskSample]


def cache_section(name: str, path: Path) -> CacheSection:
    """Return a cache's section. name: a word of its own on the page, for its chart. UsageError, CacheError."""
    found = describe(path)
    return CacheSection(
        title=visible(path),
        facts=_facts(found),
        columns=_columns(found["columns"]),
        domains=_domains(found["domains"]),
        sizes=_sizes(name, found["columns"]) if found["columns"] else None,
        samples=_mask_samples(path),
    )


def _facts(found: dict) -> list[tuple[str, str]]:
    identity, capture = found["identity"], found["identity"].get("capture", {})
    facts = cache_facts(found) | {
        "chat template": identity.get("tokenizer", {}).get("chat_template"),
        "captured by": f"{capture.get('engine')}, in {capture.get('dtype')}",
    }
    return [(name, visible(value)) for name, value in facts.items() if value]


def _columns(columns: list[dict]) -> Table:
    heads = ["column", "type", "codec", "rows", "size", "bytes a token", "shards", "probe error", "certified error"]
    return Table(
        heads,
        [
            [
                visible(column["name"]), column["dtype"], visible(column["codec"]), f"{column['rows']:,}",
                size_text(column["bytes"]), f"{column['token_bytes']:,.0f}", str(column["shards"]),
                _error(column["probe"]), _error(column["certificate"]),
            ]
            for column in columns
        ],
    )  # fmt: skip


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _domains(domains: list[dict]) -> Table:
    rows = [
        [
            visible(entry["domain"]) or "-",
            visible(entry["split"]) or "-",
            *(f"{entry[key]:,}" for key in ("samples", "tokens", "supervised")),
        ]
        for entry in domains[:MOST_DOMAINS]
    ]
    left_out = len(domains) - len(rows)
    rows += [[f"and {left_out:,} more; `pipeline inspect` lists them", "", "", "", ""]] * (left_out > 0)
    return Table(["domain", "split", "samples", "tokens", "supervised"], rows)


def _sizes(name: str, columns: list[dict]) -> Chart:
    rows = [{"column": visible(column["name"]), "bytes": column["token_bytes"]} for column in columns]
    names = [row["column"] for row in rows]
    place = {"y": {"field": "column", "type": "nominal", "sort": names, "title": None}}
    bars = {"mark": {"type": "bar", "color": "var(--c0)"}, "encoding": place | {"x": axis("bytes", "bytes a token")}}
    title = "Size of a token's states, by column"
    table = [[row["column"], f"{row['bytes']:,.0f}"] for row in rows]
    return Chart(title, draw(name, title, [bars], rows, height=26 * len(rows)), ["column", "bytes a token"], table)


def _mask_samples(path: Path) -> list[MaskSample]:
    cache = HiddenCache.open(path)
    try:
        tokenizer = tokenizer_of(path)
    except UsageError:  # nothing is captured yet, and its target is not here
        return []
    return [_mask_sample(cache, tokenizer, index) for index in spread_over_domains(cache.samples.domain, SAMPLES)]


def _mask_sample(cache: HiddenCache, tokenizer, index: int) -> MaskSample:
    ids_T, mask_T = (column[:MOST_TOKENS] for column in cache.tokens_of(index))
    edges = [0, *(np.flatnonzero(np.diff(mask_T)) + 1).tolist(), len(ids_T)]
    stretches = [
        (
            visible_lines(tokenizer.decode(ids_T[start:end].tolist(), skip_special_tokens=False)),
            bool(mask_T[start]),
        )
        for start, end in pairwise(edges)
        if start < end
    ]
    table = cache.samples
    cut = f", the first {MOST_TOKENS} shown" if table.length[index] > MOST_TOKENS else ""
    domain = visible(table.domain[index]) or "no domain"
    return MaskSample(f"sample {index}: {domain}, {table.length[index]} tokens{cut}", stretches)
