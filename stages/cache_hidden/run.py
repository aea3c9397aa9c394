"""`pipeline plan` and `pipeline cache-hidden`: settle what is wanted, plan it once, capture what is missing.

A run with nothing to do says so within a second: torch, transformers and datasets are imported only to tokenise a new
corpus or to capture.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.columns import ColumnSpec, committed
from pipeline.cache.derived import derive
from pipeline.cache.disk import clean, need_room, size_text
from pipeline.cache.layout import IDENTITY
from pipeline.cache.manifest import create_identity
from pipeline.cache.plan import Plan, load_plan, plan_numbers
from pipeline.cache.target_folder import has_target
from pipeline.errors import DataError, UsageError
from stages.cache_hidden.corpus import corpus_files, file_sources
from stages.cache_hidden.gauge import WARN_BELOW, Gauge
from stages.cache_hidden.options import CaptureOptions
from stages.cache_hidden.record import corpus_unchanged, read_record, request_of, unchanged, write_record
from stages.cache_hidden.report import missing, plan_report, plan_table, work_bytes
from stages.cache_hidden.settings import HUB_CORPUS, HUB_SAMPLES, Settings, default_corpus, default_device, settle

__all__ = ["Done", "plan", "plan_table", "run"]


@dataclass(frozen=True)
class Done:
    """A finished capture, counted over the whole cache; `new_shards` over this run."""

    samples: int
    tokens: int
    shards: int
    new_shards: int
    gib: float
    refused: int
    gauge: Gauge


def plan(model: str, corpus: str | None, out: Path, *, options: CaptureOptions) -> dict:
    """Tokenise the corpus into the plan of a cache at `out`, unless it is there, and return what it says.

    Raises UsageError (no such model or corpus, another identity), DataError (unusable corpus), RoomError.
    """
    settings = settle(model, out, options)
    return plan_report(out, _planned(corpus, out, settings, options), settings)


def run(model: str, corpus: str | None, out: Path, *, options: CaptureOptions) -> Done:
    """Capture what is missing of a cache at `out` and print one line. The same command goes on after any stop.

    Besides what `plan` raises: ProofError when the probe fails, CacheError for a damaged cache.
    """
    request, record = request_of(model, corpus, options), read_record(out)
    columns = unchanged(record, request)
    if columns and plan_numbers(out) and has_target(out):
        planned = load_plan(out)
        if not missing(out, planned, columns):
            derive(out)
            return _say(out, summary(out, planned, columns, 0))
    settings = settle(model, out, options)
    planned = _planned(corpus, out, settings, options)
    clean(out)
    work = missing(out, planned, settings.columns)
    if work or not has_target(out):
        need_room(out, f"a cache of {planned.samples:,} samples", work_bytes(work))
        _announce(planned, settings, work_bytes(work), len(work))
        from stages.cache_hidden.shards import capture_shards  # brings torch and transformers

        refused = summary(out, planned, settings.columns, 0).refused
        capture_shards(out, settings, planned, work, options.device or default_device(), refused)
    derive(out)
    write_record(out, request, settings, corpus or default_corpus(settings.folder))
    return _say(out, summary(out, planned, settings.columns, len(work)))


def _planned(corpus: str | None, out: Path, settings: Settings, options: CaptureOptions) -> Plan:
    """Return the cache's plan, made now if there is none, else compared with what is asked for."""
    named, max_samples = corpus or default_corpus(settings.folder), options.max_samples
    from_hub = corpus is None and named == HUB_CORPUS  # nobody named it
    if (out / IDENTITY).is_file():
        create_identity(out, settings.identity)
    if plan_numbers(out):
        held = load_plan(out)
        if from_hub and max_samples is None and any(part.get("dataset") == HUB_CORPUS for part in held.sources):
            max_samples = HUB_SAMPLES
        _check_same(held, None if from_hub else named, out, max_samples)
        return held
    if from_hub:
        print(
            f"warning: no --corpus given, so {HUB_CORPUS} is taken; its replies are not this target's own, "
            "and a draft learns the target's words: replies that the target wrote train a better one",
            file=sys.stderr,
        )
    from stages.cache_hidden.planning import make_plan  # brings transformers

    capped = from_hub and max_samples is None
    try:
        return make_plan(named, out, settings, HUB_SAMPLES if capped else max_samples, spare_disk=capped)
    except DataError:
        with contextlib.suppress(OSError):  # leave no empty folder behind
            out.rmdir()
        raise


def _check_same(held: Plan, corpus: str | None, out: Path, max_samples: int | None) -> None:
    """Refuse another corpus, or another part of it (`max_samples` None: all), than the plan was made from.

    Without a corpus (none named, and no bundled chats that may have changed) the plan's own is meant.
    """
    remedy = "pass the same, or another --out for a second cache"
    if max_samples != held.notes["max_samples"]:
        there, here = (f"max_samples = {cap or 'all'}" for cap in (held.notes["max_samples"], max_samples))
        raise UsageError(f"{out} was planned with {there}, this command asks for {here}; {remedy}")
    if corpus is None or corpus_unchanged(read_record(out), corpus):
        return
    files = corpus_files(corpus)
    wanted = file_sources(corpus, files) if files else [{"dataset": corpus}]
    planned = [{key: value for key, value in source.items() if key != "revision"} for source in held.sources]
    if planned != wanted:
        there, here = (", ".join(map(_source_text, sources)) for sources in (planned, wanted))
        raise UsageError(f"{out} was planned from {there}, this command names {here}; {remedy}")


def _source_text(source: dict) -> str:
    if "dataset" in source:
        return f"data set {source['dataset']}"
    return f"{source['file']} ({source['size']} bytes, xxh3 {source['xxh3'][:12]})"


def _announce(planned: Plan, settings: Settings, need: int, shards: int) -> None:
    names, share = ", ".join(spec.name for spec in settings.columns), planned.supervised / planned.tokens
    print(
        f"{planned.samples:,} samples, {planned.tokens:,} tokens ({share:.0%} supervised), {names}: "
        f"{size_text(need)} to write in {shards} shards",
        file=sys.stderr,
    )
    for line in left_out_lines(planned):
        print(line, file=sys.stderr)


def left_out_lines(planned: Plan) -> list[str]:
    """Return what planning left out or cut, a line for each reason: the count, and an example by file and line."""
    notes = planned.notes
    counts = {f"left out, {why}": (count, why) for why, count in notes["faults"].items()}
    counts["left out, too short"] = (notes["too_short"], "too short")
    counts["left out, duplicates"] = (planned.duplicates, None)
    counts["turns not supervised, since the template rewrites them"] = (notes["rewritten_turns"], "rewritten turns")
    counts["cut at max_length"] = (notes["truncated"], None)
    examples = {why: shown[0] for why, shown in notes["examples"].items()}
    return [
        f"{what}: {count:,}" + (f", such as {examples[why]}" if why in examples else "")
        for what, (count, why) in counts.items()
        if count
    ]


def summary(out: Path, planned: Plan, columns: tuple[ColumnSpec, ...], new_shards: int) -> Done:
    """Return what the manifests of the captured columns say together."""
    gauge, written, refused = Gauge(), 0, 0
    for shard in planned.shards:
        held = [manifest for spec in columns if (manifest := committed(out, shard.number, spec.name))]
        written += sum(fact["size"] for manifest in held for fact in manifest["files"].values())
        refused += len({row for manifest in held for row in manifest["refused"]})
        found = [manifest["facts"]["gauge"] for manifest in held if "gauge" in manifest["facts"]]
        gauge += Gauge.from_facts(found[-1]) if found else Gauge()
    shards = len(planned.shards)
    return Done(planned.samples, planned.tokens, shards, new_shards, written / 2**30, refused, gauge)


def _say(out: Path, done: Done) -> Done:
    """Print the line a capture ends with, and warn of a corpus in other words than the target's."""
    now = f"{done.new_shards} captured now" if done.new_shards else "nothing to do"
    left_out = f", {done.refused} refused" if done.refused else ""
    print(f"{out}: {done.samples:,} samples{left_out} in {done.shards} shards, {done.gib:.2f} GiB; {now}")
    if done.gauge.rows:
        print(f"on-policy gauge: {done.gauge}")
        if done.gauge.agree < WARN_BELOW * done.gauge.rows:
            print(
                f"warning: below {WARN_BELOW:.0%}, the corpus holds other words than the target's; "
                "a draft trained on it accepts less: let the target itself write the replies",
                file=sys.stderr,
            )
    return done
