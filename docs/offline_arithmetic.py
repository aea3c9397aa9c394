"""When a cache pays: write the tables of docs/why-offline.md, from sizes, codecs and a few published figures.

    python docs/offline_arithmetic.py            write them
    python docs/offline_arithmetic.py --check    end with 1 where the page has others

Nothing is measured here. Bytes are those of the codecs, but for zstd, whose share was measured.

    D hidden size   K layers   N passes over the corpus: epochs times runs
"""

import argparse
import sys
from pathlib import Path

from pipeline.cache.codecs import CODECS

PAGE = Path(__file__).with_name("why-offline.md")
BEGIN, END = "<!-- offline_arithmetic.py {} -->", "<!-- end of {} -->"

WIDTHS = {"Qwen3-4B": 2560, "Qwen3-8B": 4096}  # D
LAYERS = 5
SUPERVISED = 0.5  # of the tokens: `final` is kept for these
ZSTD = 0.69  # of raw, on real states: 0.67 to 0.69
CORPORA = {"50 M": 50e6, "250 M": 250e6, "1.24 G": 1.24e9}
DISKS = {"2 TB": 2e12, "30 TB": 30e12}
# Of a trainer that keeps the target beside the draft: by a sample's tokens, the target's share of GPU time. Of others.
SHARES = {550: 0.125, 2000: 0.35, 4000: 0.51}
# What capturing a token costs, in what a resident target pays for it. Seen elsewhere: 3.8k tokens/s a GPU where prefill
# reaches 27k.
CAPTURES = {"as quick as prefill": 1.0, "half as quick": 2.0, "3.8k where prefill reaches 27k": 27 / 3.8}
PASSES = {"1 epoch": 1, "6 epochs": 6, "6 epochs, 4 runs": 24, "6 epochs, 24 runs": 144}
SPEEDS = (3_600, 10_000, 26_000)  # tokens a second that a GPU trains on


def token_bytes(target: str, codec: str) -> float:
    """Return the bytes that a token's states take: K layers of it, and `final` for the supervised share."""
    width, rows = WIDTHS[target], 10_000  # many, so that what a file has once does not show
    raw = CODECS["raw"].stored_bytes(rows, width, "bfloat16") / rows
    of_row = ZSTD * raw if codec == "zstd" else CODECS[codec].stored_bytes(rows, width, "bfloat16") / rows
    return (LAYERS + SUPERVISED) * of_row


def saved(share: float, capture: float, passes: int) -> float:
    """Return the share of GPU time that a cache saves: the target is paid `capture` times in place of N times.

    share: of a pass with the target beside the draft, what the target takes.
    """
    return share * (1 - capture / passes)


def size_rows() -> list[str]:
    rows = head(["target", "codec", "a token", *(f"{name} tokens" for name in CORPORA), *(f"{d} hold" for d in DISKS)])
    for target in WIDTHS:
        for codec in CODECS:
            size = token_bytes(target, codec)
            cells = [target, codec, f"{size / 1000:.1f} kB"]
            cells += [f"{count * size / 1e12:.1f} TB" for count in CORPORA.values()]
            rows.append(line(cells + [f"{disk / size / 1e6:,.0f} M" for disk in DISKS.values()]))
    return rows


def saved_rows() -> list[str]:
    rows = head(["tokens of a sample", "capture", *PASSES, "pays beyond"])
    for tokens, share in SHARES.items():
        for name, capture in CAPTURES.items():
            cells = [f"{tokens:,}", name, *(f"{saved(share, capture, count):+.0%}" for count in PASSES.values())]
            rows.append(line([*cells, f"{capture:.1f} passes"]))
    return rows


def reading_rows() -> list[str]:
    rows = head(["target", "codec", *(f"{speed:,} tokens/s" for speed in SPEEDS), "eight GPUs at the last"])
    for target in WIDTHS:
        for codec in CODECS:
            rates = [speed * token_bytes(target, codec) for speed in SPEEDS]
            cells = [target, codec, *(f"{rate / 1e6:,.0f} MB/s" for rate in rates)]
            rows.append(line([*cells, f"{8 * rates[-1] / 1e9:.1f} GB/s"]))
    return rows


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(cells: list[str]) -> list[str]:
    return [line(cells), line(["---"] * 2 + ["---:"] * (len(cells) - 2))]


def with_tables(page: str) -> str:
    """Return a page with all tables between their marks."""
    for name, rows in (("sizes", size_rows()), ("saved", saved_rows()), ("reading", reading_rows())):
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = page.split(begin)
        page = "\n".join([before + begin, "", *rows, "", end + rest.split(end)[1]])
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="end with 1 where the page has other tables")
    check, found = parser.parse_args().check, PAGE.read_text()
    page = with_tables(found)
    if not check:
        PAGE.write_text(page)
    return int(check and page != found)


if __name__ == "__main__":
    sys.exit(main())
