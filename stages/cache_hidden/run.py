"""`pipeline plan` and `pipeline cache-hidden`: settle what is wanted, plan it once, capture what is missing.

Any number of workers may run the same command on one cache. Whoever comes first plans, and stores the target's files,
while the others wait; whoever commits the last shard writes what is derived from all of them.
A run with nothing to do says so within a second: torch, transformers and datasets are imported only to tokenise a new
corpus or to capture.
"""

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.atomic import check_free_space, clean_scratch, process_lock, size_text, write_errors
from pipeline.cache.columns import ColumnSpec, complete_manifest
from pipeline.cache.layout import IDENTITY
from pipeline.cache.manifest import create_identity
from pipeline.cache.plan import Plan, check_not_in_use, load_plan, plan_in_use, segment_numbers
from pipeline.cache.rebuild import rebuild_derived
from pipeline.cache.target_folder import has_target
from pipeline.corpus.sources import corpus_files, file_sources, source_roles
from pipeline.errors import DataError, UsageError
from pipeline.target.on_policy import Gauge
from pipeline.target.weights import check_weights_if_kept
from pipeline.visible_text import say, visible
from stages.cache_hidden.budget import chooser, is_planned, within_budget
from stages.cache_hidden.capture_log import corpus_unchanged, read_record, request_of, unchanged, write_record
from stages.cache_hidden.options import CaptureOptions
from stages.cache_hidden.plan_report import (
    Work,
    budget_steps,
    capture_command,
    missing,
    plan_report,
    plan_samples,
    plan_table,
    work_bytes,
)
from stages.cache_hidden.settings import HUB_CORPUS, HUB_SAMPLES, Settings, default_corpus, settle
from stages.cache_hidden.shard_assignment import Worker, find_worker

__all__ = ["Done", "plan", "plan_samples", "plan_table", "run"]


@dataclass(frozen=True)
class Done:
    """A capture, counted over the whole cache; `new_shards` over this run, `left` those still to come from others."""

    samples: int
    tokens: int
    shards: int
    new_shards: int
    left: int
    gib: float
    refused: int
    gauge: Gauge


def plan(model: str, corpus: str | None, out: Path, *, options: CaptureOptions, probe: bool = False) -> dict:
    """Tokenise the corpus into the plan of a cache at `out`, unless it is there, and return what it says.

    `probe` runs the target over a few micro-batches and writes to the disk, to say how long a capture takes. Raises
    UsageError (no such model or corpus, another identity or budget), DataError (unusable corpus), RoomError.
    """
    settings, planned = _planned(model, corpus, out, options)
    write_record(out, request_of(model, corpus, options), settings, corpus or default_corpus(settings.folder))
    report = plan_report(out, planned, settings)
    report["command"] = capture_command(model, corpus, out, options, settings)
    work = missing(out, planned, settings.columns)
    if probe and work:
        from stages.cache_hidden.time_estimate import measure  # brings torch and transformers

        report["time"] = measure(out, work, settings, Worker().device(options.device)).as_dict(work)
    return report


def run(model: str, corpus: str | None, out: Path, *, options: CaptureOptions) -> Done:
    """Capture what is missing of a cache at `out` and print one line. The same command goes on after any stop.

    Besides what `plan` raises: ProofError when the probe fails, CacheError for a damaged cache.
    """
    worker = find_worker(options.worker, os.environ)
    request, record = request_of(model, corpus, options), read_record(out)
    columns = unchanged(record, request)
    if columns and segment_numbers(out) and has_target(out):
        planned = load_plan(out)
        if not missing(out, planned, columns):
            with contextlib.suppress(OSError):  # on a disk that is read-only now it does no harm
                clean_scratch(out)  # what one left that was killed after its last commit
            rebuild_derived(out)
            return _say(out, summary(out, planned, columns, 0, 0), worker)
    settings, planned = _planned(model, corpus, out, options)
    work = missing(out, planned, settings.columns)
    if work:
        check_weights_if_kept(out, settings.folder)
    write_record(out, request, settings, corpus or default_corpus(settings.folder))
    clean_scratch(out)
    mine = worker.share(work)
    if mine or not has_target(out):
        check_free_space(out, f"a cache of {planned.samples:,} samples", work_bytes(work))
        _announce(planned, settings, mine, worker)
        from stages.cache_hidden.capture import capture_shards  # brings torch and transformers

        refused = summary(out, planned, settings.columns, 0, 0).refused
        with plan_in_use(out, planned):
            capture_shards(out, settings, planned, mine, worker.device(options.device), refused)
    left = len(missing(out, planned, settings.columns)) if work else 0
    if not left:
        rebuild_derived(out)
    return _say(out, summary(out, planned, settings.columns, len(mine), left), worker)


def _planned(model: str, corpus: str | None, out: Path, options: CaptureOptions) -> tuple[Settings, Plan]:
    """Return what is wanted and the cache's plan, in which the corpus is: now, or planned before by whoever it was."""
    if options.append and corpus is None:
        raise UsageError("--append adds a corpus; name it with --corpus")
    if options.append and not (out / IDENTITY).is_file():
        raise UsageError(f"--append adds to a cache, and there is none at {out}; leave it out to make one")
    settings = settle(model, out, within_budget(out, options))
    held = _held_plan(corpus, out, settings, options)
    if held is None:
        check_weights_if_kept(out, settings.folder)
        with write_errors(out, "a plan"):
            out.mkdir(parents=True, exist_ok=True)
        try:
            with write_errors(out, "a plan"), process_lock(out, "plan"):
                settings = settle(model, out, within_budget(out, options))  # we may have waited for who has planned
                held = _held_plan(corpus, out, settings, options) or _make_plan(corpus, out, settings, options)
            settings = settle(model, out, within_budget(out, options))  # with what the plan has decided
        except (DataError, UsageError):
            with contextlib.suppress(OSError):  # leave no empty folder behind
                out.rmdir()
            raise
    return settings, held


def _held_plan(corpus: str | None, out: Path, settings: Settings, options: CaptureOptions) -> Plan | None:
    """Return the cache's plan if the corpus is in it, None if it has to be planned.

    Raises UsageError for another identity, and for another corpus that nobody said to add.
    """
    if (out / IDENTITY).is_file():
        create_identity(out, settings.identity)
    if not segment_numbers(out) or not is_planned(out, options):
        return None
    held, named, max_samples = load_plan(out), corpus or default_corpus(settings.folder), options.max_samples
    from_hub = corpus is None and named == HUB_CORPUS  # nobody named it
    if from_hub and max_samples is None and any(part.get("dataset") == HUB_CORPUS for part in held.sources):
        max_samples = HUB_SAMPLES
    difference = _difference(held, None if from_hub else named, out, max_samples, options.roles)
    if difference and not options.append:
        raise UsageError(
            f"{out} was planned {difference}; pass the same, --append to add it to this cache, or another --out for a "
            "second one"
        )
    return None if difference else held


def _make_plan(corpus: str | None, out: Path, settings: Settings, options: CaptureOptions) -> Plan:
    """Tokenise the corpus into the cache's plan, or into one more segment of it."""
    from stages.cache_hidden.worker_pool import prepare

    prepare()
    named = corpus or default_corpus(settings.folder)
    from_hub = corpus is None and named == HUB_CORPUS
    if from_hub:
        print(
            f"warning: no --corpus given, so {HUB_CORPUS} is taken; its replies are not this target's own, "
            "and a draft learns the target's words: replies that the target wrote train a better one",
            file=sys.stderr,
        )
    from stages.cache_hidden.make_plan import make_plan  # brings transformers

    capped = from_hub and options.max_samples is None
    spare, budget = capped and options.budget is None, chooser(settings, options)
    if budget and segment_numbers(out):
        check_not_in_use(out)
        say(f"{visible(out)}: nothing of its plan is captured, so this budget makes another", err=True)
    before = load_plan(out).samples if options.append else 0
    most = HUB_SAMPLES if capped else options.max_samples
    plan = make_plan(named, out, settings, most, spare_disk=spare, budget=budget, roles=options.roles)
    if options.append:
        new = plan.samples - before
        told = f"{new:,} samples to the {before:,} there" if new else f"none, all are among the {before:,} there"
        say(visible(f"{named} adds {told}"), err=True)
    return plan


def _difference(held: Plan, corpus: str | None, out: Path, max_samples: int | None, roles: str | None) -> str:
    """Return how a corpus, or the part of it (`max_samples` None: all), differs from those planned; empty: it is one.

    Without a corpus (none named, and no bundled chats that may have changed) the plan's own is meant.
    """
    if corpus and corpus_unchanged(read_record(out), corpus, max_samples, roles):
        return ""
    files = corpus_files(corpus) if corpus else []
    wanted = file_sources(corpus, files, roles) if files else [{"dataset": corpus, **source_roles(roles)}]
    planned = [(_without_revision(manifest["sources"]), manifest) for manifest in held.manifests]
    caps = [manifest["notes"]["max_samples"] for sources, manifest in planned if not corpus or sources == wanted]
    if not caps:
        there = " and from ".join(", ".join(map(_source_text, sources)) for sources, _ in planned)
        return f"from {there}, this command names {', '.join(map(_source_text, wanted))}"
    if max_samples not in caps:
        there, here = (f"max_samples = {cap or 'all'}" for cap in (caps[-1], max_samples))
        return f"with {there}, this command asks for {here}"
    return ""


def _without_revision(sources: list[dict]) -> list[dict]:
    return [{key: value for key, value in source.items() if key != "revision"} for source in sources]


def _source_text(source: dict) -> str:
    roles = f", roles {source['roles']}" if "roles" in source else ""
    if "dataset" in source:
        return f"data set {source['dataset']}{roles}"
    return f"{source['file']} ({source['size']} bytes, xxh3 {source['xxh3'][:12]}{roles})"


def _announce(planned: Plan, settings: Settings, work: Work, worker: Worker) -> None:
    names, share = ", ".join(spec.name for spec in settings.columns), planned.supervised / planned.tokens
    who = f" by {worker}" if worker.count > 1 else ""
    print(
        f"{planned.samples:,} samples, {planned.tokens:,} tokens ({share:.0%} supervised), {names}: "
        f"{size_text(work_bytes(work))} to write in {len(work)} shards{who}",
        file=sys.stderr,
    )
    for line in [*budget_steps(planned), *left_out_lines(planned)]:
        say(visible(line), err=True)


def left_out_lines(planned: Plan) -> list[str]:
    """Return what planning left out or cut, a line for each reason: the count, and an example by file and line."""
    notes = planned.notes
    counts = {f"left out, {why}": (count, why) for why, count in notes["faults"].items()}
    counts["left out, too short"] = (notes["too_short"], "too short")
    counts["left out, duplicates"] = (planned.duplicates, None)
    if (notes.get("turns") or {}).get("chosen", "last") == "last":
        counts["turns that the template rewrites later, not supervised"] = (notes["rewritten_turns"], None)
    for why, count in notes.get("unproven_turns", {}).items():
        counts[f"turns not supervised, {why}"] = (count, why)
    counts["cut at max_length"] = (notes["truncated"], None)
    examples = {why: shown[0] for why, shown in notes["examples"].items()}
    return [
        f"{what}: {count:,}" + (f", such as {examples[why]}" if why in examples else "")
        for what, (count, why) in counts.items()
        if count
    ]


def summary(out: Path, planned: Plan, columns: tuple[ColumnSpec, ...], new_shards: int, left: int) -> Done:
    """Return what the manifests of the captured columns say together."""
    gauge, written, refused = Gauge(), 0, 0
    for shard in planned.shards:
        held = [manifest for spec in columns if (manifest := complete_manifest(out, shard.number, spec.name))]
        written += sum(fact["size"] for manifest in held for fact in manifest["files"].values())
        refused += len({row for manifest in held for row in manifest["refused"]})
        found = [manifest["facts"]["gauge"] for manifest in held if "gauge" in manifest["facts"]]
        gauge += Gauge.from_facts(found[-1]) if found else Gauge()
    shards = len(planned.shards)
    return Done(planned.samples, planned.tokens, shards, new_shards, left, written / 2**30, refused, gauge)


def _say(out: Path, done: Done, worker: Worker) -> Done:
    """Print the line a capture ends with, and warn of a corpus in other words than the target's."""
    now = f"{done.new_shards} captured now" if done.new_shards else "nothing to do"
    who = f" by {worker}" if worker.count > 1 else ""
    left = f", {done.left} left to the other workers" if done.left else ""
    left_out = f", {done.refused} refused" if done.refused else ""
    where = visible(out)
    say(f"{where}: {done.samples:,} samples{left_out} in {done.shards} shards, {done.gib:.2f} GiB; {now}{who}{left}")
    if done.gauge.rows:
        print(f"on-policy gauge: {done.gauge}")
        if done.gauge.warning:
            print(done.gauge.warning, file=sys.stderr)
    return done
