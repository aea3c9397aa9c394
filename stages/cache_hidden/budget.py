"""`--budget`: fit the cache into a number of bytes. Decided before the plan is written, and stored in the plan.

Three steps, each taken only as far as needed and described in the plan:

1. leave out what no wanted method reads: rows of `final`, or all of it;
2. choose the codec: lossless before lossy, and `final` always lossless, since its argmax gives the exact accept length;
3. choose samples: the same share of every domain and split, drawn by hash.

The result depends on the corpus, the target and the budget alone, never on the disk or the clock, and the samples of a
smaller budget are a subset of a larger one's.

    n samples
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.cache.atomic import size_text
from pipeline.cache.catalog import Catalog
from pipeline.cache.codecs import CODECS, codec_of, parse_codecs
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.plan_writer import MIN_SHARDS, SHARD_BYTES, has_columns
from pipeline.cache.samples import ShardPlan
from pipeline.errors import UsageError
from pipeline.nearest_name import did_you_mean
from pipeline.options import size_bytes
from pipeline.runs.training_data import HELDOUT, splitmix64
from pipeline.target.files import CONFIG, tokenizer_files
from stages.cache_hidden.settings import CaptureOptions, CaptureSettings

FORMAT_SHARE = 0.005  # overhead as a share of a column: checksums, indices, the zeros after its last chunk
COLUMN_BYTES = 8 << 10  # fixed overhead of a column of a shard: manifest, checksums, zarr.json
TOKEN_BYTES, SAMPLE_BYTES = 10, 400  # in the plan, in samples.arrow and in the index

# Takes the tokenised samples; returns which are planned, bool [n], and the plan's note of the decision.
SampleChooser = Callable[[Sequence[ShardPlan]], tuple[np.ndarray, dict]]


@dataclass(frozen=True)
class BudgetRequest:
    """The options that decide a budget's result, as the plan's manifest stores them; equal requests, equal plans."""

    budget: int  # bytes
    methods: str | None  # None: all methods, also those that a later version adds
    seed: int
    layers: str | None
    taps: int | None
    final: str | None
    codec: str | None

    @classmethod
    def of(cls, options: CaptureOptions) -> "BudgetRequest":
        """UsageError for a method that does not exist, and for a budget with --append."""
        if options.append:
            raise UsageError("--budget decides a cache's first plan; leave it out to append, or make a second cache")
        columns = options.layers, options.taps, options.final, options.codec
        methods = options.methods and ",".join(wanted_methods(options.methods))
        return cls(size_bytes(options.budget), methods, options.seed, *columns)

    def as_dict(self) -> dict:
        """Return the entry `asked` of the plan's manifest."""
        return dict(vars(self))


def wanted_methods(named: str | None) -> tuple[str, ...]:
    """Return the methods that drafts will be trained with: those named with commas, or all. UsageError."""
    from pipeline.drafts import DRAFTS  # brings torch

    names = tuple(sorted(DRAFTS if named is None else {name.strip() for name in named.split(",")}))
    for name in names:
        if name not in DRAFTS:
            what = f"no method `{name}`{did_you_mean(name, DRAFTS, '`{}`') or '.'}" if name else "a comma too many."
            raise UsageError(f"--methods {named}: {what} There are {', '.join(DRAFTS)}")
    return names


def planned_budget(catalog: Catalog) -> dict | None:
    """Return the plan's note of its budget decision; None for a plan without a budget, or where there is no plan."""
    manifests = catalog.segments if catalog.planned else []
    return next((manifest.notes["budget"] for manifest in manifests if "budget" in manifest.notes), None)


def within_budget(catalog: Catalog, options: CaptureOptions) -> CaptureOptions:
    """Return the options with layers, `final` and codec filled in from the plan's budget decision.

    In a command without --budget, what it states itself takes precedence.
    """
    planned = planned_budget(catalog)
    if planned is None:
        return options
    if options.budget is None:
        layers = None if options.taps else options.layers or planned["layers"]
        return replace(
            options, layers=layers, final=options.final or planned["final"], codec=options.codec or planned["codec"]
        )
    if planned["asked"] != BudgetRequest.of(options).as_dict():
        return options  # to be planned again, or refused
    return replace(options, layers=planned["layers"], taps=None, final=planned["final"], codec=planned["codec"])


def plan_matches_budget(catalog: Catalog, options: CaptureOptions) -> bool:
    """Return whether the existing plan was made with this budget; any plan matches where none is asked for.

    Raises UsageError where it was not and cannot be replaced, since states have been captured with it.
    """
    if options.budget is None or options.append:
        return True
    planned, request = planned_budget(catalog), BudgetRequest.of(options).as_dict()
    if planned is not None and planned["asked"] == request:
        return True
    if has_columns(catalog.path):
        key = next((key for key in request if planned and planned["asked"][key] != request[key]), "budget")
        there, here = planned["asked"][key] if planned else "none", request[key]
        raise UsageError(
            f"{catalog.path} was planned with {key} = {there}, this command asks for {here}, and states are captured "
            "already; leave --budget out to go on with that plan, or pass another --out for a second cache"
        )
    return False


@dataclass(frozen=True)
class SampleSizes:
    """Of each sample, [n]: its rows, its rows in `final`, its group (domain and split) and its hash."""

    rows: np.ndarray
    final_rows: np.ndarray
    groups: list[tuple[str, str]]
    hashes: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[ShardPlan]) -> "SampleSizes":
        groups = [pair for part in parts for pair in zip(part.text("domain"), part.text("split"), strict=True)]
        return cls(
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([np.diff(part.final_bounds) for part in parts]),
            groups,
            np.concatenate([part.sample_ids[:, 1] for part in parts]),
        )

    def bytes(self, columns: Sequence[ColumnSpec]) -> np.ndarray:
        """Return the bytes that each sample is expected to add to a cache of these columns, float64 [n]."""
        many = 1 << 20  # rows to average over, since `stored_bytes` rounds
        bytes_n = TOKEN_BYTES * self.rows + float(SAMPLE_BYTES)
        for spec in columns:
            row_bytes = CODECS[spec.codec].stored_bytes(many, spec.width, spec.dtype) / many
            rows_n = self.rows if spec.keeps == "all" else self.final_rows
            bytes_n += (1 + FORMAT_SHARE) * row_bytes * rows_n
        return bytes_n


def fixed_bytes(settings: CaptureSettings, columns: Sequence[ColumnSpec], rows: int) -> int:
    """Return the bytes of a cache that do not depend on the samples: the target's files, each shard's overhead."""
    shards = max(MIN_SHARDS, -(-rows * settings.row_bytes // SHARD_BYTES))
    beside = sum(path.stat().st_size for path in (settings.folder / CONFIG, *tokenizer_files(settings.folder)))
    return settings.head_bytes + beside + shards * (len(columns) + 1) * COLUMN_BYTES


def sample_chooser(settings: CaptureSettings, options: CaptureOptions) -> SampleChooser | None:
    """Return the function that chooses which tokenised samples are planned; None without a budget."""
    if options.budget is None:
        return None
    request = BudgetRequest.of(options)
    return lambda parts: decide_within_budget(SampleSizes.of(parts), settings, request)


def decide_within_budget(
    corpus: SampleSizes, settings: CaptureSettings, request: BudgetRequest
) -> tuple[np.ndarray, dict]:
    """Return which samples are planned, bool [n], and the plan's note: columns, codec, and a sentence for each step.

    Raises UsageError for a budget that holds no sample at all.
    """
    columns, steps, total = settings.columns, [], int(corpus.rows.sum())

    def size(columns: Sequence[ColumnSpec]) -> int:
        return int(corpus.bytes(columns).sum()) + fixed_bytes(settings, columns, total)

    tried = [request.codec] if request.codec else codecs_tried(columns)
    first = with_codec(columns, tried[0])
    steps.append(
        f"asked for: {', '.join(spec.name for spec in columns)} of {len(corpus.rows):,} samples, {total:,} tokens, as "
        f"{tried[0]}: {size_text(size(first))}; the budget is {size_text(request.budget)}"
    )
    if size(first) > request.budget:
        columns, step = drop_unread_columns(columns, corpus, wanted_methods(request.methods))
        steps.append(step)
    codec = next((text for text in tried if size(with_codec(columns, text)) <= request.budget), tried[-1])
    steps.append(codec_step(codec, {text: size(with_codec(columns, text)) for text in tried}, request))
    columns = with_codec(columns, codec)
    bytes_n = corpus.bytes(columns)
    available = request.budget - fixed_bytes(settings, columns, total)
    keys_n = splitmix64(corpus.hashes ^ splitmix64(np.uint64(request.seed)))
    chosen_n = choose_samples(bytes_n, corpus.groups, keys_n, available)
    if not chosen_n.any():
        least = request.budget - available + int(bytes_n.min())
        raise UsageError(
            f"--budget: {size_text(request.budget)} hold no sample; the target's own files and one sample as {codec} "
            f"take {size_text(least)}, all samples {size_text(size(columns))}"
        )
    steps.append(samples_step(chosen_n, corpus, request.seed))
    steps.append(f"in all: {size_text(int(bytes_n[chosen_n].sum()) + request.budget - available)} expected")
    layers = ",".join(spec.name.removeprefix("aux.") for spec in columns if spec.name != "final")
    final = next((spec.keeps for spec in columns if spec.name == "final"), "none")
    decision = {"asked": request.as_dict(), "layers": layers, "final": final, "codec": codec, "steps": steps}
    return chosen_n, decision


def codecs_tried(columns: Sequence[ColumnSpec]) -> list[str]:
    """Return the `--codec` texts that a budget tries, in order, until all samples fit.

    The lossless codecs, the smallest last; then each lossy one, the smallest last, with `final` in the smallest
    lossless one.
    """
    width, dtype = columns[0].width, columns[0].dtype
    by_size = sorted(CODECS.values(), key=lambda codec: -codec.row_bytes(width, dtype))
    lossless = [codec.name for codec in by_size if not codec.lossy]
    return lossless + [f"aux={codec.name},final={lossless[-1]}" for codec in by_size if codec.lossy]


def with_codec(columns: Sequence[ColumnSpec], codec: str) -> tuple[ColumnSpec, ...]:
    """Return the columns, each with the codec that a `--codec` text chooses for it."""
    chosen = parse_codecs(codec)
    return tuple(replace(spec, codec=codec_of(chosen, spec.name) or "raw") for spec in columns)


def drop_unread_columns(
    columns: Sequence[ColumnSpec], corpus: SampleSizes, methods: tuple[str, ...]
) -> tuple[tuple[ColumnSpec, ...], str]:
    """Return the columns that the methods read, and a sentence about what was left out.

    A method reads every layer of a cache unless its recipe names some, so layers stay. Only methods with `reads_final`
    train on `final`, but the accept length on held-out samples is measured with it. So it is dropped only where nothing
    is held out; else only its rows away from supervised tokens are.
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
    step = f"columns: all stay; every layer is read by {named}; final, since {why} (--final none leaves it out)"
    return tuple(columns), step


def codec_step(codec: str, sizes: dict[str, int], request: BudgetRequest) -> str:
    """Return a sentence: which codec was chosen and why. `sizes`: bytes of all samples in each codec tried."""
    tried = ", ".join(f"{text} {size_text(size)}" for text, size in sizes.items())
    if request.codec:
        return f"codec: {codec}, as stated ({tried})"
    why = (
        "the first that holds all samples" if sizes[codec] <= request.budget else "the smallest; none holds all samples"
    )
    chosen, warning = parse_codecs(codec), ""
    if lossy := next((name for name in chosen.values() if CODECS[name].lossy), None):
        warning = f"; {lossy} is lossy, within bounds the capture certifies: --codec {chosen['final']} stays exact"
    return f"codec: {codec}, {why} ({tried}){warning}"


def samples_step(chosen_n: np.ndarray, corpus: SampleSizes, seed: int) -> str:
    """Return a sentence: how many samples are planned, and how they were chosen."""
    if chosen_n.all():
        return f"samples: all {len(chosen_n):,}"
    share = corpus.rows[chosen_n].sum() / corpus.rows.sum()
    return (
        f"samples: {int(chosen_n.sum()):,} of {len(chosen_n):,}, {share:.1%} of the tokens, the same share of each of "
        f"{len(set(corpus.groups))} groups of domain and split, by hash with seed {seed}"
    )


def choose_samples(bytes_n: np.ndarray, groups: Sequence, hashes_n: np.ndarray, available: float) -> np.ndarray:
    """Choose samples of at most `available` bytes, the same share of every group to within a sample; return bool [n].

    The samples of a group are ordered by hash; a sample's quantile (0 to 1) is where the middle of its bytes lies in
    its group's. Those with the lowest quantiles are chosen, so fewer bytes give a subset.
    """
    names = {group: number for number, group in enumerate(sorted(set(groups)))}
    group_n = np.array([names[group] for group in groups])
    order = np.lexsort((hashes_n, group_n))
    ends = np.cumsum(bytes_n[order])
    totals = np.bincount(group_n, weights=bytes_n)
    before = (np.cumsum(totals) - totals)[group_n[order]]
    quantile_n = np.empty(len(order))
    quantile_n[order] = (ends - bytes_n[order] / 2 - before) / totals[group_n[order]]
    ranked = np.lexsort((hashes_n, quantile_n))
    chosen_n = np.zeros(len(order), bool)
    chosen_n[ranked[np.cumsum(bytes_n[ranked]) <= available]] = True
    return chosen_n
