"""A budget: what of a corpus a cache of so many bytes holds, decided before the plan is written and frozen in it.

Three steps, each only as far as it has to go, each said in words:

1. what no wanted method reads is left out: rows of `final`, or all of it;
2. the codec: lossless before lossy, and `final` lossless always, since the accept length is exact by its argmax;
3. the samples: the same share of every domain and split, drawn by hash.

What is decided follows from the corpus, the target and the budget alone, never from the disk or the clock, and of two
budgets the smaller one's samples are among the larger one's.

    n samples
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.cache.atomic import size_text
from pipeline.cache.codecs import codec_of, parse_codecs, stored_bytes
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.plan import SHARD_BYTES, SHARDS_AT_LEAST, captured, plan_numbers, read_manifests
from pipeline.cache.samples import ShardPlan
from pipeline.errors import UsageError
from pipeline.runs.split import HELDOUT, splitmix64
from pipeline.target.files import CONFIG, tokenizer_files
from stages.cache_hidden.options import CaptureOptions, size_bytes
from stages.cache_hidden.plan_report import head_bytes
from stages.cache_hidden.settings import Settings

CODECS_TRIED = ("raw", "zstd", "aux=int8,final=zstd")  # in this order, until all samples fit
FORMAT_SHARE = 0.005  # of a column: checksums, indices, the zeros behind its last chunk
COLUMN_BYTES = 8 << 10  # of a column of a shard, however few its rows: manifest, sums, zarr.json
TOKEN_BYTES, SAMPLE_BYTES = 10, 400  # in the plan, in samples.arrow and in the index

Chooser = Callable[[Sequence[ShardPlan]], tuple[np.ndarray, dict]]  # which samples, bool [n], and what was decided


@dataclass(frozen=True)
class Asked:
    """What a budget was asked with. It has to be the same for a plan to be this budget's."""

    budget: int
    methods: str | None  # None: all there are, also where the next version has more
    seed: int
    layers: str | None
    taps: int | None
    final: str | None
    codec: str | None

    @classmethod
    def of(cls, options: CaptureOptions) -> "Asked":
        """UsageError for a method that does not exist, and for a budget with --append."""
        if options.append:
            raise UsageError("--budget decides a cache's first plan; leave it out to append, or make a second cache")
        columns = options.layers, options.taps, options.final, options.codec
        methods = options.methods and ",".join(wanted_methods(options.methods))
        return cls(size_bytes(options.budget), methods, options.seed, *columns)

    def as_dict(self) -> dict:
        """For the plan's manifest."""
        return dict(vars(self))


def wanted_methods(named: str | None) -> tuple[str, ...]:
    """Return the methods that drafts will be trained with: those named with commas, or all. UsageError."""
    from pipeline.drafts import DRAFTS  # brings torch

    names = tuple(sorted(DRAFTS if named is None else {name.strip() for name in named.split(",")}))
    for name in names:
        if name not in DRAFTS:
            near, known = difflib.get_close_matches(name, DRAFTS, n=1, cutoff=0.0)[0], ", ".join(DRAFTS)
            meant = f"no method `{name}`, did you mean `{near}`?" if name else "a comma too many."
            raise UsageError(f"--methods {named}: {meant} There are {known}")
    return names


def held_budget(out: Path) -> dict | None:
    """Return what a budget decided when the cache was planned, None where it was planned without one, or not yet."""
    manifests = read_manifests(out) if plan_numbers(out) else []
    return next((manifest["notes"]["budget"] for manifest in manifests if "budget" in manifest["notes"]), None)


def within_budget(out: Path, options: CaptureOptions) -> CaptureOptions:
    """Return the options with what the plan's budget decided; what a command without a budget states goes before."""
    held = held_budget(out)
    if held is None:
        return options
    if options.budget is None:
        layers = None if options.taps else options.layers or held["layers"]
        return replace(
            options, layers=layers, final=options.final or held["final"], codec=options.codec or held["codec"]
        )
    if held["asked"] != Asked.of(options).as_dict():
        return options  # to be planned again, or refused
    return replace(options, layers=held["layers"], taps=None, final=held["final"], codec=held["codec"])


def is_planned(out: Path, options: CaptureOptions) -> bool:
    """Return whether the plan that is there is this budget's (any plan is, without a budget).

    Raises UsageError where it is not and cannot be made again, since states were captured by it.
    """
    if options.budget is None or options.append:
        return True
    held, asked = held_budget(out), Asked.of(options).as_dict()
    if held is not None and held["asked"] == asked:
        return True
    if captured(out):
        key = next((key for key in asked if held and held["asked"][key] != asked[key]), "budget")
        there, here = held["asked"][key] if held else "none", asked[key]
        raise UsageError(
            f"{out} was planned with {key} = {there}, this command asks for {here}, and states are captured already; "
            "leave --budget out to go on with that plan, or pass another --out for a second cache"
        )
    return False


@dataclass(frozen=True)
class Corpus:
    """What is known of the samples: rows, rows that keep `final`, group (domain and split) and hash of each, [n]."""

    rows: np.ndarray
    final_rows: np.ndarray
    groups: list[tuple[str, str]]
    words: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[ShardPlan]) -> "Corpus":
        groups = [pair for part in parts for pair in zip(part.text("domain"), part.text("split"), strict=True)]
        return cls(
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([np.diff(part.final_bounds) for part in parts]),
            groups,
            np.concatenate([part.sample_ids[:, 1] for part in parts]),
        )

    def kept(self, spec: ColumnSpec) -> np.ndarray:
        """Rows of each sample in a column."""
        return self.rows if spec.keeps == "all" else self.final_rows

    def bytes(self, columns: Sequence[ColumnSpec]) -> np.ndarray:
        """Bytes that each sample is expected to add to a cache of these columns, float64 [n]."""
        many = 1 << 20  # stored_bytes rounds
        bytes_n = TOKEN_BYTES * self.rows + float(SAMPLE_BYTES)
        for spec in columns:
            row_bytes = stored_bytes(many, spec.width, spec.dtype, spec.codec) / many
            bytes_n += (1 + FORMAT_SHARE) * row_bytes * self.kept(spec)
        return bytes_n


def fixed_bytes(settings: Settings, columns: Sequence[ColumnSpec], rows: int) -> int:
    """Bytes of a cache that are there however few its samples: the target's files, and what every shard has."""
    shards = max(SHARDS_AT_LEAST, -(-rows * settings.row_bytes // SHARD_BYTES))
    beside = sum(path.stat().st_size for path in (settings.folder / CONFIG, *tokenizer_files(settings.folder)))
    return head_bytes(settings) + beside + shards * (len(columns) + 1) * COLUMN_BYTES


def chooser(settings: Settings, options: CaptureOptions) -> Chooser | None:
    """Return what decides which of the tokenised samples are planned; None without a budget."""
    if options.budget is None:
        return None
    asked = Asked.of(options)
    return lambda parts: decide(Corpus.of(parts), settings, asked)


def decide(corpus: Corpus, settings: Settings, asked: Asked) -> tuple[np.ndarray, dict]:
    """Return which samples are planned, and the decision as the plan notes it: columns, codec, and every step in words.

    Raises UsageError for a budget that holds no sample at all.
    """
    columns, steps, total = settings.columns, [], int(corpus.rows.sum())

    def size(columns: Sequence[ColumnSpec]) -> int:
        return int(corpus.bytes(columns).sum()) + fixed_bytes(settings, columns, total)

    tried = [asked.codec] if asked.codec else list(CODECS_TRIED)
    first = encoded(columns, tried[0])
    steps.append(
        f"asked for: {', '.join(spec.name for spec in columns)} of {len(corpus.rows):,} samples, {total:,} tokens, as "
        f"{tried[0]}: {size_text(size(first))}; the budget is {size_text(asked.budget)}"
    )
    if size(first) > asked.budget:
        columns, told = read_columns(columns, corpus, wanted_methods(asked.methods))
        steps.append(told)
    codec = next((text for text in tried if size(encoded(columns, text)) <= asked.budget), tried[-1])
    steps.append(codec_step(codec, {text: size(encoded(columns, text)) for text in tried}, asked))
    columns = encoded(columns, codec)
    bytes_n = corpus.bytes(columns)
    room = asked.budget - fixed_bytes(settings, columns, total)
    kept_n = subsample(bytes_n, corpus.groups, splitmix64(corpus.words ^ splitmix64(np.uint64(asked.seed))), room)
    if not kept_n.any():
        least = asked.budget - room + int(bytes_n.min())
        raise UsageError(
            f"--budget: {size_text(asked.budget)} hold no sample; the target's own files and one sample as {codec} "
            f"take {size_text(least)}, all samples {size_text(size(columns))}"
        )
    steps.append(samples_step(kept_n, corpus, asked.seed))
    steps.append(f"in all: {size_text(int(bytes_n[kept_n].sum()) + asked.budget - room)} expected")
    layers = ",".join(spec.name.removeprefix("aux.") for spec in columns if spec.name != "final")
    final = next((spec.keeps for spec in columns if spec.name == "final"), "none")
    decision = {"asked": asked.as_dict(), "layers": layers, "final": final, "codec": codec, "steps": steps}
    return kept_n, decision


def encoded(columns: Sequence[ColumnSpec], codec: str) -> tuple[ColumnSpec, ...]:
    """Return columns in the codec that a `--codec` text chooses for each."""
    chosen = parse_codecs(codec)
    return tuple(replace(spec, codec=codec_of(chosen, spec.name) or "raw") for spec in columns)


def read_columns(
    columns: Sequence[ColumnSpec], corpus: Corpus, methods: tuple[str, ...]
) -> tuple[tuple[ColumnSpec, ...], str]:
    """Leave out what none of the methods reads, and say so.

    A method reads every layer of a cache unless its recipe names some, so layers stay. `final` trains only methods
    that say so; but it is by `final` that the accept length of a held-out sample is known without the target, the one
    figure that tells drafts apart. So it goes only where nothing is held out; its rows beside no supervised token go.
    """
    from pipeline.drafts import DRAFTS

    named = ", ".join(methods)
    final = next((spec for spec in columns if spec.name == "final"), None)
    if final is None:
        return tuple(columns), f"columns: all stay; every layer is read by {named}"
    training = [name for name in methods if DRAFTS[name].reads_final]
    if not training and all(split not in ("", HELDOUT) for _, split in corpus.groups):
        rest = tuple(spec for spec in columns if spec is not final)
        return rest, f"columns: final left out; it does not train {named}, and no sample is held out to measure by it"
    why = f"it trains {', '.join(training)}" if training else "the accept length on held-out samples is known by it"
    if final.keeps == "all":
        few = replace(final, keeps="needed")
        return tuple(few if spec is final else spec for spec in columns), (
            f"columns: final only beside supervised tokens, {int(corpus.final_rows.sum()):,} of "
            f"{int(corpus.rows.sum()):,} rows; nothing reads the others, but {why}"
        )
    return tuple(
        columns
    ), f"columns: all stay; every layer is read by {named}; final, since {why} (--final none leaves it out)"


def codec_step(codec: str, sizes: dict[str, int], asked: Asked) -> str:
    """Say which codec it is and why; `sizes` are those of all samples in each that was tried."""
    tried = ", ".join(f"{text} {size_text(size)}" for text, size in sizes.items())
    if asked.codec:
        return f"codec: {codec}, as stated ({tried})"
    why = "the first that holds all samples" if sizes[codec] <= asked.budget else "the smallest; none holds all samples"
    lossy = "; int8 is lossy, within bounds the capture certifies: --codec zstd stays exact" if "int8" in codec else ""
    return f"codec: {codec}, {why} ({tried}){lossy}"


def samples_step(kept_n: np.ndarray, corpus: Corpus, seed: int) -> str:
    """Say how many samples are planned, and how they were chosen."""
    if kept_n.all():
        return f"samples: all {len(kept_n):,}"
    share = corpus.rows[kept_n].sum() / corpus.rows.sum()
    return (
        f"samples: {int(kept_n.sum()):,} of {len(kept_n):,}, {share:.1%} of the tokens, the same share of each of "
        f"{len(set(corpus.groups))} groups of domain and split, by hash with seed {seed}"
    )


def subsample(bytes_n: np.ndarray, groups: Sequence, words_n: np.ndarray, room: float) -> np.ndarray:
    """Return which samples to keep, bool [n]: at most `room` bytes, of every group the same share to within a sample.

    In each group samples are ordered by their word; the middle of a sample's bytes in its group's, a number from 0 to
    1, is its place; the samples of the lowest places are kept. So with less room fewer of the same are.
    """
    names = {group: number for number, group in enumerate(sorted(set(groups)))}
    group_n = np.array([names[group] for group in groups])
    order = np.lexsort((words_n, group_n))
    ends = np.cumsum(bytes_n[order])
    totals = np.bincount(group_n, weights=bytes_n)
    before = (np.cumsum(totals) - totals)[group_n[order]]
    place_n = np.empty(len(order))
    place_n[order] = (ends - bytes_n[order] / 2 - before) / totals[group_n[order]]
    ranked = np.lexsort((words_n, place_n))
    kept_n = np.zeros(len(order), bool)
    kept_n[ranked[np.cumsum(bytes_n[ranked]) <= room]] = True
    return kept_n
