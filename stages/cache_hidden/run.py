"""`pipeline plan` and `pipeline cache-hidden`: resolve the settings, plan the corpus once, capture what is missing.

Any number of workers may run the same command on one cache. The first one plans and stores the target's files while
the others wait; the one that commits the last shard writes the index and all else that is derived from the shards.
A run with nothing to do ends within a second: torch, transformers and datasets are imported only to tokenise a new
corpus or to capture.
"""

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cache.atomic import check_free_space, clean_scratch, process_lock, size_text, write_errors
from pipeline.cache.catalog import Catalog, Work, has_target
from pipeline.cache.disk_speed import write_speed
from pipeline.cache.file_writer import create_identity, rebuild_derived
from pipeline.cache.plan import Plan
from pipeline.cache.plan_writer import check_not_in_use, plan_in_use
from pipeline.cache.schema import ColumnSpec, read_log
from pipeline.corpus.rejections import left_out_lines
from pipeline.corpus.sources import corpus_files, file_sources, source_roles
from pipeline.errors import DataError, UsageError
from pipeline.target.on_policy import OnPolicyStats
from pipeline.target.weights import check_weights_if_recorded
from pipeline.visible_text import print_visible, visible
from stages.cache_hidden.budget import plan_matches_budget, sample_chooser, within_budget
from stages.cache_hidden.capture_log import (
    corpus_unchanged,
    request_of,
    unchanged_columns,
    write_record,
)
from stages.cache_hidden.device_memory import memory_report
from stages.cache_hidden.engine_options import HUGGING_FACE, IN_PROCESSES, shares_itself
from stages.cache_hidden.make_plan import make_plan, missing_columns
from stages.cache_hidden.plan_report import (
    budget_steps,
    capture_command,
    plan_report,
    plan_samples,
    plan_table,
    work_bytes,
)
from stages.cache_hidden.settings import (
    HUB_CORPUS,
    HUB_SAMPLES,
    CaptureOptions,
    CaptureSettings,
    default_corpus,
    resolve_settings,
)
from stages.cache_hidden.shard_assignment import Worker, find_worker
from stages.cache_hidden.states_folder import clean_states
from stages.cache_hidden.worker_pool import start_fork_server

if TYPE_CHECKING:
    from stages.cache_hidden.tensor_parallel import Group

__all__ = ["CaptureSummary", "plan", "plan_samples", "plan_table", "run"]


@dataclass(frozen=True)
class CaptureSummary:
    """Counts over the whole cache; `new_shards`: captured by this run, `left`: still to come from other workers."""

    samples: int
    tokens: int
    shards: int
    new_shards: int
    left: int
    gib: float
    refused: int
    on_policy: OnPolicyStats


def plan(
    model: str,
    corpus: str | None,
    out: Path,
    *,
    options: CaptureOptions,
    probe: bool = False,
    device_bytes: int | None = None,
) -> dict:
    """Write the plan of a cache at `out`, unless it exists, and return its report (see `plan_report`).

    `probe` measures target and disk on a few micro-batches, to estimate how long a capture takes. device_bytes: of the
    device that is to capture, to say whether it can. Raises UsageError (no such model or corpus, another identity or
    budget), DataError (unusable corpus), RoomError.
    """
    catalog = Catalog(out)
    settings = _settings_of_plan(model, corpus, catalog, options)
    write_record(out, request_of(model, corpus, options), settings, corpus or default_corpus(settings.folder))
    report = plan_report(catalog, settings)
    report["memory"] = memory_report(settings, catalog.plan, device_bytes)
    report["command"] = capture_command(model, corpus, out, options, settings)
    work = missing_columns(catalog, settings.columns)
    if probe and work:
        settings.engine.check()
        from stages.cache_hidden.capture import Speed, target_speed  # brings torch and transformers

        speed = Speed(write_speed(out), target_speed(work, settings, Worker().device(options.device)))
        report["time"] = speed.as_dict(work)
    return report


def run(model: str, corpus: str | None, out: Path, *, options: CaptureOptions) -> CaptureSummary | None:
    """Capture what is missing of a cache at `out` and print a summary. After any stop, the same command continues.

    Returns None on a rank that only holds its part of the target for another (`--tensor-parallel`).
    Besides what `plan` raises: ProofError when the probe fails, CacheError for a damaged cache.
    """
    worker = find_worker(options.worker, os.environ, options.tensor_parallel)
    if worker.ranks == 1:
        return _capture(model, corpus, out, options, worker, None)
    from stages.cache_hidden.tensor_parallel import Group  # brings torch and transformers

    with Group(worker, model, options.revision, worker.device(options.device)) as group:
        if not group.leads:
            return group.follow()
        group.check()
        return _capture(model, corpus, out, options, worker, group)


def _capture(
    model: str, corpus: str | None, out: Path, options: CaptureOptions, worker: Worker, group: "Group | None"
) -> CaptureSummary:
    """Capture a worker's share; `group`: its ranks, which this one leads."""
    device_map = options.checked_device_map(os.environ)
    catalog = Catalog(out)
    if catalog.exists and catalog.identity.capture.engine in IN_PROCESSES:
        clean_states()
    request, record = request_of(model, corpus, options), read_log(out)
    columns = unchanged_columns(record, request)
    if columns and catalog.planned and has_target(catalog) and catalog.plan and not missing_columns(catalog, columns):
        with contextlib.suppress(OSError):  # the disk may be read-only by now
            clean_scratch(out)  # temporary files of a run that was killed after its last commit
        rebuild_derived(catalog)
        return _print_summary(out, summarise(catalog, columns, 0, 0), worker)
    settings = _settings_of_plan(model, corpus, catalog, options)
    if group is not None and settings.engine.name != HUGGING_FACE:
        raise UsageError(shares_itself(settings.engine.name, worker.ranks))
    work, planned = missing_columns(catalog, settings.columns), catalog.plan
    if work:
        check_weights_if_recorded(catalog, settings.folder)
    write_record(out, request, settings, corpus or default_corpus(settings.folder))
    clean_scratch(out)
    mine = worker.share(work)
    if mine or not has_target(catalog):
        check_free_space(out, f"a cache of {planned.samples:,} samples", work_bytes(work))
        _announce(planned, settings, mine, worker)
        from stages.cache_hidden.capture import capture_shards  # brings torch and transformers

        refused = summarise(catalog, settings.columns, 0, 0).refused
        settings.engine.check()
        with plan_in_use(planned):
            device = worker.device(options.device)
            capture_shards(catalog, settings, mine, device, refused, device_map=device_map, group=group)
        catalog.refresh()  # with what other workers have committed
    left = len(missing_columns(catalog, settings.columns)) if work else 0
    if not left:
        rebuild_derived(catalog)
    return _print_summary(out, summarise(catalog, settings.columns, len(mine), left), worker)


def _settings_of_plan(model: str, corpus: str | None, catalog: Catalog, options: CaptureOptions) -> CaptureSettings:
    """Return the settings; the cache's plan then has the corpus in it, made now unless this or another run made it."""
    out = catalog.path
    if options.append and corpus is None:
        raise UsageError("--append adds a corpus; name it with --corpus")
    if options.append and not catalog.exists:
        raise UsageError(f"--append adds to a cache, and there is none at {out}; leave it out to make one")
    settings = resolve_settings(model, catalog, within_budget(catalog, options))
    if not _is_planned(corpus, catalog, settings, options):
        check_weights_if_recorded(catalog, settings.folder)
        with write_errors(out, "a plan"):
            out.mkdir(parents=True, exist_ok=True)
        try:
            with write_errors(out, "a plan"), process_lock(out, "plan"):
                catalog.refresh()  # another run may have planned while this one waited
                settings = resolve_settings(model, catalog, within_budget(catalog, options))
                if not _is_planned(corpus, catalog, settings, options):
                    _make_plan(corpus, catalog, settings, options)
            catalog.refresh()
            settings = resolve_settings(model, catalog, within_budget(catalog, options))  # as the plan has decided
        except (DataError, UsageError):
            with contextlib.suppress(OSError):  # leave no empty folder behind
                out.rmdir()
            raise
    return settings


def _is_planned(corpus: str | None, catalog: Catalog, settings: CaptureSettings, options: CaptureOptions) -> bool:
    """Return whether the corpus is in the cache's plan.

    Raises UsageError for another identity, and for another corpus without --append.
    """
    if catalog.exists:
        create_identity(catalog.path, settings.identity.as_dict())
    if not catalog.planned or not plan_matches_budget(catalog, options):
        return False
    existing, name, max_samples = catalog.plan, corpus or default_corpus(settings.folder), options.max_samples
    from_hub = corpus is None and name == HUB_CORPUS  # by default
    if from_hub and max_samples is None and any(part.get("dataset") == HUB_CORPUS for part in existing.sources):
        max_samples = HUB_SAMPLES
    difference = _corpus_difference(existing, None if from_hub else name, max_samples, options.roles)
    if difference and not options.append:
        raise UsageError(
            f"{catalog.path} was planned {difference}; pass the same, --append to add it to this cache, or another "
            "--out for a second one"
        )
    return not difference


def _make_plan(corpus: str | None, catalog: Catalog, settings: CaptureSettings, options: CaptureOptions) -> None:
    """Tokenise the corpus into the cache's plan, or into one more segment of it."""
    start_fork_server()
    out, name = catalog.path, corpus or default_corpus(settings.folder)
    from_hub = corpus is None and name == HUB_CORPUS
    if from_hub:
        print(
            f"warning: no --corpus given, so {HUB_CORPUS} is taken; its replies are not this target's own, "
            "and a draft learns the target's words: replies that the target wrote train a better one",
            file=sys.stderr,
        )
    capped = from_hub and options.max_samples is None
    spare_disk, budget = capped and options.budget is None, sample_chooser(settings, options)
    if budget and catalog.planned:
        check_not_in_use(out)
        print_visible(f"{visible(out)}: nothing of its plan is captured, so this budget makes another", err=True)
    before = catalog.plan.samples if options.append else 0
    limit = HUB_SAMPLES if capped else options.max_samples
    plan = make_plan(name, out, settings, limit, spare_disk=spare_disk, budget=budget, roles=options.roles)
    if options.append:
        new = plan.samples - before
        added = f"{new:,} samples to the {before:,} there" if new else f"none, all are among the {before:,} there"
        print_visible(visible(f"{name} adds {added}"), err=True)


def _corpus_difference(existing: Plan, corpus: str | None, max_samples: int | None, roles: str | None) -> str:
    """Return how a corpus, cut at `max_samples` (None: all), differs from those planned; empty where it is among them.

    corpus None (none named, and no bundled chats that may have changed): the plan's own, so only the cut may differ.
    """
    if corpus and corpus_unchanged(read_log(existing.path), corpus, max_samples, roles):
        return ""
    files = corpus_files(corpus) if corpus else []
    wanted = file_sources(corpus, files, roles) if files else [{"dataset": corpus, **source_roles(roles)}]
    planned = [(_without_revision(manifest.sources), manifest) for manifest in existing.manifests]
    caps = [manifest.notes["max_samples"] for sources, manifest in planned if not corpus or sources == wanted]
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


def _announce(planned: Plan, settings: CaptureSettings, work: Work, worker: Worker) -> None:
    names, share = ", ".join(spec.name for spec in settings.columns), planned.supervised / planned.tokens
    who = f" by {worker}" if worker.count > 1 else ""
    print(
        f"{planned.samples:,} samples, {planned.tokens:,} tokens ({share:.0%} supervised), {names}: "
        f"{size_text(work_bytes(work))} to write in {len(work)} shards{who}",
        file=sys.stderr,
    )
    for line in [*budget_steps(planned), *left_out_lines(planned.notes, planned.duplicates)]:
        print_visible(visible(line), err=True)


def summarise(catalog: Catalog, columns: tuple[ColumnSpec, ...], new_shards: int, left: int) -> CaptureSummary:
    """Sum the manifests of the captured columns."""
    on_policy, written, refused = OnPolicyStats(), 0, 0
    for shard in range(catalog.shards):
        manifests = [manifest for spec in columns if (manifest := catalog.captured(shard, spec.name))]
        written += sum(fact.size for manifest in manifests for fact in manifest.files.values())
        refused += len({row for manifest in manifests for row in manifest.refused})
        stats = [manifest.facts.gauge for manifest in manifests if manifest.facts.gauge]
        on_policy += OnPolicyStats.from_facts(stats[-1]) if stats else OnPolicyStats()
    planned, gib = catalog.plan, written / 2**30
    return CaptureSummary(planned.samples, planned.tokens, catalog.shards, new_shards, left, gib, refused, on_policy)


def _print_summary(out: Path, done: CaptureSummary, worker: Worker) -> CaptureSummary:
    """Print a capture's last line and its on-policy figures, with a warning for an off-policy corpus; return `done`."""
    now = f"{done.new_shards} captured now" if done.new_shards else "nothing to do"
    who = f" by {worker}" if worker.count > 1 else ""
    left = f", {done.left} left to the other workers" if done.left else ""
    left_out = f", {done.refused} refused" if done.refused else ""
    where = visible(out)
    print_visible(
        f"{where}: {done.samples:,} samples{left_out} in {done.shards} shards, {done.gib:.2f} GiB; {now}{who}{left}"
    )
    done.on_policy.report()
    return done
