"""Decide the layer convention: from an unfinished import, the options, the files, or the target's own states."""

from dataclasses import dataclass

from pipeline.cache.catalog import Catalog
from pipeline.errors import UsageError
from pipeline.visible_text import say, visible
from stages.import_cache.convert import ImportJob
from stages.import_cache.detect_format import Source
from stages.import_cache.find_convention import Convention, find_convention
from stages.import_cache.foreign_sample import ForeignSample
from stages.import_cache.target import Target

PROBE_SAMPLES = 3  # samples that the target computes again before anything is written


@dataclass(frozen=True)
class RequestedConvention:
    """The convention that the command line gives; None where it leaves that open."""

    layers: tuple[int, ...] | None
    count_from: int | None
    last: str | None


def make_import_job(source: Source, catalog: Catalog, requested: RequestedConvention, target: Target) -> ImportJob:
    """Return the import job. UsageError where the options do not fit, ProofError as `find_convention`."""
    first = source.open(*source.locations[0])
    if not first.has_last and requested.last not in (None, "none"):
        raise UsageError(f"{first.where}: holds no last state, so it is not {requested.last}; leave out --last")
    named = requested.layers or source.stated.layers
    recorded = recorded_convention(catalog)
    if recorded:
        convention = Convention(
            *(
                old if new is None else new
                for old, new in zip(recorded, (requested.count_from, requested.last), strict=True)
            )
        )
    elif target.proven:
        at = {0, len(source.locations) // 2, len(source.locations) - 1}
        samples = [first, *(source.open(*source.locations[number]) for number in sorted(at - {0}))][:PROBE_SAMPLES]
        convention, line = find_convention(target.model, samples, named, requested.count_from, requested.last)
        say(visible(f"{source.form}: {line}"), err=True)
    else:
        convention = stated_convention(source, requested, first)
    if convention.last == "raw" and not target.proven:
        raise UsageError("--last raw needs the target's norm; import without --unproven, or with --last none")
    return ImportJob(source, named, convention, first.dtype)


def recorded_convention(catalog: Catalog) -> tuple[int, str] | None:
    """Return (count_from, last) as recorded in the cache, None where there is none."""
    if not catalog.exists:
        return None
    imported = catalog.identity.capture.imported
    return imported and (imported.count_from, imported.last)


def stated_convention(source: Source, requested: RequestedConvention, first: ForeignSample) -> Convention:
    """Return the convention of the options or the files, with nothing computed. UsageError where one is missing."""
    count_from = source.stated.count_from if requested.count_from is None else requested.count_from
    last = (requested.last or source.stated.last) if first.has_last else "none"
    if count_from is None or last is None:
        absent = "--count-from" if count_from is None else "--last"
        raise UsageError(
            f"{first.where}: no file says what {absent} is to say, and --unproven computes nothing to find out; add "
            f"{absent}, or import without --unproven"
        )
    return Convention(count_from, last)
