"""The parts of `pipeline verify` that need the target: `--deep`, and `--repair`.

Repair touches only what is damaged. Derived files are rebuilt: index, checksum lists, `samples.arrow`, segments of the
plan, cache.json. Columns and the target's own files are captured again, exactly the damaged (shard, column)s. On one
kind of processor bytes depend on nothing but plan, target and versions, and come out as they were; where the captured
bytes differ, a line says so. After any stop, the same command continues.
"""

import contextlib
import json
import os
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

from pipeline.cache.atomic import check_free_space, clean_scratch, in_use, process_lock, size_text, write_errors
from pipeline.cache.catalog import Catalog, Work, has_target, target_manifest
from pipeline.cache.file_writer import create_identity, rebuild_derived, restore_segments
from pipeline.cache.layout import (
    CALIBRATION,
    FORMATS,
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
from pipeline.cache.manifest import canonical, check_file, read_record, write_canonical
from pipeline.cache.samples import ShardPlan, read_batch
from pipeline.cache.schema import ColumnManifest, TargetManifest, read_log
from pipeline.cache.verify import Report, verify
from pipeline.errors import CacheError, UsageError
from pipeline.target.files import find_target
from pipeline.target.weights import check_weights, check_weights_if_recorded
from pipeline.visible_text import print_visible, visible
from stages.cache_hidden.plan_report import Lost, work_bytes
from stages.cache_hidden.settings import CaptureOptions, CaptureSettings, resolve_settings
from stages.cache_hidden.shard_assignment import Worker

VERSIONS = ("vllm", "torch", "transformers", "device")  # facts of a column, of which its last bits may depend
IMPORT_AGAIN = (
    "remove the shards that are damaged, their folders whole, and run the same `pipeline import-cache` again: it makes "
    "exactly these"
)


def verify_and_repair(
    out: Path,
    repair_first: bool,
    deep: bool,
    model: str | None,
    device: str | None,
    device_map: str | None = None,
    python: Path | None = None,
    engine_options: str | None = None,
) -> Report:
    """Verify a cache, after a repair if `repair_first`; `deep` also compares every byte of the target's weights."""
    if deep and model is None:
        raise UsageError("--deep compares the target's files; name it with --model")
    where = CaptureOptions(device=device, device_map=device_map, python=python, engine_options=engine_options)
    where.checked_device_map(os.environ)
    report = repair(out, model, device, where) if repair_first else verify(out)
    if deep and not report.damaged:
        check_model(out, model)
    return report


def check_model(out: Path, model: str) -> None:
    """Compare every byte of a target's weights, at the cache's revision, with the cache's checksums. UsageError."""
    catalog = Catalog(out)
    check_weights(catalog, find_target(model, revision_of(catalog)))


def repair(out: Path, model: str | None, device: str | None, where: CaptureOptions | None = None) -> Report:
    """Repair a cache and return what is still wrong. `model` is needed when states or the target's files are lost.
    where: on which devices it runs, and in which engine's Python; None: on `device`.
    Raises what a capture raises; CacheError for damage that cannot be repaired, with what to do.
    """
    clean_scratch(out)
    before = verify(out)
    if not before.damaged and not before.missing:
        return before
    with write_errors(out, "what is repaired"), process_lock(out, "repair"):  # verified again after a wait for it
        if any(finding.file == IDENTITY for finding in before.damaged):
            restore_identity(out)
        found = {finding.shard for finding in (*before.damaged, *before.missing)}
        return _repair_damaged(out, verify(out, found), model, where or CaptureOptions(device=device))


def _repair_damaged(out: Path, before: Report, model: str | None, where: CaptureOptions) -> Report:
    """Repair what the report `before` lists, and verify that again."""
    catalog = Catalog(out)
    restore_plan(catalog)
    for name in rebuild_derived(catalog):
        _report(f"{name}: made again")
    lost = lost_columns(catalog, before)
    drop_damaged_target(catalog)
    target_lost = (out / SHARDS).is_dir() and not has_target(catalog)
    if drop_damaged_calibrations(out, before) or lost or target_lost:
        _recapture(catalog, lost, model, where)
    catalog.refresh()
    rebuild_derived(catalog)
    return verify(out, {shard for shard, _ in lost} | {finding.shard for finding in before.damaged})


def revision_of(catalog: Catalog) -> str | None:
    """Return the hub revision of a cache's target; None where it came from a folder."""
    return catalog.identity.target.revision or None


def suggest_repair(out: Path, model: str | None, repaired: bool) -> str:
    """Return advice about damage, mostly a command to paste with the model as the last capture named it.

    repaired: a repair has just been tried.
    """
    if repaired:
        return "no repair makes it right; move it out of the cache and repair again"
    if is_imported(out):
        return IMPORT_AGAIN
    request = read_log(out).request
    model = model or (request and request.model) or "TARGET"
    return f"`{shlex.join(['pipeline', 'verify', str(out), '--repair', '--model', model])}` makes it again"


def check_incomplete(out: Path, report: Report, model: str | None, complete: bool) -> None:
    """Raise CacheError for columns that only some shards have, unless a capture is running.

    complete: raise in that case, too, and for a cache of which nothing is captured yet.
    """
    busy = in_use(out)
    if complete and not report.columns:
        raise CacheError(f"{out}: nothing is captured yet; run `pipeline cache-hidden` with this --out")
    if report.incomplete and (complete or not busy):
        what = ", ".join(report.incomplete)
        if busy:
            raise CacheError(f"{out} is still being captured: {what}; wait until it is done")
        command = "the same `pipeline import-cache`" if is_imported(out) else "the same `pipeline cache-hidden`"
        or_repair = "" if is_imported(out) else f", or {suggest_repair(out, model, False)}"
        raise CacheError(f"{out} is incomplete, and nobody is capturing it: {what}; {command} goes on{or_repair}")


def is_imported(out: Path) -> bool:
    """Return whether a cache was imported from another trainer's files, as far as its cache.json can be read."""
    try:
        return Catalog(out).identity.capture.imported is not None
    except CacheError:
        return False


def _report(line: str) -> None:
    print_visible(visible(line), err=True)


def restore_plan(catalog: Catalog) -> None:
    """Restore the plan from the shards' samples where it is damaged. CacheError where it cannot be."""
    out = catalog.path
    try:
        for name in restore_segments(catalog):
            _report(f"{name}: put together again from the shards' samples")
        assert catalog.plan.shards, "a plan has shards"
    except (CacheError, UsageError) as error:
        raise CacheError(
            f"{out}: the plan is lost and cannot be put together from the shards ({error}); move {out / PLAN} away and "
            "run `pipeline cache-hidden` with the same corpora in the same order: it plans the same again, and "
            "captures nothing that is there"
        ) from error


def restore_identity(out: Path) -> None:
    """Rewrite cache.json from the last capture's log, if its hash is the one that the manifests name. CacheError."""
    record = read_log(out)
    identity = record.identity.as_dict() if record.identity else {}
    hashes = _cache_hashes(out)
    right = [version for version in FORMATS if json.loads(canonical(identity, version))["hash"] in hashes]
    if not right:
        raise CacheError(
            f"{out / IDENTITY}: lost, and {out / LOG} does not say what was in it; put a copy of the file back"
        )
    write_canonical(out / IDENTITY, identity, right[0])
    _report(f"{IDENTITY}: made again")


def _cache_hashes(out: Path) -> set[str]:
    """Return the hashes of a cache.json that readable manifests name."""
    paths = {out / TARGET / TARGET_MANIFEST: TargetManifest}
    paths |= dict.fromkeys((out / SHARDS).glob("*/*.json"), ColumnManifest)
    found = set()
    for path, record in paths.items():
        with contextlib.suppress(CacheError):
            found.add(read_record(path, record).cache)
    return found


def lost_columns(catalog: Catalog, report: Report) -> Lost:
    """Return the (shard, column)s to capture again: damaged ones, and those that other shards have and this one lacks.

    Each with the manifest that it had, None where that is unknown.
    """
    damaged = {(finding.shard, finding.column) for finding in report.damaged}
    names = {name for shard in range(catalog.shards) for name in catalog.captured_columns(shard)}
    names = sorted({*names, *(column for shard, column in damaged if column)})
    lost: dict[tuple[int, str], ColumnManifest | None] = {}
    for shard in catalog.plan.shards:
        other_samples = not _has_its_samples(catalog, shard)
        for name in names:
            if other_samples or (shard.number, name) in damaged or not catalog.captured(shard.number, name):
                lost[shard.number, name] = None if other_samples else _former_manifest(catalog, shard.number, name)
    return lost


def _has_its_samples(catalog: Catalog, shard: ShardPlan) -> bool:
    """Return whether a shard's `samples.arrow`, if it has one, equals the plan's; remove one that does not."""
    path = path_inside(catalog.path, f"{SHARDS}/{numbered(shard.number)}/{SAMPLES}")
    try:
        if not path.exists() or read_batch(path).equals(shard.batch):
            return True
    except CacheError:
        pass
    path.unlink(missing_ok=True)
    catalog.refresh(shard.number)
    return False


def _former_manifest(catalog: Catalog, shard: int, column: str) -> ColumnManifest | None:
    try:
        manifest = catalog.read(shard, column)
    except CacheError:
        return None
    return manifest if manifest.cache == catalog.hash else None


def drop_damaged_target(catalog: Catalog) -> None:
    """Remove the files of `target/` that differ from its manifest, so that the next capture stores them again."""
    folder = catalog.path / TARGET
    try:
        files = target_manifest(catalog).files
    except CacheError:
        (folder / TARGET_MANIFEST).unlink(missing_ok=True)
        return
    for name, fact in files.items():
        try:
            check_file(path_inside(folder, name), fact)
        except CacheError:
            path_inside(folder, name).unlink(missing_ok=True)  # raises for a name that leads out of the folder


def drop_damaged_calibrations(out: Path, report: Report) -> bool:
    """Remove damaged calibrations; return whether there were any. The next capture computes the same again."""
    files = {finding.file for finding in report.damaged if finding.file.startswith(CALIBRATION)}
    for file in files:
        path_inside(out, file).unlink(missing_ok=True)
    return bool(files)


def _recapture(catalog: Catalog, lost: Lost, model: str | None, where: CaptureOptions) -> None:
    out, plan = catalog.path, catalog.plan
    if is_imported(out):
        raise UsageError(f"{out} was imported, and what it lost is in the files it came from; {IMPORT_AGAIN}")
    if model is None:
        raise UsageError(
            f"only the target can make again what {out} has lost or lacks; {suggest_repair(out, model, False)}"
        )
    settings = _recapture_settings(catalog, lost, model, where)
    settings.engine.check()
    wanted = [
        (shard, [spec for spec in settings.columns if (shard.number, spec.name) in lost]) for shard in plan.shards
    ]
    work: Work = [(shard, columns) for shard, columns in wanted if columns]
    check_free_space(out, "what is repaired", work_bytes(work))
    what = f"{len(lost)} columns in {len(work)} shards are captured again: {size_text(work_bytes(work))}"
    _report(what if work else "what the cache holds of the target is made again")
    from stages.cache_hidden.capture import capture_shards  # brings torch and transformers

    device_map = where.checked_device_map(os.environ)
    capture_shards(catalog, settings, work, Worker().device(where.device), 0, lost, device_map)
    for (shard, name), former in lost.items():
        current = catalog.captured(shard, name)
        if former and current and current.files != former.files:
            _report(
                f"shard {numbered(shard)}, {name}: right by the probe, but not the bytes that were lost; made with "
                f"{_versions(former)} then, {_versions(current)} now, or by another kind of processor"
            )


def _versions(manifest: ColumnManifest) -> str:
    return ", ".join(f"{name} {getattr(manifest.facts, name)}" for name in VERSIONS if getattr(manifest.facts, name))


def _recapture_settings(
    catalog: Catalog, lost: Lost, model: str, where: CaptureOptions | None = None
) -> CaptureSettings:
    """Return the cache's own settings for this target; each column's spec is the one that most shards have."""
    identity = catalog.identity
    options = replace(
        where or CaptureOptions(),
        layers="-1",
        revision=revision_of(catalog),
        max_length=identity.samples.max_length,
        batch_tokens=identity.capture.batch_tokens,
        dtype=identity.capture.dtype,
    )
    settings = resolve_settings(model, catalog, options)
    create_identity(catalog.path, settings.identity.as_dict())
    check_weights_if_recorded(catalog, settings.folder)
    specs: dict[str, Counter] = {}
    for shard in range(catalog.shards):
        for name, manifest in catalog.captured_columns(shard).items():
            specs.setdefault(name, Counter())[manifest.spec] += 1
    for (_, name), manifest in lost.items():
        if manifest:
            specs.setdefault(name, Counter())[manifest.spec] += 1
    unknown = sorted({name for _, name in lost} - specs.keys())
    if unknown:
        raise CacheError(
            f"{catalog.path}: no shard has a whole manifest of {', '.join(unknown)} any more, so it is open what to "
            "make; `pipeline cache-hidden` with the layers named captures it again"
        )
    return replace(settings, columns=tuple(found.most_common(1)[0][0] for _, found in sorted(specs.items())))
