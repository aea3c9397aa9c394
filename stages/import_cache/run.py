"""`pipeline import-cache`: another trainer's cache as one of ours, proven against the target by value.

Two passes over the files: one for tokens and masks, which fixes the plan, and one for the states, shard by shard. What
no file says is asked for, or found out by computing a few samples again; what was found stands in cache.json. Stop it
whenever you like: the same command goes on with the shards that are missing, and the bytes come out the same.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.atomic import check_free_space, clean_scratch, size_text
from pipeline.cache.codecs import stored_bytes
from pipeline.cache.columns import ColumnSpec, complete_manifest
from pipeline.cache.layout import IDENTITY, LOG
from pipeline.cache.manifest import create_identity, read_canonical, write_canonical
from pipeline.cache.plan import Plan, plan_in_use
from pipeline.cache.rebuild import rebuild_derived
from pipeline.cache.samples import ShardPlan
from pipeline.cache.target_folder import HEAD, has_target, target_file
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
from stages.import_cache.convert import Import, applied, fill, on_policy_stats, proven
from stages.import_cache.foreign_sample import STORED
from stages.import_cache.forms import find_source
from stages.import_cache.layer_conventions import Said, settled
from stages.import_cache.plan_samples import held_plan, make_plan
from stages.import_cache.target import Target

REFUSED_SHARE = 0.01  # of the samples; more means that something is wrong with all of them
EVERY_S = 5.0  # between lines of progress

Work = list[tuple[ShardPlan, list[ColumnSpec]]]


@dataclass(frozen=True)
class Done:
    """An import, counted over the whole cache; `new_shards` over this run."""

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
    """Import the cache in `folder` into one of ours at `out`, and print what was found and done.

    Raises UsageError (no such cache or target, something left open), DataError (a file that is damaged or hostile, too
    many unusable samples), ProofError (states that are not this target's, in no way), RoomError.
    """
    target = Target(target_folder(model, folder, unproven), device, not unproven)
    said = Said(parse_layers(layers), count_from, last)
    config = text_config(target.folder)
    source = find_source(folder, said.layers, config["hidden_size"], masks)
    work = settled(source, out, said, target)
    check_layers(work.way.layers(work.named), config["num_hidden_layers"])
    identity = identity_of(target, model, work, out)
    if (out / IDENTITY).is_file():
        create_identity(out, identity)
    planned = held_plan(out, source) or make_plan(out, work, identity, config["vocab_size"])
    missing = left(out, planned, work)
    if missing or not has_target(out):
        check_weights_if_recorded(out, target.folder)
        clean_scratch(out)
        write_record(out, identity, target)
        check_free_space(out, f"an import of {planned.samples:,} samples", bytes_of(missing))
        with plan_in_use(out, planned):
            convert(out, planned, work, missing, target)
    rebuild_derived(out)
    return summary(out, planned, work, len(missing), target)


def target_folder(model: str | None, folder: Path, unproven: bool) -> Path:
    """Return where the target's files are. UsageError where they are missing, or nothing was said of the proof."""
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
    """Return the layers of a list such as "1,9,17". UsageError when it is none."""
    if layers is None:
        return None
    try:
        return tuple(int(layer) for layer in layers.split(","))
    except ValueError:
        raise UsageError(f"--layers {layers}: no list of layers; write it like 1,9,17") from None


def identity_of(target: Target, model: str | None, work: Import, out: Path) -> dict:
    """Return cache.json: of a capture's entries those that an import has, and how its files were read."""
    digest = target_digest(target.folder)
    held = read_canonical(out / IDENTITY).get("target", {}) if (out / IDENTITY).is_file() else {}
    revision = target.folder.name if target.folder.parent.name == "snapshots" else ""
    name = {"name": target_name(model or str(target.folder)), "revision": revision, "digest": digest}
    imported = {
        "form": work.source.form,
        "layers": list(work.named),
        "count_from": work.way.count_from,
        "last": work.way.last,
        "proven": target.proven,
    }
    return {
        "target": held if held.get("digest") == digest else name,  # a folder that was only moved keeps its name
        "tokenizer": {"digest": tokenizer_digest(target.folder), "chat_template": template_digest(target.folder)},
        "samples": {"max_length": None, "mask": "imported", "trimmed": True},
        "capture": {"engine": "imported", "dtype": STORED[work.dtype], "imported": imported},
    }


def write_record(out: Path, identity: dict, target: Target) -> None:
    """Note where the target is, which `evaluate` asks for, and the identity, should cache.json be lost."""
    with contextlib.suppress(RoomError):
        write_canonical(out / LOG, {"identity": identity, "target": {"folder": str(target.folder.resolve())}})


def left(out: Path, planned: Plan, work: Import) -> Work:
    """Return the shards, and of each the columns, that are still to be written."""
    found = [
        (shard, [spec for spec in work.columns if complete_manifest(out, shard.number, spec.name) is None])
        for shard in planned.shards
    ]
    return [(shard, columns) for shard, columns in found if columns]


def bytes_of(missing: Work) -> int:
    return sum(
        stored_bytes(int(spec.bounds(shard)[-1]), spec.width, spec.dtype, spec.codec)
        for shard, columns in missing
        for spec in columns
    )


def convert(out: Path, planned: Plan, work: Import, missing: Work, target: Target) -> None:
    """Write what the cache keeps of the target, and every missing column; each exists once it is proven."""
    target.store(out)
    head = TargetHead.load(target_file(out, HEAD), *target.kind)
    norm = applied(target) if work.way.last == "raw" else None
    facts = {"engine": f"imported from {work.source.form}", "proven": target.proven}
    total, refused, said = bytes_of(missing), sum(map(len, refused_by_shard(out, planned, work))), time.monotonic()
    for number, (shard, wanted) in enumerate(missing):
        with ShardWriter(out, shard, wanted) as writer:
            reasons = fill(writer, work, {spec.name for spec in wanted}, norm)
            refused += len(reasons)
            check_refused(refused, planned.samples, reasons)
            writer.seal()
            made = {spec.name: dict(facts) for spec in wanted}
            if target.proven:
                for name, found in proven(writer, work, wanted, target, head).items():
                    made[name]["probe"] = found
            if "final" in made:
                share = on_policy_share(planned.segment(shard.number)["supervised"])
                made["final"]["gauge"] = on_policy_stats(writer, head, share).as_facts()
            writer.commit(made)
        if time.monotonic() > said + EVERY_S:
            said = time.monotonic()
            print(f"{number + 1} of {len(missing)} shards of {size_text(total)} imported", file=sys.stderr)


def refused_by_shard(out: Path, planned: Plan, work: Import) -> Iterator[dict]:
    """Yield the refused samples of every shard that is there; one that is refused is so in every column."""
    for shard in planned.shards:
        held = complete_manifest(out, shard.number, work.columns[-1].name)
        yield held["refused"] if held else {}


def check_refused(refused: int, samples: int, reasons: dict[int, str]) -> None:
    """Name every sample refused; stop when there are more than bad luck explains."""
    for reason in reasons.values():
        say(visible(f"left out: {reason}"), err=True)
    if refused > max(1, REFUSED_SHARE * samples):
        raise DataError(
            f"{refused} of {samples} samples hold states that cannot be kept, {next(reversed(reasons.values()))} for "
            "one; make these files again and import into a fresh --out"
        )


def summary(out: Path, planned: Plan, work: Import, new: int, target: Target) -> Done:
    """Print what the cache holds now, what was left out, and what to do next."""
    on_policy, refused = OnPolicyStats(), sum(map(len, refused_by_shard(out, planned, work)))
    for shard in planned.shards:
        facts = complete_manifest(out, shard.number, work.columns[-1].name)["facts"]
        on_policy += OnPolicyStats.from_facts(facts["gauge"]) if "gauge" in facts else OnPolicyStats()
    now = f"{new} shards imported now" if new else "nothing to do"
    held = f"{planned.samples:,} samples" + (f", {refused} refused" if refused else "")
    say(visible(f"{out}: {held} in {len(planned.shards)} shards, from {work.source.form}; {now}"))
    for line in left_out(planned):
        say(visible(line), err=True)
    if on_policy.rows:
        print(f"on-policy gauge: {on_policy}")
        if on_policy.warning:
            print(on_policy.warning, file=sys.stderr)
    if not target.proven:
        print("unproven: no state was compared with the target; an accept length of 1 would show the mistake late")
    say(visible(f"next: pipeline train-draft --cache {out}"))
    return Done(planned.samples, planned.tokens, len(planned.shards), new, refused, on_policy)


def left_out(planned: Plan) -> Iterator[str]:
    """Yield what planning left out, a line for each reason: the count, and an example by file."""
    notes = planned.notes
    for why, count in {**notes["faults"], "too short": notes["too_short"], "duplicates": planned.duplicates}.items():
        if count:
            shown = f", such as {notes['examples'][why][0]}" if why in notes["examples"] else ""
            yield f"left out, {why}: {count:,}{shown}"
