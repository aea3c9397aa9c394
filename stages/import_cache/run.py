"""`pipeline import-cache`: convert another trainer's cache into one of ours, proven against the target by value.

Two passes over the files: one for tokens and masks, which makes the plan, and one for the states, shard by shard. What
no file states is an option, or found by computing a few samples again, and recorded in cache.json. After any stop the
same command goes on with the missing shards, and gives the same bytes.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.atomic import check_free_space, clean_scratch, size_text
from pipeline.cache.catalog import Catalog, Work
from pipeline.cache.codecs import CODECS
from pipeline.cache.layout import LOG
from pipeline.cache.manifest import create_identity, write_canonical
from pipeline.cache.plan import Plan, plan_in_use
from pipeline.cache.rebuild import rebuild_derived
from pipeline.cache.target_files import HEAD, has_target, target_file
from pipeline.cache.writer import ShardWriter
from pipeline.errors import DataError, RoomError, UsageError
from pipeline.target.files import (
    CONFIG,
    find_target,
    target_digest,
    target_name,
    template_digest,
    text_config,
    tokenizer_digest,
)
from pipeline.target.head import TargetHead
from pipeline.target.layers import check_layers
from pipeline.target.on_policy import OnPolicyStats, on_policy_share
from pipeline.target.weights import check_weights_if_recorded
from pipeline.visible_text import say, visible
from stages.import_cache.convert import ImportJob, norm_function, on_policy_stats, probe_shard, write_columns
from stages.import_cache.detect_format import find_source
from stages.import_cache.foreign_sample import STORED_DTYPE
from stages.import_cache.layer_conventions import RequestedConvention, make_import_job
from stages.import_cache.plan_samples import is_planned, make_plan
from stages.import_cache.target import Target

MAX_REFUSED_SHARE = 0.01  # of the samples; more means that all of them are suspect
EVERY_S = 5.0  # between lines of progress


@dataclass(frozen=True)
class Done:
    """Totals of an import over the whole cache; `new_shards` counts this run only."""

    samples: int
    tokens: int
    shards: int
    new_shards: int
    refused: int
    on_policy: OnPolicyStats


def run(
    folder: Path,
    out: Path,
    *,
    model: str | None = None,
    layers: str | None = None,
    count_from: int | None = None,
    last: str | None = None,
    masks: Path | None = None,
    unproven: bool = False,
    device: str | None = None,
) -> Done:
    """Import the cache in `folder` into a cache at `out`, and print the convention found and the totals.

    Raises UsageError (no such cache or target, a missing option), DataError (a damaged or hostile file, too many
    unusable samples), ProofError (states that are not this target's by any convention), RoomError.
    """
    target = Target(target_folder(model, folder, unproven), device, not unproven)
    requested = RequestedConvention(parse_layers(layers), count_from, last)
    config = text_config(target.folder)
    source = find_source(folder, requested.layers, config["hidden_size"], masks)
    catalog = Catalog(out)
    job = make_import_job(source, catalog, requested, target)
    check_layers(job.convention.layers(job.named_layers), config["num_hidden_layers"])
    identity = identity_of(target, model, job, catalog)
    if catalog.exists:
        create_identity(out, identity)
    if not is_planned(catalog, source):
        make_plan(catalog, job, identity, config["vocab_size"])
    planned, missing = catalog.plan, catalog.missing(job.columns)
    if missing or not has_target(catalog):
        check_weights_if_recorded(catalog, target.folder)
        clean_scratch(out)
        write_record(out, identity, target)
        check_free_space(out, f"an import of {planned.samples:,} samples", total_bytes(missing))
        with plan_in_use(planned):
            convert(catalog, job, missing, target)
        catalog.refresh()
    rebuild_derived(catalog)
    return summary(catalog, job, len(missing), target)


def target_folder(model: str | None, folder: Path, unproven: bool) -> Path:
    """Return the folder of the target's files. UsageError without them, or with neither --model nor --unproven."""
    if model is None and not unproven:
        raise UsageError(
            "nothing proves these states without the target; name its folder with --model, or say --unproven, and with "
            "it --layers, --count-from and --last as far as the files do not say them"
        )
    if model is not None:
        return find_target(model)
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder}: holds no {CONFIG}, tokenizer and weights with the target's embedding and LM head, which "
            "training needs; name with --model a folder that does (its other weights are not read with --unproven)"
        )
    return folder


def parse_layers(layers: str | None) -> tuple[int, ...] | None:
    """Parse a list of layers such as "1,9,17". UsageError when it is none."""
    if layers is None:
        return None
    try:
        return tuple(int(layer) for layer in layers.split(","))
    except ValueError:
        raise UsageError(f"--layers {layers}: no list of layers; write it like 1,9,17") from None


def identity_of(target: Target, model: str | None, job: ImportJob, catalog: Catalog) -> dict:
    """Return the content of cache.json: as a capture's, with the source's form and convention."""
    digest = target_digest(target.folder)
    recorded = catalog.identity.target.as_dict() if catalog.exists else {}
    revision = target.folder.name if target.folder.parent.name == "snapshots" else ""
    name = {"name": target_name(model or str(target.folder)), "revision": revision, "digest": digest}
    imported = {
        "form": job.source.form,
        "layers": list(job.named_layers),
        "count_from": job.convention.count_from,
        "last": job.convention.last,
        "proven": target.proven,
    }
    return {
        "target": recorded if recorded.get("digest") == digest else name,  # a folder that was only moved keeps its name
        "tokenizer": {"digest": tokenizer_digest(target.folder), "chat_template": template_digest(target.folder)},
        "samples": {"max_length": None, "mask": "imported", "trimmed": True},
        "capture": {"engine": "imported", "dtype": STORED_DTYPE[job.dtype], "imported": imported},
    }


def write_record(out: Path, identity: dict, target: Target) -> None:
    """Record the target's folder, for `evaluate`, and the identity, in case cache.json is lost."""
    with contextlib.suppress(RoomError):
        write_canonical(out / LOG, {"identity": identity, "target": {"folder": str(target.folder.resolve())}})


def total_bytes(missing: Work) -> int:
    return sum(
        CODECS[spec.codec].stored_bytes(int(spec.bounds(shard)[-1]), spec.width, spec.dtype)
        for shard, columns in missing
        for spec in columns
    )


def convert(catalog: Catalog, job: ImportJob, missing: Work, target: Target) -> None:
    """Write the cache's copy of the target, and every missing column; each is committed once it is proven."""
    target.store(catalog)
    planned, head = catalog.plan, TargetHead.load(target_file(catalog, HEAD), *target.device_and_dtype)
    norm = norm_function(target) if job.convention.last == "raw" else None
    facts = {"engine": f"imported from {job.source.form}", "proven": target.proven}
    total, refused, reported_at = (
        total_bytes(missing),
        sum(map(len, refused_by_shard(catalog, job))),
        time.monotonic(),
    )
    for number, (shard, wanted) in enumerate(missing):
        with ShardWriter(catalog, shard, wanted) as writer:
            reasons = write_columns(writer, job, {spec.name for spec in wanted}, norm)
            refused += len(reasons)
            check_refused(refused, planned.samples, reasons)
            writer.seal()
            made = {spec.name: dict(facts) for spec in wanted}
            if target.proven:
                for name, result in probe_shard(writer, job, wanted, target, head).items():
                    made[name]["probe"] = result
            if "final" in made:
                share = on_policy_share(planned.segment(shard.number).supervised)
                made["final"]["gauge"] = on_policy_stats(writer, head, share).as_facts()
            writer.commit(made)
        if time.monotonic() > reported_at + EVERY_S:
            reported_at = time.monotonic()
            print(f"{number + 1} of {len(missing)} shards of {size_text(total)} imported", file=sys.stderr)


def refused_by_shard(catalog: Catalog, job: ImportJob) -> Iterator[dict]:
    """Yield the refused samples of every written shard. A refused sample is refused in all columns."""
    for shard in range(catalog.shards):
        manifest = catalog.captured(shard, job.columns[-1].name)
        yield manifest.refused if manifest else {}


def check_refused(refused: int, samples: int, reasons: dict[int, str]) -> None:
    """Print every refused sample; DataError when they are more than MAX_REFUSED_SHARE of all, and more than one."""
    for reason in reasons.values():
        say(visible(f"left out: {reason}"), err=True)
    if refused > max(1, MAX_REFUSED_SHARE * samples):
        raise DataError(
            f"{refused} of {samples} samples hold states that cannot be kept, {next(reversed(reasons.values()))} for "
            "one; make these files again and import into a fresh --out"
        )


def summary(catalog: Catalog, job: ImportJob, new: int, target: Target) -> Done:
    """Print the cache's totals, the samples left out, and the next command."""
    out, planned = catalog.path, catalog.plan
    on_policy, refused = OnPolicyStats(), sum(map(len, refused_by_shard(catalog, job)))
    for shard in range(catalog.shards):
        gauge = catalog.captured(shard, job.columns[-1].name).facts.gauge
        on_policy += OnPolicyStats.from_facts(gauge) if gauge else OnPolicyStats()
    now = f"{new} shards imported now" if new else "nothing to do"
    content = f"{planned.samples:,} samples" + (f", {refused} refused" if refused else "")
    say(visible(f"{out}: {content} in {catalog.shards} shards, from {job.source.form}; {now}"))
    for line in left_out(planned):
        say(visible(line), err=True)
    if on_policy.rows:
        print(f"on-policy gauge: {on_policy}")
        if on_policy.warning:
            print(on_policy.warning, file=sys.stderr)
    if not target.proven:
        print("unproven: no state was compared with the target; an accept length of 1 would show the mistake late")
    say(visible(f"next: pipeline train-draft --cache {out}"))
    return Done(planned.samples, planned.tokens, catalog.shards, new, refused, on_policy)


def left_out(planned: Plan) -> Iterator[str]:
    """Yield a line for each reason why planning left samples out: their count, and an example."""
    notes = planned.notes
    for why, count in {**notes["faults"], "too short": notes["too_short"], "duplicates": planned.duplicates}.items():
        if count:
            shown = f", such as {notes['examples'][why][0]}" if why in notes["examples"] else ""
            yield f"left out, {why}: {count:,}{shown}"
