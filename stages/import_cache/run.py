"""`pipeline import-cache`: convert another trainer's cache into one of ours, proven against the target by value.

Two passes over the files: one for tokens and masks, which makes the plan, and one for the states, shard by shard. What
no file states is an option, or found by computing a few samples again, and recorded in cache.json. After any stop the
same command goes on with the missing shards, and gives the same bytes.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.atomic import check_free_space, clean_scratch
from pipeline.cache.catalog import Catalog, has_target
from pipeline.cache.file_writer import create_identity, rebuild_derived
from pipeline.cache.layout import LOG
from pipeline.cache.manifest import write_canonical
from pipeline.cache.plan_writer import plan_in_use
from pipeline.cache.schema import TargetName
from pipeline.corpus.rejections import left_out_lines
from pipeline.errors import RoomError, UsageError
from pipeline.target.files import CONFIG, find_target, read_text_config, template_digest, tokenizer_digest
from pipeline.target.layers import check_layers
from pipeline.target.on_policy import OnPolicyStats
from pipeline.target.weights import check_weights_if_recorded, named_target
from pipeline.visible_text import print_visible, visible
from stages.import_cache.conventions import choose_convention
from stages.import_cache.convert import ImportJob, convert, is_planned, make_plan, refused_by_shard, total_bytes
from stages.import_cache.foreign_sample import STORED_DTYPE, PartialConvention, Source
from stages.import_cache.target import Target
from stages.import_cache.trainer_formats import INDEX, NAME, SUFFIX, DeepSpec, SpecForge, Speculators

WANTED = "SpecForge's *.ckpt, speculators' hs_<i>.safetensors, or DeepSpec's manifest.json and samples.idx"


@dataclass(frozen=True)
class ImportSummary:
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
) -> ImportSummary:
    """Import the cache in `folder` into a cache at `out`, and print the convention found and the totals.

    Raises UsageError (no such cache or target, a missing option), DataError (a damaged or hostile file, too many
    unusable samples), ProofError (states that are not this target's by any convention), RoomError.
    """
    target = Target(target_folder(model, folder, unproven), device, not unproven)
    requested = PartialConvention(parse_layers(layers), count_from, last)
    config, catalog = read_text_config(target.folder), Catalog(out)
    source = find_source(folder, requested.layers, config["hidden_size"], masks)
    first, named = source.open(*source.locations[0]), requested.layers or source.stated.layers
    convention = choose_convention(source, first, named, requested, catalog, target)
    job = ImportJob(source, named, convention, first.dtype)
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


def find_source(folder: Path, layers: tuple[int, ...] | None, width: int, masks: Path | None) -> Source:
    """Return the source that a folder's files form. `width`: the target's hidden size. `layers`: those of --layers.

    Raises UsageError where there is none or --layers is missing; DataError for a damaged one.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name one that holds {WANTED}")
    inner = folder / "hidden_states" if (folder / "hidden_states").is_dir() else folder  # where speculators puts them
    deepspec = (folder / INDEX).exists()
    speculators = next(
        (place for place in (folder, inner) if any(NAME.fullmatch(path.name) for path in place.iterdir())), None
    )
    specforge = next(folder.rglob(f"*{SUFFIX}*"), None)
    if sum(map(bool, (deepspec, speculators, specforge))) != 1:
        raise UsageError(f"{folder}: holds {'none or several'} of these: {WANTED}; name a folder with one of them")
    if masks is not None and not speculators:
        raise UsageError(
            f"{folder}: its files hold each sample's loss mask, and --masks is for speculators' hs_<i>.safetensors, "
            "which have none; leave it out"
        )
    if deepspec:
        source = DeepSpec(folder, width)
        if layers not in (None, source.stated.layers):
            stated = ",".join(map(str, source.stated.layers))
            raise UsageError(f"{folder}: its manifest names the layers {stated}; pass the same, or leave out --layers")
        return source
    if layers is None:
        raise UsageError(
            f"{folder}: no file of it says which layers it holds; name them in their order with --layers, such as "
            "--layers 1,9,17,25,33"
        )
    source = (
        Speculators(speculators, len(layers), width, masks) if speculators else SpecForge(folder, len(layers), width)
    )
    if not source.locations:
        raise UsageError(f"{folder}: no sample in it; name a folder that holds {WANTED}")
    return source


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
    cached = catalog.identity.target if catalog.exists else TargetName()
    imported = {
        "form": job.source.form,
        "layers": list(job.named_layers),
        "count_from": job.convention.count_from,
        "last": job.convention.last,
        "proven": target.proven,
    }
    return {
        "target": named_target(model or str(target.folder), target.folder, cached),
        "tokenizer": {"digest": tokenizer_digest(target.folder), "chat_template": template_digest(target.folder)},
        "samples": {"max_length": None, "mask": "imported", "trimmed": True},
        "capture": {"engine": "imported", "dtype": STORED_DTYPE[job.dtype], "imported": imported},
    }


def write_record(out: Path, identity: dict, target: Target) -> None:
    """Record the target's folder, for `evaluate`, and the identity, in case cache.json is lost."""
    with contextlib.suppress(RoomError):
        write_canonical(out / LOG, {"identity": identity, "target": {"folder": str(target.folder.resolve())}})


def summary(catalog: Catalog, job: ImportJob, new: int, target: Target) -> ImportSummary:
    """Print the cache's totals, the samples left out, and the next command."""
    out, planned = catalog.path, catalog.plan
    on_policy, refused = OnPolicyStats(), sum(map(len, refused_by_shard(catalog, job)))
    for shard in range(catalog.shards):
        gauge = catalog.captured(shard, job.columns[-1].name).facts.gauge
        on_policy += OnPolicyStats.from_facts(gauge) if gauge else OnPolicyStats()
    now = f"{new} shards imported now" if new else "nothing to do"
    content = f"{planned.samples:,} samples" + (f", {refused} refused" if refused else "")
    print_visible(visible(f"{out}: {content} in {catalog.shards} shards, from {job.source.form}; {now}"))
    for line in left_out_lines(planned.notes, planned.duplicates):
        print_visible(visible(line), err=True)
    on_policy.report()
    if not target.proven:
        print("unproven: no state was compared with the target; an accept length of 1 would show the mistake late")
    print_visible(visible(f"next: pipeline train-draft --cache {out}"))
    return ImportSummary(planned.samples, planned.tokens, catalog.shards, new, refused, on_policy)
