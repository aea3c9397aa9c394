"""`pipeline verify`, with what it needs the target for: `--deep`, and `--repair`, which makes a cache whole again.

Repair touches only what is damaged. What follows from the rest is written again: index, lists, `samples.arrow`,
segments of the plan, cache.json. What only the target knows, columns and its own files, is captured again, exactly the
damaged (shard, array)s. On one kind of processor bytes depend on nothing but plan, target and versions, and come out as
they were; where another kind or other versions made them, it says so. Stop it whenever you like: the same command goes
on.
"""

import json
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

from pipeline.cache.atomic import check_free_space, clean_scratch, in_use, process_lock, size_text, write_errors
from pipeline.cache.columns import ColumnSpec, column_manifest, complete_manifest
from pipeline.cache.layout import (
    CALIBRATION,
    IDENTITY,
    LOG,
    PLAN,
    SAMPLES,
    SHARDS,
    TARGET,
    TARGET_MANIFEST,
    numbered,
    path_inside,
)
from pipeline.cache.manifest import canonical, check_file, create_identity, read_canonical, write_canonical
from pipeline.cache.plan import Plan, load_plan
from pipeline.cache.rebuild import rebuild_derived, restore_segments, shard_columns
from pipeline.cache.samples import ShardPlan, read_batch
from pipeline.cache.target_folder import has_target, target_manifest
from pipeline.cache.verify import Report, verify
from pipeline.errors import CacheError, UsageError
from pipeline.target.files import find_target
from pipeline.target.weights import check_weights, check_weights_if_kept
from pipeline.visible_text import say, visible
from stages.cache_hidden.capture_log import read_record
from stages.cache_hidden.options import CaptureOptions
from stages.cache_hidden.plan_report import Lost, Work, work_bytes
from stages.cache_hidden.settings import Settings, settle
from stages.cache_hidden.shard_assignment import Worker

IMPORT_AGAIN = (
    "remove the shards that are damaged, their folders whole, and run the same `pipeline import-cache` again: it makes "
    "exactly these"
)


def checked(out: Path, mend: bool, deep: bool, model: str | None, device: str | None) -> Report:
    """Verify a cache, repair it first if `mend`, and with `deep` hold every byte of the target's weights to it, too."""
    if deep and model is None:
        raise UsageError("--deep compares the target's files; name it with --model")
    report = repair(out, model, device) if mend else verify(out)
    if deep and not report.damaged:
        check_model(out, model)
    return report


def check_model(out: Path, model: str) -> None:
    """Hold every byte of a named target's weights to the cache, at the revision that it was captured at."""
    check_weights(out, find_target(model, revision_of(out)))


def repair(out: Path, model: str | None, device: str | None) -> Report:
    """Repair a cache and return what is wrong after it. `model` is needed when states or the target's files are lost.

    Raises what a capture raises; CacheError for damage that nothing can be made again from, with what to do.
    """
    clean_scratch(out)
    before = verify(out)
    if not before.damaged and not before.missing:
        return before
    with write_errors(out, "what is repaired"), process_lock(out, "repair"):  # verified again after a wait for it
        if any(finding.file == IDENTITY for finding in before.damaged):
            restore_identity(out)
        found = {finding.shard for finding in (*before.damaged, *before.missing)}
        return _repaired(out, verify(out, found), model, device)


def _repaired(out: Path, before: Report, model: str | None, device: str | None) -> Report:
    """Repair what is `before` damaged, and look at that again."""
    plan = _whole_plan(out)
    for name in rebuild_derived(out):
        _say(f"{name}: made again")
    lost = lost_columns(out, plan, before)
    drop_damaged_target(out)
    target_lost = (out / SHARDS).is_dir() and not has_target(out)
    if drop_damaged_calibrations(out, before) or lost or target_lost:
        _capture_again(out, plan, lost, model, device)
    rebuild_derived(out)
    return verify(out, {shard for shard, _ in lost} | {finding.shard for finding in before.damaged})


def revision_of(out: Path) -> str | None:
    """Return the revision of the hub that a cache's target is of; None where it came from a folder."""
    return read_canonical(out / IDENTITY)["target"]["revision"] or None


def remedy(out: Path, model: str | None, mended: bool) -> str:
    """Return what to do about damage: a command to paste, with the target as the last capture named it."""
    if mended:
        return "no repair makes it right; move it out of the cache and repair again"
    if is_imported(out):
        return IMPORT_AGAIN
    model = model or read_record(out).get("request", {}).get("model", "TARGET")
    return f"`{shlex.join(['pipeline', 'verify', str(out), '--repair', '--model', model])}` makes it again"


def check_incomplete(out: Path, report: Report, model: str | None, complete: bool) -> None:
    """Refuse columns that only some shards have, unless somebody is capturing them. CacheError.

    Where they have to be `complete`, refuse them in any case, and a cache of which nothing is captured yet, too.
    """
    busy = in_use(out)
    if complete and not report.columns:
        raise CacheError(f"{out}: nothing is captured yet; run `pipeline cache-hidden` with this --out")
    if report.incomplete and (complete or not busy):
        what = ", ".join(report.incomplete)
        if busy:
            raise CacheError(f"{out} is still being captured: {what}; wait until it is done")
        again = "the same `pipeline import-cache`" if is_imported(out) else "the same `pipeline cache-hidden`"
        mend = "" if is_imported(out) else f", or {remedy(out, model, False)}"
        raise CacheError(f"{out} is incomplete, and nobody is capturing it: {what}; {again} goes on{mend}")


def is_imported(out: Path) -> bool:
    """Whether another trainer's files are where a cache came from, as far as its cache.json is whole."""
    try:
        return "imported" in read_canonical(out / IDENTITY, {"capture": dict})["capture"]
    except CacheError:
        return False


def _say(line: str) -> None:
    say(visible(line), err=True)


def _whole_plan(out: Path) -> Plan:
    """The plan, put together from the shards where it is damaged."""
    try:
        for name in restore_segments(out):
            _say(f"{name}: put together again from the shards' samples")
        return load_plan(out)
    except (CacheError, UsageError) as error:
        raise CacheError(
            f"{out}: the plan is lost and cannot be put together from the shards ({error}); move {out / PLAN} away and "
            "run `pipeline cache-hidden` with the same corpora in the same order: it plans the same again, and "
            "captures nothing that is there"
        ) from error


def restore_identity(out: Path) -> None:
    """Write cache.json again as the last capture recorded it, if its hash is the one that everything else names."""
    identity = read_record(out).get("identity", {})
    if json.loads(canonical(identity))["hash"] not in {manifest["cache"] for manifest in _manifests(out)}:
        raise CacheError(
            f"{out / IDENTITY}: lost, and {out / LOG} does not say what was in it; put a copy of the file back"
        )
    write_canonical(out / IDENTITY, identity)
    _say(f"{IDENTITY}: made again")


def _manifests(out: Path) -> list[dict]:
    """Every sound manifest that names the cache it belongs to."""
    paths = [out / TARGET / TARGET_MANIFEST, *(out / SHARDS).glob("*/*.json")]
    found = []
    for path in paths:
        try:
            found.append(read_canonical(path, {"cache": str}))
        except CacheError:
            continue
    return found


def lost_columns(out: Path, plan: Plan, report: Report) -> Lost:
    """Return what has to be captured again: columns found damaged, and those that other shards have and these lack."""
    damaged = {(finding.shard, finding.column) for finding in report.damaged}
    names = sorted({name for shard in plan.shards for name in shard_columns(out, shard.number)})
    names = sorted({*names, *(column for shard, column in damaged if column)})
    lost: dict[tuple[int, str], dict | None] = {}
    for shard in plan.shards:
        strangers = not _has_its_samples(out, shard)
        for name in names:
            if strangers or (shard.number, name) in damaged or not complete_manifest(out, shard.number, name):
                lost[shard.number, name] = None if strangers else _manifest_it_had(out, shard.number, name)
    return lost


def _has_its_samples(out: Path, shard: ShardPlan) -> bool:
    """Whether a shard's `samples.arrow`, if it has one, is the plan's. One that is not is removed."""
    path = path_inside(out, f"{SHARDS}/{numbered(shard.number)}/{SAMPLES}")
    try:
        if not path.exists() or read_batch(path).equals(shard.batch):
            return True
    except CacheError:
        pass
    path.unlink(missing_ok=True)
    return False


def _manifest_it_had(out: Path, shard: int, column: str) -> dict | None:
    try:
        manifest = column_manifest(out, shard, column)
    except CacheError:
        return None
    return manifest if manifest.get("cache") == read_canonical(out / IDENTITY)["hash"] else None


def drop_damaged_target(out: Path) -> None:
    """Remove the files of `target/` that are not what its manifest says, so that they are stored anew."""
    try:
        files = target_manifest(out)["files"]
    except CacheError:
        (out / TARGET / TARGET_MANIFEST).unlink(missing_ok=True)
        return
    for name, fact in files.items():
        try:
            check_file(path_inside(out / TARGET, name), fact)
        except CacheError:
            path_inside(out / TARGET, name).unlink(missing_ok=True)  # where a name leads out, this refuses


def drop_damaged_calibrations(out: Path, report: Report) -> bool:
    """Remove calibrations that are damaged; whether any is lost. The next capture makes them again, as they were."""
    files = {finding.file for finding in report.damaged if finding.file.startswith(CALIBRATION)}
    for file in files:
        path_inside(out, file).unlink(missing_ok=True)
    return bool(files)


def _capture_again(out: Path, plan: Plan, lost: Lost, model: str | None, device: str | None) -> None:
    if is_imported(out):
        raise UsageError(f"{out} was imported, and what it lost is in the files it came from; {IMPORT_AGAIN}")
    if model is None:
        raise UsageError(f"only the target can make again what {out} has lost or lacks; {remedy(out, model, False)}")
    settings = _settings(out, plan, lost, model)
    wanted = [
        (shard, [spec for spec in settings.columns if (shard.number, spec.name) in lost]) for shard in plan.shards
    ]
    work: Work = [(shard, columns) for shard, columns in wanted if columns]
    check_free_space(out, "what is repaired", work_bytes(work))
    what = f"{len(lost)} columns in {len(work)} shards are captured again: {size_text(work_bytes(work))}"
    _say(what if work else "what the cache holds of the target is made again")
    from stages.cache_hidden.capture import capture_shards  # brings torch and transformers

    capture_shards(out, settings, plan, work, Worker().device(device), 0, lost)
    for (shard, name), had in lost.items():
        made = complete_manifest(out, shard, name)
        if had and made and made["files"] != had["files"]:
            _say(
                f"shard {numbered(shard)}, {name}: right by the probe, but not the bytes that were lost; made with "
                f"{_versions(had)} then, {_versions(made)} now, or by another kind of processor"
            )


def _versions(manifest: dict) -> str:
    return ", ".join(f"{name} {manifest['facts'].get(name)}" for name in ("torch", "transformers", "device"))


def _settings(out: Path, plan: Plan, lost: Lost, model: str) -> Settings:
    """Settle the target as the cache has it, and for columns those of the cache, each as most shards keep it."""
    held = read_canonical(out / IDENTITY)
    options = CaptureOptions(
        layers="-1",
        revision=revision_of(out),
        max_length=held["samples"]["max_length"],
        batch_tokens=held["capture"]["batch_tokens"],
        dtype=held["capture"]["dtype"],
    )
    settings = settle(model, out, options)
    create_identity(out, settings.identity)
    check_weights_if_kept(out, settings.folder)
    kept: dict[str, Counter] = {}
    for shard in plan.shards:
        for name, manifest in shard_columns(out, shard.number).items():
            kept.setdefault(name, Counter())[ColumnSpec(**manifest["spec"])] += 1
    for (_, name), manifest in lost.items():
        if manifest:
            kept.setdefault(name, Counter())[ColumnSpec(**manifest["spec"])] += 1
    unknown = sorted({name for _, name in lost} - kept.keys())
    if unknown:
        raise CacheError(
            f"{out}: no shard has a whole manifest of {', '.join(unknown)} any more, so it is open what to make; "
            "`pipeline cache-hidden` with the layers named captures it again"
        )
    return replace(settings, columns=tuple(found.most_common(1)[0][0] for _, found in sorted(kept.items())))
