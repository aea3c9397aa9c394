"""How the files are to be read: as a cache that is begun says, as was said, or as the target shows."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.layout import IDENTITY
from pipeline.cache.manifest import read_canonical
from pipeline.errors import UsageError
from pipeline.visible_text import say, visible
from stages.import_cache.convert import Import
from stages.import_cache.find_convention import Way, settle
from stages.import_cache.foreign_sample import Foreign
from stages.import_cache.forms import Source
from stages.import_cache.target import Target

PROBED = 3  # samples that are computed again before anything is written


@dataclass(frozen=True)
class Said:
    """What the command line says of the files, None where it leaves that open."""

    layers: tuple[int, ...] | None
    count_from: int | None
    last: str | None


def settled(source: Source, out: Path, said: Said, target: Target) -> Import:
    """Return how the files are to be read: as the cache that is begun says, as was said, or as the target shows."""
    first = source.open(*source.places[0])
    if not first.has_last and said.last not in (None, "none"):
        raise UsageError(f"{first.where}: holds no last state, so it is not {said.last}; leave out --last")
    named = said.layers or source.stated.layers
    begun = begun_way(out)
    if begun:
        way = Way(*(old if new is None else new for old, new in zip(begun, (said.count_from, said.last), strict=True)))
    elif target.proven:
        at = {0, len(source.places) // 2, len(source.places) - 1}
        samples = [first, *(source.open(*source.places[number]) for number in sorted(at - {0}))][:PROBED]
        way, line = settle(target.model, samples, named, said.count_from, said.last)
        say(visible(f"{source.form}: {line}"), err=True)
    else:
        way = stated_way(source, said, first)
    if way.last == "raw" and not target.proven:
        raise UsageError("--last raw needs the target's norm; import without --unproven, or with --last none")
    return Import(source, named, way, first.dtype)


def begun_way(out: Path) -> tuple[int, str] | None:
    """Return the way that a cache already begun at `out` was read in."""
    if not (out / IDENTITY).is_file():
        return None
    imported = read_canonical(out / IDENTITY).get("capture", {}).get("imported")
    return imported and (imported["count_from"], imported["last"])


def stated_way(source: Source, said: Said, first: Foreign) -> Way:
    """Return the way that was said or that the form states, with nothing computed. UsageError for what is left open."""
    count_from = source.stated.count_from if said.count_from is None else said.count_from
    last = (said.last or source.stated.last) if first.has_last else "none"
    if count_from is None or last is None:
        absent = "--count-from" if count_from is None else "--last"
        raise UsageError(
            f"{first.where}: no file says what {absent} is to say, and --unproven computes nothing to find out; add "
            f"{absent}, or import without --unproven"
        )
    return Way(count_from, last)
