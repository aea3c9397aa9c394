"""Where a draft comes from: what its run's folder tells, and the cache that it was trained on, where that still is."""

from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.cache import HiddenCache
from pipeline.cache.inspect import describe
from pipeline.cache.manifest import has_form
from pipeline.errors import CacheError, UsageError
from pipeline.evaluation.reports import load_report
from pipeline.published.card import Facts
from pipeline.published.writing import Origin
from pipeline.runs.checkpoint import find_checkpoint, open_checkpoint
from pipeline.runs.folder import DONE, FIGURES, RUN, read_recipe, read_result, read_run

CARD_FIGURES = {"overall": FIGURES, "domains": {str: FIGURES}}


@dataclass(frozen=True)
class Provenance:
    """What an export says of a draft beyond its weights."""

    cache: HiddenCache | None
    origin: Origin
    facts: Facts


def provenance(place: Path) -> Provenance:
    """Return what is known of a run, or of a checkpoint: little of one that stands alone."""
    checkpoint = find_checkpoint(place)
    folder = checkpoint.resolve().parent.parent
    if not (folder / RUN).is_file():
        return Provenance(None, Origin("float32"), Facts())
    recorded, recipe = read_run(folder), read_recipe(folder)
    held, step = recorded["cache"], open_checkpoint(checkpoint, ()).step
    origin = Origin(
        dtype=recipe.train.dtype,
        target=recorded["target"],
        trained_on={"cache": held["digest"], "heldout": recipe.train.heldout},
    )
    begun = recorded.get("start")
    begun = begun and f"{Path(begun['place']).name}, {begun['digest']}"
    facts = Facts(
        start=begun, steps=step, recipe=recipe.toml(), cache=held["digest"], evaluations=evaluations(folder, step)
    )
    cache = _same_cache(held)
    return Provenance(cache, origin, facts) if cache is None else _with_cache(cache, origin, facts)


def _same_cache(held: dict) -> HiddenCache | None:
    try:
        found = HiddenCache.open(held["path"])
    except (UsageError, CacheError):  # moved, deleted or damaged since; the draft is none the worse for it
        return None
    return found if found.digest == held["digest"] else None


def _with_cache(cache: HiddenCache, origin: Origin, facts: Facts) -> Provenance:
    target, told = cache.identity["target"], describe(cache.path)
    origin = replace(
        origin,
        revision=target.get("revision") or None,
        architectures=tuple(cache.target_config.get("architectures") or ()),
        tokens=cache.tokens,
    )
    plan, gauge = told["plan"], told["gauge"]
    rules = cache.identity["samples"]
    told = {key: rules[key] for key in ("template_kwargs", "template_date") if rules.get("template_kwargs")}
    facts = replace(facts, sources=plan["sources"], samples=plan["samples"], gauge=gauge, template=told)
    facts = replace(facts, target_digest=target["digest"])
    return Provenance(cache, origin, facts)


def evaluations(folder: Path, step: int) -> list[dict]:
    """Return what was measured of the checkpoint after `step`: reports of `evaluate` that lie in the run's folder or
    beside it under its name, and the accept length that training measured itself. CacheError for a damaged one."""
    found = []
    own = {folder / RUN, folder / DONE}
    for path in sorted({*folder.glob("*.json"), folder.parent / f"{folder.name}.json"} - own):
        report = _report(path)
        if report is None or report["draft"].get("steps") != step:
            continue
        settings = report["settings"]
        cut = f", blocks cut at confidence {settings['threshold']:g}" if settings.get("threshold") else ""
        most = f"{settings['max_new']} tokens at most{cut}"
        found.append({"title": f"Decoded greedily with the target, {most}", "figures": _figures(report)})
        drawn = report.get("sampled")
        if drawn:
            title = f"Replies drawn from the target at T = {drawn['temperature']:g}, {most}"
            found.append({"title": title, "figures": _figures(drawn)})
    done = read_result(folder)
    if done and done["steps"] == step and done["eval"] and done["eval"]["calls"]:
        title = "On held-out replies that are the target's own, greedy, without decoding"
        found.append({"title": title, "figures": done["eval"]})
    return found


def _figures(part: dict) -> dict:
    return part["overall"] | {"domains": part["domains"]}


def _report(path: Path) -> dict | None:
    """Return a report whose figures a card can show; None for any other file, or one of another version."""
    try:
        report = load_report(path)
    except UsageError:
        return None
    parts = [report, *([report["sampled"]] if report.get("sampled") else [])]
    cut = report["settings"].get("threshold") or 0
    return report if all(has_form(part, CARD_FIGURES) for part in parts) and has_form(cut, float) else None
